"""InceptionV3 of 2015 with its public weights, the judge of FID, sFID and the Inception score as papers report them.

Images are resized as TensorFlow 1 does, because published scores were computed that way (Parmar et al. 2022 show how
much the resizing matters).
"""

import hashlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cfg_jax.errors import UserError
from cfg_jax.evaluation.inception_network import IMAGE_SIZE, NUM_LOGITS, POOL_WIDTH, SPATIAL_WIDTH, Inception
from cfg_jax.evaluation.judges import Judge, Outputs
from cfg_jax.torch_files import load_openai_state_dict, mismatches, not_finite, unreadable

BATCH_SIZE = 32  # images per device
PUBLISHED = 'weights-inception-2015-12-05-6726825d.pth'
_FIELD = '(config.eval.inception_weights)'
_NAMED_HASH = re.compile(r'-([0-9a-f]{8})\.pth$')  # torch.hub's convention: the sha256's first digits
_EPSILON = 0.001  # of every batch norm

# ---------------------------------------------------------------- weights


def read_weights(path):
    """Read (params of `Inception`, the file's sha256 in hex) from a file of torch.save, in either of its formats.

    Raises UserError if the file is missing or damaged, or its contents do not fit its name or the network.
    """
    if not path:
        raise UserError(
            f"the judge 'inception' needs its weights: download {PUBLISHED} from the releases (v0.2.0) of "
            f'github.com/toshas/torch-fidelity and set its path {_FIELD}.'
        )
    path = os.path.expanduser(path)
    try:
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise UserError(f'{unreadable(path, error, PUBLISHED)} {_FIELD}.') from None
    named = _NAMED_HASH.search(path)
    if named and not digest.startswith(named[1]):
        raise UserError(
            f'{path}: checksum mismatch: its sha256 begins with {digest[:8]}, but its name says {named[1]} {_FIELD}.'
        )
    try:
        state_dict = load_openai_state_dict(path)
    except UserError as error:
        raise UserError(f'{error} {_FIELD}.') from error
    if found := problems(state_dict):
        raise UserError(f'{path}: not the network of {PUBLISHED}: {found[0]} {_FIELD}.')
    params = inception_params(state_dict)
    folded = {'.'.join(key): array for key, array in flatten_dict(params).items()}
    if found := not_finite(state_dict) or not_finite(folded):
        raise UserError(f'{path}: {found[0]}: these weights are damaged {_FIELD}.')
    return params, digest


def problems(state_dict):
    """List the tensors that are missing, surplus, misshapen or not floating-point, one message each."""
    expected = {name: shape for layer in _kernels().items() for name, shape in _tensors(*layer)}
    unused = [name for name in state_dict if name == 'fc.bias' or name.endswith('.bn.num_batches_tracked')]
    return mismatches(state_dict, expected, unused)


def inception_params(state_dict):
    """Convert the PyTorch network's {name: array}, free of `problems`, to params of `Inception`, float32.

    Each batch norm is folded into its convolution, in float64.
    """
    params = {('fc', 'kernel'): np.array(state_dict['fc.weight'].T, np.float32, order='C')}
    for path in _kernels():
        if path == ('fc',):
            continue
        prefix = '.'.join(path)
        mean, var, weight, bias = (
            np.asarray(state_dict[f'{prefix}.bn.{name}'], np.float64)
            for name in ('running_mean', 'running_var', 'weight', 'bias')
        )
        with np.errstate(invalid='ignore'):  # a negative variance gives NaN, which `read_weights` refuses
            scale = weight / np.sqrt(var + _EPSILON)
        kernel = state_dict[f'{prefix}.conv.weight'].transpose(2, 3, 1, 0) * scale
        params[*path, 'kernel'] = np.array(kernel, np.float32, order='C')
        params[*path, 'bias'] = np.array(bias - mean * scale, np.float32)
    return unflatten_dict(params)


def _kernels():
    """Return {path of a layer: shape of its kernel} of every layer of `Inception`."""
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    shapes = flatten_dict(jax.eval_shape(Inception().init, jax.random.key(0), image)['params'])
    return {path[:-1]: leaf.shape for path, leaf in shapes.items() if path[-1] == 'kernel'}


def _tensors(path, shape):
    """List (name, shape) of the PyTorch tensors that make up a layer whose kernel has this shape."""
    prefix = '.'.join(path)
    if len(shape) == 2:
        return [(f'{prefix}.weight', shape[::-1])]
    norm = [(f'{prefix}.bn.{name}', shape[-1:]) for name in ('weight', 'bias', 'running_mean', 'running_var')]
    return [(f'{prefix}.conv.weight', (shape[3], shape[2], shape[0], shape[1])), *norm]


# ---------------------------------------------------------------- images


def resize_matrix(size, new_size=IMAGE_SIZE):
    """Return float32 [new_size, size]: TensorFlow 1's bilinear resize of one axis, without antialiasing.

    Output pixel i samples the input at i · size / new_size, without half-pixel centres: the old `align_corners=False`.
    """
    position = np.arange(new_size, dtype=np.float32) * np.float32(size / new_size)
    low = np.floor(position).astype(int)
    matrix = np.zeros((new_size, size), np.float32)
    np.add.at(matrix, (np.arange(new_size), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(new_size), np.minimum(low + 1, size - 1)), position - low)
    return matrix


@jax.jit
def preprocess(images):
    """Resize and scale uint8 [B, H, W, 1 or 3] to float32 [B, 299, 299, 3] in [-1, 1), as the 2015 graph does."""
    rows, columns = (resize_matrix(size) for size in images.shape[1:3])
    x = images.astype(jnp.float32)
    x = jnp.einsum('ih,bhwc,jw->bijc', rows, x, columns, precision='highest')
    return jnp.broadcast_to((x - 128.0) / 128.0, (len(x), IMAGE_SIZE, IMAGE_SIZE, 3))


# ---------------------------------------------------------------- the judge


def open_judge(data, num_classes, *, weights='', num_steps=2000, mesh=None):
    """Return the `Judge`. weights: path of the public file. Does not use data, num_classes and num_steps."""
    params, digest = read_weights(weights)
    mesh = mesh or Mesh(jax.local_devices()[:1], ('data',))
    replicated, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), mesh.axis_names))
    params = jax.device_put(params, replicated)
    network = jax.jit(lambda params, images: Inception().apply({'params': params}, images), out_shardings=split)
    size = BATCH_SIZE * mesh.size

    def apply(images):
        _check_images(images)
        widths = POOL_WIDTH, NUM_LOGITS, SPATIAL_WIDTH
        outputs = Outputs(*(np.empty((len(images), width), np.float32) for width in widths))
        computing = None
        for start in range(0, len(images), size):
            # the last batch is padded, so that the network is compiled once
            batch = np.resize(images[start : start + size], (size, *images.shape[1:]))
            dispatched = network(params, preprocess(jax.device_put(batch, split)))
            if computing is not None:  # fetch a batch only after dispatching the next one
                _fetch(computing, outputs, start - size)
            computing = dispatched
        if computing is not None:
            _fetch(computing, outputs, start)
        return outputs

    known = '' if digest.startswith(_NAMED_HASH.search(PUBLISHED)[1]) else ', not the published file'
    print(f'judge  inception of {weights}, sha256 {digest}{known}', flush=True)
    return Judge('inception', f'inception:sha256:{digest[:16]}', apply, classes_are_labels=False)


def _fetch(computed, outputs, start):
    """Copy the arrays of one batch, without its padding, into the rows of `outputs` from `start` on."""
    for array, output in zip(computed, outputs):
        rows = output[start : start + len(array)]
        rows[:] = np.asarray(array)[: len(rows)]


def _check_images(images):
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise UserError(
            f"the judge 'inception' takes uint8 images [N, H, W, 1 or 3], not {images.dtype} {list(images.shape)}; "
            'choose another judge or images (config.eval.judge).'
        )
