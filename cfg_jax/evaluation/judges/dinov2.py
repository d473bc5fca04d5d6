"""DINOv2's ViT-L/14 with its public weights, the judge of FD-DINOv2 (Stein et al. 2023); it gives no logits.

Images are resized by Pillow's bicubic filter to 8 bits, as the published numbers' are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from cfg_jax.evaluation import pretrained
from cfg_jax.evaluation.dinov2_network import IMAGE_SIZE, TOKENS, DinoV2
from cfg_jax.torch_files import mismatches

BATCH_SIZE = 8  # images per device
NETWORK = DinoV2()
PUBLISHED = pretrained.Published(
    judge='dinov2',
    name='dinov2_vitl14_pretrain.pth',
    sha256='d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428',
    where='dl.fbaipublicfiles.com/dinov2/dinov2_vitl14',
    field='config.eval.dinov2_weights',
)
_GRID = 37  # positions in a row of the public embedding: those of training's last images, 518x518
_OFFSET = 0.1  # added to the number of positions asked for, as the public code does
_MEAN, _DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of ImageNet
_NAMES = {'kernel': 'weight', 'scale': 'weight'}  # of a layer's arrays in PyTorch

# ---------------------------------------------------------------- weights


def problems(state_dict):
    """List the tensors that are missing, surplus, misshapen or not floating-point, one message each."""
    expected = {}
    for path, shape in _shapes().items():
        order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape)))
        expected[_name(path)] = tuple(shape[axis] for axis in order)
    expected['pos_embed'] = (1, 1 + _GRID**2, NETWORK.width)
    return mismatches(state_dict, expected, unused=('mask_token',))


def dinov2_params(state_dict):
    """Convert the PyTorch network's {name: array}, free of `problems`, to params of `DinoV2`, float32."""
    params = {}
    for path, shape in _shapes().items():
        order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape), range(len(shape)))
        array = state_dict[_name(path)]
        if path == ('pos_embed',):
            array = positions(array)
        params[path] = np.asarray(array.transpose(order), np.float32)
    return unflatten_dict(params)


def _shapes():
    return pretrained.shapes(NETWORK, IMAGE_SIZE)


def _name(path):
    return '.'.join((*path[:-1], _NAMES.get(path[-1], path[-1])))


def positions(embedding):
    """Resample the positional embedding [1, 1 + 37², D], class token first, to [1, 1 + 16², D], float32."""
    token, grid = np.split(np.asarray(embedding, np.float64), [1], axis=1)
    matrix = cubic_matrix(_GRID, round((TOKENS - 1) ** 0.5), _OFFSET)
    grid = np.einsum('ih,nhwd,jw->nijd', matrix, grid.reshape(1, _GRID, _GRID, -1), matrix, optimize=True)
    return np.concatenate([token, grid.reshape(1, TOKENS - 1, -1)], axis=1).astype(np.float32)


def cubic_matrix(size, new_size, offset):
    """Return [new_size, size]: PyTorch's bicubic resampling of one axis, without antialiasing.

    Output i samples the input at (i + 1/2) · size / (new_size + offset) - 1/2, with Keys' kernel (a = -0.75) over the
    four nearest inputs; beyond an end the last input counts.
    """
    centre = (np.arange(new_size) + 0.5) * size / (new_size + offset) - 0.5
    low = np.floor(centre).astype(int)
    matrix = np.zeros((new_size, size))
    for neighbour in range(-1, 3):
        weight = _keys(np.abs(centre - low - neighbour))
        np.add.at(matrix, (np.arange(new_size), np.clip(low + neighbour, 0, size - 1)), weight)
    return matrix


def _keys(t, a=-0.75):
    """Return Keys' cubic convolution kernel at distances t from 0 to 2."""
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    return np.where(t <= 1, near, far)


# ---------------------------------------------------------------- the judge


def whiten(images):
    """Map uint8 [B, H, W, 1 or 3] to float32 [B, H, W, 3], less ImageNet's mean and over its deviation."""
    return (images.astype(jnp.float32) / 255 - _MEAN) / _DEVIATION


@jax.jit
def _network(params, images):
    return (NETWORK.apply({'params': params}, whiten(images)),)


def open_judge(data, num_classes, *, weights='', num_steps=2000, mesh=None, cache=None):
    """Return the `Judge`. weights: path of the public file. It uses nothing else but mesh."""
    return pretrained.judge(
        PUBLISHED,
        weights,
        _network,
        *PUBLISHED.read(weights, problems, dinov2_params),
        widths=(NETWORK.width,),
        batch_size=BATCH_SIZE,
        mesh=mesh,
        prepare=lambda images: pretrained.resize(images, IMAGE_SIZE),
    )
