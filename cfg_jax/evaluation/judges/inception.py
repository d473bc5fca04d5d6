"""InceptionV3 of 2015 with its public weights, the judge of FID, sFID and the Inception score as papers report them.

Images are resized as TensorFlow 1 does, because published scores were computed that way (Parmar et al. 2022 show how
much the resizing matters).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from cfg_jax.evaluation import pretrained
from cfg_jax.evaluation.inception_network import IMAGE_SIZE, NUM_LOGITS, POOL_WIDTH, SPATIAL_WIDTH, Inception
from cfg_jax.torch_files import mismatches

BATCH_SIZE = 32  # images per device
PUBLISHED = pretrained.Published(
    judge='inception',
    name='weights-inception-2015-12-05-6726825d.pth',
    sha256='6726825d',
    where='the releases (v0.2.0) of github.com/toshas/torch-fidelity',
    field='config.eval.inception_weights',
)
_EPSILON = 0.001  # of every batch norm

# ---------------------------------------------------------------- weights


def problems(state_dict):
    """List the tensors that are missing, surplus, misshapen or not floating-point, one message each."""
    expected = {}
    for path, shape in _kernels().items():
        if path == ('fc',):
            expected['fc.weight'] = shape[::-1]
        else:
            expected |= pretrained.convolution_tensors(shape, *_names(path))
    unused = [name for name in state_dict if name == 'fc.bias' or name.endswith('.bn.num_batches_tracked')]
    return mismatches(state_dict, expected, unused)


def inception_params(state_dict):
    """Convert the PyTorch network's {name: array}, free of `problems`, to params of `Inception`, float32."""
    params = {path: pretrained.folded(state_dict, *_names(path), _EPSILON) for path in _kernels() if path != ('fc',)}
    params['fc',] = {'kernel': np.array(state_dict['fc.weight'].T, np.float32, order='C')}
    return unflatten_dict(params)


def _kernels():
    return pretrained.kernels(Inception(), IMAGE_SIZE)


def _names(path):
    """Return PyTorch's names of a convolution and of the batch norm behind it."""
    return '.'.join((*path, 'conv')), '.'.join((*path, 'bn'))


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


@jax.jit
def _network(params, x):
    return Inception().apply({'params': params}, x)


def open_judge(data, num_classes, *, weights='', num_steps=2000, mesh=None, cache=None):
    """Return the `Judge`. weights: path of the public file. It uses nothing else but mesh."""
    return pretrained.judge(
        PUBLISHED,
        weights,
        # two programs: the large one is compiled once, whatever the images' size
        lambda params, images: _network(params, preprocess(images)),
        *PUBLISHED.read(weights, problems, inception_params),
        widths=(POOL_WIDTH, NUM_LOGITS, SPATIAL_WIDTH),
        batch_size=BATCH_SIZE,
        mesh=mesh,
    )
