"""ADM's noisy classifier (Dhariwal & Nichol 2021, section 4): the UNet's encoder under an attention pool."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cfg_jax.models import blocks
from cfg_jax.models.unet import Encoder
from cfg_jax.typing import Array, Float, Float32


class AttentionPool(nn.Module):
    """CLIP's pooling: the pixels' mean attends to itself and to every pixel.

    The positional embedding ties the parameters to one H x W.
    """

    features: int
    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float32[Array, 'B {self.features}']:
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
    """ADM's noisy classifier, called with z and λ: the logits of p(class | z_λ), trained at every λ.

    It only takes images of the size that it was initialised with (see AttentionPool).
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(
        self, z: Float[Array, 'B H W C'], logsnr: Float[Array, ' B'], *, train: bool = False
    ) -> Float32[Array, 'B {self.num_classes}']:
        h, _ = self.encode(z, self.embed_time(logsnr), train)
        h = nn.silu(blocks.GroupNorm(self.num_groups, name='norm_out')(h))
        return AttentionPool(self.num_classes, self.num_heads_at(h.shape[-1]), self.dtype, name='pool')(h)
