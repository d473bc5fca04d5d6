"""DINOv2's vision transformer ViT-L/14 without registers (Oquab et al. 2023), the network of FD-DINOv2; inference only.

Names are those of the public PyTorch weights: `blocks.0.attn.qkv` and so on.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

IMAGE_SIZE, PATCH = 224, 14
TOKENS = 1 + (IMAGE_SIZE // PATCH) ** 2  # the class token first
# By default accelerators round factors to 16 or 19 bits, and scores would depend on the machine.
_PRECISION = jax.lax.Precision.HIGHEST


def _dense(x, name, features):
    return nn.Dense(features, precision=_PRECISION, name=name)(x)


def _norm(x, name):
    return nn.LayerNorm(epsilon=1e-6, name=name)(x)


class Block(nn.Module):
    """Transformer block with a gain for each channel of its two branches: [B, N, D] -> the same shape."""

    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        gains = [self.param(f'{name}.gamma', nn.initializers.ones, (width,)) for name in ('ls1', 'ls2')]
        x = x + gains[0] * self._attention(_norm(x, 'norm1'))
        hidden = nn.gelu(_dense(_norm(x, 'norm2'), 'mlp.fc1', 4 * width), approximate=False)
        return x + gains[1] * _dense(hidden, 'mlp.fc2', width)

    def _attention(self, x):
        B, N, D = x.shape
        q, k, v = jnp.moveaxis(_dense(x, 'attn.qkv', 3 * D).reshape(B, N, 3, self.heads, D // self.heads), 2, 0)
        scores = jnp.einsum('bqhd,bkhd->bhqk', q, k, precision=_PRECISION) / (D // self.heads) ** 0.5
        out = jnp.einsum('bhqk,bkhd->bqhd', nn.softmax(scores), v, precision=_PRECISION)
        return _dense(out.reshape(B, N, D), 'attn.proj', D)


class DinoV2(nn.Module):
    """ViT from images float32 [B, 224, 224, 3], whitened as ImageNet, to the normed class token, float32 [B, width]."""

    width: int = 1024
    depth: int = 24
    heads: int = 16

    @nn.compact
    def __call__(self, x):
        assert x.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE, 3), x.shape
        size = (PATCH, PATCH)
        x = nn.Conv(self.width, size, size, 'VALID', precision=_PRECISION, name='patch_embed.proj')(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param('cls_token', nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        x = x + self.param('pos_embed', nn.initializers.zeros, (1, TOKENS, self.width))
        for i in range(self.depth):
            x = Block(self.heads, name=f'blocks.{i}')(x)
        return _norm(x[:, 0], 'norm')
