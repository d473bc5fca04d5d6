"""InceptionV3 as the 2015 TensorFlow graph has it (Szegedy et al. 2015), the network of FID; inference only.

It differs from the paper's network and from later releases: average pools do not count the padding, the last block
pools by maximum, and there are 1008 classes. Each batch norm is folded into the convolution before it, as its bias.
Names are those of the public PyTorch weights: `Mixed_5b.branch1x1` and so on.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

IMAGE_SIZE = 299
POOL_WIDTH, NUM_LOGITS, SPATIAL_WIDTH = 2048, 1008, 17 * 17 * 7
# By default accelerators round factors to 16 or 19 bits, and scores would depend on the machine.
_PRECISION = jax.lax.Precision.HIGHEST


def _conv(x, name, features, kernel=(1, 1), strides=1, padding='SAME'):
    return nn.relu(nn.Conv(features, kernel, strides, padding, precision=_PRECISION, name=name)(x))


def _chain(x, *layers):
    for layer in layers:
        x = _conv(x, *layer)
    return x


_average = partial(nn.avg_pool, window_shape=(3, 3), strides=(1, 1), padding='SAME', count_include_pad=False)
_maximum = partial(nn.max_pool, window_shape=(3, 3), strides=(1, 1), padding='SAME')
_halving_maximum = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


def _concatenate(*branches):
    return jnp.concatenate(branches, axis=-1)


class Block35(nn.Module):
    """Inception block: [B, 35, 35, C] -> [B, 35, 35, 224 + pool_features]."""

    pool_features: int

    @nn.compact
    def __call__(self, x):
        return _concatenate(
            _conv(x, 'branch1x1', 64),
            _chain(x, ('branch5x5_1', 48), ('branch5x5_2', 64, (5, 5))),
            _chain(x, ('branch3x3dbl_1', 64), ('branch3x3dbl_2', 96, (3, 3)), ('branch3x3dbl_3', 96, (3, 3))),
            _conv(_average(x), 'branch_pool', self.pool_features),
        )


class Reduction35(nn.Module):
    """Downsampling block: [B, 35, 35, 288] -> [B, 17, 17, 768]."""

    @nn.compact
    def __call__(self, x):
        double = _chain(x, ('branch3x3dbl_1', 64), ('branch3x3dbl_2', 96, (3, 3)))
        return _concatenate(
            _conv(x, 'branch3x3', 384, (3, 3), 2, 'VALID'),
            _conv(double, 'branch3x3dbl_3', 96, (3, 3), 2, 'VALID'),
            _halving_maximum(x),
        )


class Block17(nn.Module):
    """Inception block: [B, 17, 17, 768] -> the same shape. features: width inside its factorised 7x7 convolutions."""

    features: int

    @nn.compact
    def __call__(self, x):
        width, row, column = self.features, (1, 7), (7, 1)
        double = (('branch7x7dbl_1', width), ('branch7x7dbl_2', width, column), ('branch7x7dbl_3', width, row))
        return _concatenate(
            _conv(x, 'branch1x1', 192),
            _chain(x, ('branch7x7_1', width), ('branch7x7_2', width, row), ('branch7x7_3', 192, column)),
            _chain(x, *double, ('branch7x7dbl_4', width, column), ('branch7x7dbl_5', 192, row)),
            _conv(_average(x), 'branch_pool', 192),
        )


class Reduction17(nn.Module):
    """Downsampling block: [B, 17, 17, 768] -> [B, 8, 8, 1280]."""

    @nn.compact
    def __call__(self, x):
        seven = _chain(x, ('branch7x7x3_1', 192), ('branch7x7x3_2', 192, (1, 7)), ('branch7x7x3_3', 192, (7, 1)))
        return _concatenate(
            _conv(_conv(x, 'branch3x3_1', 192), 'branch3x3_2', 320, (3, 3), 2, 'VALID'),
            _conv(seven, 'branch7x7x3_4', 192, (3, 3), 2, 'VALID'),
            _halving_maximum(x),
        )


class Block8(nn.Module):
    """Inception block: [B, 8, 8, C] -> [B, 8, 8, 2048]. pool: a function of images that keeps their shape."""

    pool: Callable

    @nn.compact
    def __call__(self, x):
        single = _conv(x, 'branch3x3_1', 384)
        double = _chain(x, ('branch3x3dbl_1', 448), ('branch3x3dbl_2', 384, (3, 3)))
        return _concatenate(
            _conv(x, 'branch1x1', 320),
            _conv(single, 'branch3x3_2a', 384, (1, 3)),
            _conv(single, 'branch3x3_2b', 384, (3, 1)),
            _conv(double, 'branch3x3dbl_3a', 384, (1, 3)),
            _conv(double, 'branch3x3dbl_3b', 384, (3, 1)),
            _conv(self.pool(x), 'branch_pool', 192),
        )


class Inception(nn.Module):
    """InceptionV3 from images float32 [B, 299, 299, 3] in [-1, 1) to (features, logits, spatial features), float32.

    features [B, 2048]: pool_3, for FID. logits [B, 1008]: without the last layer's bias. spatial [B, 2023]: for sFID,
    the first 7 channels of Mixed_6d (`mixed_6/conv` in the graph) at every pixel.
    """

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        assert (H, W, C) == (IMAGE_SIZE, IMAGE_SIZE, 3), x.shape
        x = _conv(x, 'Conv2d_1a_3x3', 32, (3, 3), 2, 'VALID')
        x = _conv(x, 'Conv2d_2a_3x3', 32, (3, 3), 1, 'VALID')
        x = _halving_maximum(_conv(x, 'Conv2d_2b_3x3', 64, (3, 3)))
        x = _conv(x, 'Conv2d_3b_1x1', 80)
        x = _halving_maximum(_conv(x, 'Conv2d_4a_3x3', 192, (3, 3), 1, 'VALID'))
        x = Block35(32, name='Mixed_5b')(x)
        x = Block35(64, name='Mixed_5c')(x)
        x = Block35(64, name='Mixed_5d')(x)
        x = Reduction35(name='Mixed_6a')(x)
        x = Block17(128, name='Mixed_6b')(x)
        x = Block17(160, name='Mixed_6c')(x)
        x = Block17(160, name='Mixed_6d')(x)
        spatial = x[..., :7].reshape(B, SPATIAL_WIDTH)
        x = Block17(192, name='Mixed_6e')(x)
        x = Reduction17(name='Mixed_7a')(x)
        x = Block8(_average, name='Mixed_7b')(x)
        x = Block8(_maximum, name='Mixed_7c')(x)
        features = x.mean(axis=(1, 2))
        logits = nn.Dense(NUM_LOGITS, use_bias=False, precision=_PRECISION, name='fc')(features)
        return features, logits, spatial
