"""The building blocks of ADM's networks (Dhariwal & Nichol 2021, section 3), on images [B, H, W, C].

Parameters are float32; blocks compute in `dtype`, norms and softmax in float32.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cfg_jax.typing import Array, Bool, Float, Float32, Real

# ADM trains from PyTorch's default for convolutions and linear layers, U(±1/sqrt(fan_in)). Biases start at zero here.
torch_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
zeros = nn.initializers.zeros


def convolve(x, kernel, window_strides, padding, *, dimension_numbers=None, **options):
    """`lax.conv_general_dilated` of images [B, H, W, C] and a kernel [h, w, C_in, C_out], with gradients fast in loops.

    XLA for CPUs has a fast convolution for operands in this order of axes alone. Outside of loops it transposes others
    first. In a loop, such as a sampler's, it computes them as they are, 10 to 30 times as slowly. JAX makes a gradient
    by transposing the derivative, which changes the order of its axes too. So the derivative is written here in the
    orders that become the fast one. dimension_numbers: flax's, which say the same.
    """
    fast = 'NHWC', 'HWIO', 'NHWC'

    def ordered(x, kernel, order):
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, dimension_numbers=order, **options)

    @jax.custom_jvp
    def convolution(x, kernel):
        return ordered(x, kernel, fast)

    @convolution.defjvp
    def derivative(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        of_x = ordered(dx, kernel.swapaxes(2, 3), ('NHWC', 'HWOI', 'NHWC'))
        of_kernel = ordered(x.transpose(3, 1, 2, 0), dkernel.transpose(2, 0, 1, 3), ('CHWN', 'IHWO', 'HWNC'))
        return ordered(x, kernel, fast), of_x + of_kernel.transpose(2, 0, 1, 3)

    return convolution(x, kernel)


Dense = partial(nn.Dense, kernel_init=torch_uniform)
Conv1x1 = partial(nn.Conv, kernel_size=(1, 1), kernel_init=torch_uniform, conv_general_dilated=convolve)
Conv3x3 = partial(nn.Conv, kernel_size=(3, 3), kernel_init=torch_uniform, conv_general_dilated=convolve)


def sinusoidal_embedding(
    t: Real[Array, ' B'], features: int, *, max_period: float = 10_000.0
) -> Float32[Array, 'B {features}']:
    """Return [cos(t ω), sin(t ω)] with features/2 frequencies ω, from 1 to 1/max_period."""
    half = features // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def upsample(x: Float[Array, 'B H W C']) -> Float[Array, 'B 2*H 2*W C']:
    """Double the height and width, by nearest neighbours."""
    B, H, W, C = x.shape
    # stack, not broadcast: the gradient is then a sum of slices, ten times as fast as a reduction on CPUs
    x = jnp.stack([x, x], axis=3)
    return jnp.stack([x, x], axis=2).reshape(B, 2 * H, 2 * W, C)


def downsample(x: Float[Array, 'B H W C']) -> Float[Array, 'B H//2 W//2 C']:
    """Halve the height and width, by averages of 2x2 pixels."""
    # slices, not a mean over axes: XLA for CPUs would fuse what made x into its slow reductions
    return (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 4


def sealed(x):
    """Return an array or a tree of arrays; they and their gradients are computed once, before anything reads them.

    XLA for CPUs may otherwise compute them again in each loop that reads them: the gradient of a residual stream, for
    one, is a sum with a term for each block behind it.
    """
    return jax.lax.optimization_barrier(x)


class GroupNorm(nn.Module):
    """Group normalisation over H, W and C/num_groups channels, then y (1 + scale) + shift if they are given (AdaGN).

    The sums go over H and W of each channel first and over a group's channels second: the long reduction then keeps the
    channels contiguous. All the affine parts are folded into one multiply and add.
    """

    num_groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B *S C'],
        scale: Float[Array, 'B C'] | None = None,
        shift: Float[Array, 'B C'] | None = None,
    ) -> Float[Array, 'B *S C']:
        B, C = x.shape[0], x.shape[-1]
        if C % self.num_groups:
            raise ValueError(f'{C} channels do not divide into {self.num_groups} groups')
        gamma = self.param('scale', nn.initializers.ones, (C,))
        beta = self.param('bias', zeros, (C,))
        x32 = x.astype(jnp.float32)
        space = tuple(range(1, x.ndim - 1))
        per_channel = jnp.stack([x32.mean(space), jnp.square(x32).mean(space)])  # [2, B, C]
        mean, mean_of_squares = per_channel.reshape(2, B, self.num_groups, -1).mean(-1)
        variance = jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)
        per_group = jnp.stack([mean, jax.lax.rsqrt(variance + self.epsilon)])
        mean, inverse_std = jnp.repeat(per_group, C // self.num_groups, axis=-1)  # [B, C] each
        factor = inverse_std * gamma
        offset = beta - mean * factor
        if scale is not None:
            scale, shift = scale.astype(jnp.float32), shift.astype(jnp.float32)
            factor, offset = factor * (1.0 + scale), offset * (1.0 + scale) + shift
        factor, offset = sealed((factor, offset))
        over_space = (slice(None), *(None,) * len(space))
        return (x32 * factor[over_space] + offset[over_space]).astype(x.dtype)


class Dropout(nn.Module):
    """`flax.linen.Dropout`, with the same random numbers, which are made once.

    XLA would make them again in each loop that reads the mask, by a hundred operations for each number. Compiling those
    loops took half of the time that a gradient needs to compile for a TPU.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C'], train: bool) -> Float[Array, 'B H W C']:
        if not train or self.rate == 0.0:
            return x
        keep = sealed(jax.random.bernoulli(self.make_rng('dropout'), 1.0 - self.rate, x.shape))
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class ResBlock(nn.Module):
    """BigGAN-style residual block; the embedding enters as AdaGN's scale and shift. The last layer starts at zero.

    resample: None, or `upsample` or `downsample`, applied to both branches before the first convolution.
    """

    features: int
    dropout: float = 0.0
    num_groups: int = 32
    resample: Callable | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B H W C'], embedding: Float[Array, 'B E'], train: bool
    ) -> Float[Array, 'B H_out W_out {self.features}']:
        x = sealed(x)
        h = nn.silu(GroupNorm(self.num_groups, name='norm_in')(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = Conv3x3(self.features, dtype=self.dtype, name='conv_in')(h)
        affine = Dense(2 * self.features, dtype=self.dtype, name='embedding')(nn.silu(embedding))
        scale, shift = jnp.split(affine, 2, axis=-1)
        h = nn.silu(GroupNorm(self.num_groups, name='norm_out')(h, scale, shift))
        h = Dropout(self.dropout)(h, train)
        h = Conv3x3(self.features, dtype=self.dtype, kernel_init=zeros, name='conv_out')(h)
        if x.shape[-1] != self.features:
            x = Conv1x1(self.features, dtype=self.dtype, name='skip')(x)
        return x + h


def attend(
    query: Float[Array, 'N T D'], key: Float[Array, 'N T D'], value: Float[Array, 'N T D']
) -> Float[Array, 'N T D']:
    """Return softmax(query keyᵀ / sqrt(D)) value, of each of N; the softmax in float32."""
    D = query.shape[-1]
    logits = jnp.einsum('nqd,nkd->nqk', query * D**-0.5, key, preferred_element_type=jnp.float32)
    return jnp.einsum('nqk,nkd->nqd', jax.nn.softmax(logits).astype(value.dtype), value)


class SelfAttention(nn.Module):
    """Residual multi-head attention over all pixels. The output projection starts at zero.

    identity: for which images each pixel attends to itself alone (PAG), or None for no image.
    """

    num_heads: int
    num_groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B H W C'], identity: Bool[Array, ' B'] | None = None
    ) -> Float[Array, 'B H W C']:
        x = sealed(x)
        B, H, W, C = x.shape
        T, D = H * W, C // self.num_heads
        # Rows of pixels, so that a weight's gradient contracts one axis; heads beside images, so that the products are
        # plain batches of matrices.
        h = GroupNorm(self.num_groups, name='norm')(x).reshape(B * T, C)
        qkv = Dense(3 * C, dtype=self.dtype, name='qkv')(h).reshape(B, T, 3, self.num_heads, D)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4).reshape(3, B * self.num_heads, T, D)
        h = attend(query, key, value)
        if identity is not None:
            h = jnp.where(jnp.repeat(identity, self.num_heads)[:, None, None], value, h)
        h = h.reshape(B, self.num_heads, T, D).swapaxes(1, 2).reshape(B * T, C)
        return x + Dense(C, dtype=self.dtype, kernel_init=zeros, name='out')(h).reshape(x.shape)
