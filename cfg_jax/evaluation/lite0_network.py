"""EfficientNet-Lite0 (Tan & Le 2019, in the 2020 form for phones); inference only.

It differs from EfficientNet-B0: no squeeze-and-excitation, ReLU6 in place of swish, and stem and head that never scale.
Each batch norm is folded into the convolution before it, as its bias. Names are those of the public PyTorch weights.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

IMAGE_SIZE = 224
WIDTH, NUM_LOGITS = 1280, 1000
# (blocks, kernel, stride of the first, expansion, channels)
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
# By default accelerators round factors to 16 or 19 bits, and scores would depend on the machine.
_PRECISION = jax.lax.Precision.HIGHEST


def _conv(x, name, features, kernel=1, stride=1):
    return nn.Conv(features, (kernel, kernel), (stride, stride), precision=_PRECISION, name=name)(x)


class Depthwise(nn.Module):
    """Convolution of each channel by itself, padded as TensorFlow pads: [B, H, W, C] -> [B, H / stride, W / stride, C].

    It is a sum of shifted images, each times a row of weights: XLA's own convolution by groups takes some thirty
    times as long on CPUs.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (self.kernel, self.kernel, 1, C))
        bias = self.param('bias', nn.initializers.zeros, (C,))
        stride, (height, width) = self.stride, (-(-size // self.stride) for size in (H, W))
        pads = jax.lax.padtype_to_pads((H, W), kernel.shape[:2], (stride, stride), 'SAME')
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        y = jnp.broadcast_to(bias, (B, height, width, C))
        for i in range(self.kernel):
            for j in range(self.kernel):
                y += kernel[i, j] * padded[:, i : i + stride * height : stride, j : j + stride * width : stride]
        return y


class Block(nn.Module):
    """Inverted residual block: [B, H, W, C] -> [B, H / stride, W / stride, features]."""

    kernel: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x):
        before, width = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            x = nn.relu6(_conv(x, '_expand_conv', width))
        x = nn.relu6(Depthwise(self.kernel, self.stride, name='_depthwise_conv')(x))
        x = _conv(x, '_project_conv', self.features)
        return x + before if x.shape == before.shape else x


class Lite0(nn.Module):
    """EfficientNet-Lite0 from images float32 [B, 224, 224, 3] to (features [B, 1280], logits [B, 1000]), float32."""

    @nn.compact
    def __call__(self, x):
        assert x.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE, 3), x.shape
        x = nn.relu6(_conv(x, '_conv_stem', 32, 3, 2))
        number = 0
        for blocks, kernel, stride, expansion, features in _STAGES:
            for i in range(blocks):
                x = Block(kernel, 1 if i else stride, expansion, features, name=f'_blocks.{number}')(x)
                number += 1
        x = nn.relu6(_conv(x, '_conv_head', WIDTH))
        features = x.mean(axis=(1, 2))
        return features, nn.Dense(NUM_LOGITS, precision=_PRECISION, name='_fc')(features)
