"""ADM's noisy classifier (Dhariwal & Nichol 2021, section 4): the UNet's encoder under an attention pool."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfg_jax.models import blocks
from cfg_jax.models.unet import Encoder


class AttentionPool(nn.Module):
    """[B, H, W, C] -> float32 [B, features]: the pixels' mean attends to itself and to every pixel (CLIP's pooling).

    The positional embedding ties the parameters to one H x W.
    """

    features: int
    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        tokens = x.reshape(B, H * W, C)
        tokens = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
        position = self.param('position', nn.initializers.normal(C**-0.5), (H * W + 1, C))
        tokens = tokens + position.astype(tokens.dtype)
        qkv = blocks.Dense(3 * C, dtype=self.dtype, name='qkv')(tokens)
        q, k, v = jnp.moveaxis(qkv.reshape(B, H * W + 1, 3, self.num_heads, C // self.num_heads), 2, 0)
        pooled = jax.nn.dot_product_attention(q[:, :1], k, v).reshape(B, C)
        return blocks.Dense(self.features, name='out')(pooled.astype(jnp.float32))


class NoisyClassifier(Encoder):
    """z [B, H, W, C], λ [B] -> logits, float32 [B, num_classes]: p(class | z_λ), to be trained at every λ.

    It takes images of the size that it was initialised with alone (see AttentionPool).
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, z, logsnr, *, train=False):
        h, _ = self.encode(z, self.embed_time(logsnr), train)
        h = nn.silu(blocks.GroupNorm(self.num_groups, name='norm_out')(h))
        # the middle's attention has already checked that the heads divide the channels
        heads = h.shape[-1] // self.head_channels if self.head_channels else self.num_heads
        return AttentionPool(self.num_classes, heads, self.dtype, name='pool')(h)
