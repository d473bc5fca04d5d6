"""InceptionV3 of 2015 with its public weights, the judge of FID, sFID and the Inception score as papers report them.

Images are resized as TensorFlow 1 does it, for the published numbers were made so (Parmar et al. 2022 show how much
depends on that).
"""

import hashlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.errors import UserError
from cfg_jax.evaluation.inception_network import IMAGE_SIZE, NUM_LOGITS, POOL_WIDTH, SPATIAL_WIDTH, Inception
from cfg_jax.evaluation.judges import Judge, Outputs
from cfg_jax.torch_files import load_openai_state_dict, unreadable
from cfg_jax.training import sharding

PUBLISHED = 'weights-inception-2015-12-05-6726825d.pth'
_FIELD = '(config.eval.inception_weights)'
_NAMED_HASH = re.compile(r'-([0-9a-f]{8})\.pth$')  # torch.hub's convention: the sha256's first digits
_EPSILON = 0.001  # of every batch norm

# ---------------------------------------------------------------- weights


def read_weights(path):
    """(params of `Inception`, the file's sha256 in hex) of a file saved by torch.save, in either of its formats.

    Raises UserError where the file is missing, damaged, not what its name says, or of another network.
    """
    if not path:
        raise UserError(
            f"the judge 'inception' needs its weights: download {PUBLISHED} from the releases (v0.2.0) of "
            f'github.com/toshas/torch-fidelity and give its path {_FIELD}.'
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
            f'{path}: damaged or another file: its sha256 begins with {digest[:8]}, its name says {named[1]} {_FIELD}.'
        )
    try:
        state_dict = load_openai_state_dict(path)
    except UserError as error:
        raise UserError(f'{error} {_FIELD}.') from error
    if problem := next(problems(state_dict), None):
        raise UserError(f'{path}: not the network of {PUBLISHED}: {problem} {_FIELD}.')
    return inception_params(state_dict), digest


def problems(state_dict):
    """One text for each tensor that is missing, of another shape, not of floating point, or surplus."""
    expected = {name: shape for layer in _kernels().items() for name, shape in _tensors(*layer)}
    for name, shape in expected.items():
        array = state_dict.get(name)
        if array is None:
            yield f'{name} is missing'
        elif array.shape != shape:
            yield f'{name} has the shape {array.shape}, not {shape}'
        elif array.dtype.kind != 'f':
            yield f'{name} holds {array.dtype}, not floating-point numbers'
    for name in state_dict:
        unused = name == 'fc.bias' or name.endswith('.bn.num_batches_tracked')
        if name not in expected and not unused:
            yield f'{ascii(name)[1:-1][:80]} is surplus'


def inception_params(state_dict):
    """The PyTorch network's {name: array}, without `problems` -> params of `Inception`, float32.

    Each batch norm is folded into its convolution, in float64.
    """
    params = {'fc': {'kernel': np.array(state_dict['fc.weight'].T, np.float32, order='C')}}
    for path in _kernels():
        if path == ('fc',):
            continue
        prefix = '.'.join(path)
        mean, var, weight, bias = (
            np.asarray(state_dict[f'{prefix}.bn.{name}'], np.float64)
            for name in ('running_mean', 'running_var', 'weight', 'bias')
        )
        scale = weight / np.sqrt(var + _EPSILON)
        kernel = state_dict[f'{prefix}.conv.weight'].transpose(2, 3, 1, 0) * scale
        node = params
        for name in path:
            node = node.setdefault(name, {})
        node['kernel'] = np.array(kernel, np.float32, order='C')
        node['bias'] = np.array(bias - mean * scale, np.float32)
    return params


def _kernels():
    """{path of a layer: shape of its kernel} of every layer of `Inception`."""
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), image)['params']
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    paths = {tuple(step.key for step in path): leaf.shape for path, leaf in leaves}
    return {path[:-1]: shape for path, shape in paths.items() if path[-1] == 'kernel'}


def _tensors(path, shape):
    """(name, shape) of each PyTorch tensor that a layer with this kernel is made of."""
    prefix = '.'.join(path)
    if len(shape) == 2:
        return [(f'{prefix}.weight', shape[::-1])]
    norm = [(f'{prefix}.bn.{name}', shape[-1:]) for name in ('weight', 'bias', 'running_mean', 'running_var')]
    return [(f'{prefix}.conv.weight', (shape[3], shape[2], shape[0], shape[1])), *norm]


# ---------------------------------------------------------------- images


def resize_matrix(size, new_size=IMAGE_SIZE):
    """float32 [new_size, size]: one axis of TensorFlow 1's bilinear resize, without antialiasing.

    Pixel i is taken at i · size / new_size, not at half-pixel centres: what `align_corners=False` meant then.
    """
    position = np.arange(new_size, dtype=np.float32) * np.float32(size / new_size)
    low = np.floor(position).astype(int)
    matrix = np.zeros((new_size, size), np.float32)
    np.add.at(matrix, (np.arange(new_size), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(new_size), np.minimum(low + 1, size - 1)), position - low)
    return matrix


@jax.jit
def preprocess(images):
    """uint8 [B, H, W, C], C 1 or 3 -> float32 [B, 299, 299, 3] in [-1, 1), as the graph does it."""
    rows, columns = (resize_matrix(size) for size in images.shape[1:3])
    x = images.astype(jnp.float32)
    x = jnp.einsum('ih,bhwc,jw->bijc', rows, x, columns, precision='highest')
    return jnp.broadcast_to((x - 128.0) / 128.0, (len(x), IMAGE_SIZE, IMAGE_SIZE, 3))


# ---------------------------------------------------------------- the judge


def open_judge(data, num_classes, *, weights='', num_steps=0, mesh=None, batch_size=32):
    """The `Judge`. weights: path of the public file; batch_size: images a device. The others are not used."""
    params, digest = read_weights(weights)
    mesh = sharding.local_mesh()
    params = jax.device_put(params, sharding.replicated(mesh))
    network = jax.jit(
        lambda params, images: Inception().apply({'params': params}, images),
        out_shardings=sharding.batch_sharding(mesh),
    )
    size = batch_size * mesh.size

    def apply(images):
        _check_images(images)
        widths = POOL_WIDTH, NUM_LOGITS, SPATIAL_WIDTH
        outputs = Outputs(*(np.empty((len(images), width), np.float32) for width in widths))
        computing = None
        for start in range(0, len(images), size):
            # filled up, so that there is one compilation
            batch = np.resize(images[start : start + size], (size, *images.shape[1:]))
            dispatched = network(params, preprocess(jax.device_put(batch, sharding.batch_sharding(mesh))))
            if computing is not None:  # each batch is fetched after the next one has been dispatched
                _fetch(computing, outputs, start - size)
            computing = dispatched
        if computing is not None:
            _fetch(computing, outputs, start)
        return outputs

    known = '' if digest.startswith(_NAMED_HASH.search(PUBLISHED)[1]) else ', not the published file'
    print(f'judge  inception of {weights}, sha256 {digest}{known}', flush=True)
    return Judge('inception', f'inception:sha256:{digest[:16]}', apply, classes_are_labels=False)


def _fetch(computed, outputs, start):
    """Copies the arrays of one batch into the rows of `outputs` from `start` on, less what it was filled up with."""
    for array, output in zip(computed, outputs):
        rows = output[start : start + len(array)]
        rows[:] = np.asarray(array)[: len(rows)]


def _check_images(images):
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise UserError(
            f"the judge 'inception' takes uint8 images [N, H, W, 1 or 3], not {images.dtype} {list(images.shape)}; "
            'choose another judge or images (config.eval.judge).'
        )
