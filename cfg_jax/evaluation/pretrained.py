"""Judges that are published networks: read their weights files, and apply them to any number of images."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from cfg_jax.errors import UserError
from cfg_jax.evaluation.judges import Judge, Outputs
from cfg_jax.torch_files import load_openai_state_dict, not_finite, unreadable

_NAMED_HASH = re.compile(r'-([0-9a-f]{8})\.pth$')  # torch.hub's convention: the sha256's first digits
_BATCHES = 4  # that a judge is given at once: enough to keep an accelerator busy, and minutes at most on CPUs

# ---------------------------------------------------------------- weights


@dataclasses.dataclass(frozen=True)
class Published:
    """A published file of weights that `torch.save` wrote.

    judge: the judge that needs it. name: the file's. sha256: its first digits or all, in hexadecimal. where: words that
    say where it can be had. field: the config field that chose it, for errors.
    """

    judge: str
    name: str
    sha256: str
    where: str
    field: str

    def read(self, path, problems, convert):
        """Read (parameters, the file's sha256 in hex) from a file of torch.save, in either of its formats.

        problems: function from {name: array} to the list of what does not fit the network; convert: from {name: array}
        without problems to the parameters. Raises UserError if the file is missing or damaged, or its contents do not
        fit its name or the network.
        """
        path = self.require(path)
        digest = self._digest(path)
        try:
            state_dict = load_openai_state_dict(path)
        except UserError as error:
            raise UserError(f'{error} ({self.field}).') from error
        if found := problems(state_dict):
            raise UserError(f'{path}: not the network of {self.name}: {found[0]} ({self.field}).')
        params = convert(state_dict)
        converted = {'.'.join(key): array for key, array in flatten_dict(params).items()}
        if found := not_finite(state_dict) or not_finite(converted):
            raise UserError(f'{path}: {found[0]}: these weights are damaged ({self.field}).')
        return params, digest

    def require(self, path):
        """Return the path with its ~ replaced. Raises UserError unless it is a file that can be read."""
        if not path:
            raise UserError(
                f'the judge {self.judge!r} needs its weights: download {self.name} from {self.where} and set its path '
                f'({self.field}).'
            )
        path = os.path.expanduser(path)
        try:
            open(path, 'rb').close()
        except OSError as error:
            raise UserError(f'{unreadable(path, error, self.name)} ({self.field}).') from None
        return path

    def _digest(self, path):
        """Return the file's sha256 in hex. Raises UserError if the file's name gives another."""
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        named = _NAMED_HASH.search(path)
        if named and not digest.startswith(named[1]):
            raise UserError(
                f'{path}: checksum mismatch: its sha256 begins with {digest[:8]}, but its name says {named[1]} '
                f'({self.field}).'
            )
        return digest


def shapes(module, image_size):
    """Return {path: shape} of every array of the params of a network of square RGB images."""
    image = jnp.zeros((1, image_size, image_size, 3))
    params = jax.eval_shape(module.init, jax.random.key(0), image)['params']
    return {path: leaf.shape for path, leaf in flatten_dict(params).items()}


def kernels(module, image_size):
    """Return {path of a layer: shape of its kernel} of every layer of such a network."""
    return {path[:-1]: shape for path, shape in shapes(module, image_size).items() if path[-1] == 'kernel'}


_NORM = ('running_mean', 'running_var', 'weight', 'bias')


def convolution_tensors(shape, convolution, norm):
    """Return {name: shape} of PyTorch's tensors of a convolution and the batch norm behind it.

    shape: of the kernel, [H, W, in, out]. convolution, norm: names of the two layers in PyTorch.
    """
    height, width, inputs, outputs = shape
    of_norm = {f'{norm}.{name}': (outputs,) for name in _NORM}
    return {f'{convolution}.weight': (outputs, inputs, height, width), **of_norm}


def folded(state_dict, convolution, norm, epsilon):
    """Fold a batch norm into the convolution before it: {'kernel': [H, W, in, out], 'bias': [out]}, float32.

    The names are those of `convolution_tensors`; the arithmetic is float64.
    """
    mean, variance, weight, bias = (np.asarray(state_dict[f'{norm}.{name}'], np.float64) for name in _NORM)
    with np.errstate(invalid='ignore'):  # a negative variance gives NaN, which `Published.read` refuses
        scale = weight / np.sqrt(variance + epsilon)
    kernel = state_dict[f'{convolution}.weight'].transpose(2, 3, 1, 0) * scale
    return {'kernel': np.array(kernel, np.float32, order='C'), 'bias': np.array(bias - mean * scale, np.float32)}


# ---------------------------------------------------------------- the judge


def judge(published, path, network, params, digest, *, widths, batch_size, mesh, prepare=None):
    """Return the `Judge` of a network with the weights that `published.read` found; prints a line about them.

    network: jitted function of (params, a batch of images) to the arrays of `Outputs`, float32 [B, width] each, spread
    over the mesh (None: the first local device). batch_size: images per device. prepare: function of a batch, uint8 in
    NumPy, on the host.
    """
    mesh = mesh or Mesh(jax.local_devices()[:1], ('data',))
    replicated, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), mesh.axis_names))
    params = jax.device_put(params, replicated)
    size = batch_size * mesh.size

    def apply(images):
        _check_images(published.judge, images)
        outputs = Outputs(*(np.empty((len(images), width), np.float32) for width in widths))
        computing = None
        for start in range(0, len(images), size):
            # the last batch is padded, so that the network is compiled once
            batch = np.resize(images[start : start + size], (size, *images.shape[1:]))
            dispatched = network(params, jax.device_put(prepare(batch) if prepare else batch, split))
            if computing is not None:  # fetch a batch only after dispatching the next one
                _fetch(computing, outputs, start - size)
            computing = dispatched
        if computing is not None:
            _fetch(computing, outputs, start)
        return outputs

    known = '' if digest.startswith(published.sha256) else ', not the published file'
    print(f'judge  {published.judge} of {path}, sha256 {digest}{known}', flush=True)
    identity = f'{published.judge}:sha256:{digest[:16]}'
    return Judge(
        published.judge, identity, apply, classes_are_labels=False, field=published.field, chunk=_BATCHES * size
    )


def _fetch(computed, outputs, start):
    """Copy the arrays of one batch, without its padding, into the rows of `outputs` from `start` on."""
    for array, output in zip(computed, outputs):
        rows = output[start : start + len(array)]
        rows[:] = np.asarray(array)[: len(rows)]


def _check_images(judge, images):
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise UserError(
            f'the judge {judge!r} takes uint8 images [N, H, W, 1 or 3], not {images.dtype} {list(images.shape)}; '
            'choose another judge or images (config.eval.judge).'
        )


# ---------------------------------------------------------------- images


@functools.cache
def _threads():
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), 'resize')


def resize(images, size):
    """Resize uint8 [N, H, W, 1 or 3] to uint8 [N, size, size, C] by Pillow's bicubic filter, in threads."""
    if images.shape[1:3] == (size, size):
        return images

    def one(image):
        pillow = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        return np.asarray(pillow.resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, -1)

    return np.stack(list(_threads().map(one, images)))
