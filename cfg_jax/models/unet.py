"""ADM's UNet (Dhariwal & Nichol 2021, section 3), and the encoder that it shares with the noisy classifier."""

import types
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from cfg_jax import schedules
from cfg_jax.models import blocks
from cfg_jax.typing import Array, Bool, Float, Float32, Int


class Encoder(nn.Module):
    """The downsampling half and the middle, which the UNet and the classifier share.

    channels: width of the first level; level i is channel_mult[i] times as wide and half the size of level i - 1.
    attention_resolutions: image sizes (pixels) at which each block is followed by attention.
    num_heads: heads of each attention, unless head_channels, the width of a head, sets their number.
    time_input: λ [B] -> the numbers [B] that the sinusoidal embedding takes.
    remat: recompute the blocks' activations in the backward pass instead of storing them.
    """

    channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attention_resolutions: tuple[int, ...] = ()
    num_heads: int = 1
    head_channels: int | None = None
    dropout: float = 0.0
    num_groups: int = 32
    time_input: Callable = schedules.continuous_time_input
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def block(self, features, name, resample=None):
        # `train` is the third argument behind self: a Python bool, not an array, also under remat.
        cls = nn.remat(blocks.ResBlock, static_argnums=(3,)) if self.remat else blocks.ResBlock
        return cls(features, self.dropout, self.num_groups, resample, self.dtype, name=name)

    def num_heads_at(self, features: int) -> int:
        """Return the number of heads of an attention over `features` channels. Raises ValueError if they do not fit."""
        heads = features // self.head_channels if self.head_channels else self.num_heads
        if heads < 1 or features % heads or (self.head_channels and features % self.head_channels):
            raise ValueError(f'{features} channels do not divide into heads of {features / max(heads, 1):g} channels')
        return heads

    def attention(self, features, name):
        cls = nn.remat(blocks.SelfAttention) if self.remat else blocks.SelfAttention
        return cls(self.num_heads_at(features), self.num_groups, self.dtype, name=name)

    def embed_time(self, logsnr: Float[Array, ' B']) -> Float[Array, 'B 4*{self.channels}']:
        embedding = blocks.sinusoidal_embedding(self.time_input(logsnr), self.channels)
        embedding = nn.silu(blocks.Dense(4 * self.channels, dtype=self.dtype, name='time_in')(embedding))
        return blocks.Dense(4 * self.channels, dtype=self.dtype, name='time_out')(embedding)

    def embed_weight(self, weight: Float[Array, ' B']) -> Float[Array, 'B 4*{self.channels}']:
        """Embed the guidance weight as the authors of Meng et al. 2023 do, like λ; the output is 0 at first."""
        embedding = blocks.sinusoidal_embedding(schedules.continuous_time_input(weight), self.channels)
        embedding = nn.silu(blocks.Dense(4 * self.channels, dtype=self.dtype, name='weight_in')(embedding))
        out = blocks.Dense(4 * self.channels, kernel_init=blocks.zeros, dtype=self.dtype, name='weight_out')
        return out(embedding)

    def encode(
        self,
        z: Float[Array, 'B H W C'],
        embedding: Float[Array, 'B E'],
        train: bool,
        identity: Mapping[int, Bool[Array, ' B']] = types.MappingProxyType({}),
    ) -> tuple[Float[Array, 'B h w F'], list[Float[Array, 'B ...']]]:
        """Return (the features at the lowest resolution, the list of skip features, first one first).

        identity: {image size: for which images attention at that size is the identity}.
        """
        H, W = z.shape[1:3]
        reduction = 2 ** (len(self.channel_mult) - 1)
        if H % reduction or W % reduction:
            raise ValueError(f'an image of {H}x{W} cannot be halved {len(self.channel_mult) - 1} times')
        h = blocks.Conv3x3(self.channels * self.channel_mult[0], dtype=self.dtype, name='conv_in')(z)
        skips = [h]
        for level, mult in enumerate(self.channel_mult):
            for i in range(self.num_blocks):
                h = self.block(self.channels * mult, f'down_{level}_block_{i}')(h, embedding, train)
                if h.shape[1] in self.attention_resolutions:
                    h = self.attention(h.shape[-1], f'down_{level}_attention_{i}')(h, identity.get(h.shape[1]))
                skips.append(h)
            if level + 1 < len(self.channel_mult):
                h = self.block(h.shape[-1], f'down_{level}_resample', blocks.downsample)(h, embedding, train)
                skips.append(h)
        h = self.block(h.shape[-1], 'middle_block_0')(h, embedding, train)
        h = self.attention(h.shape[-1], 'middle_attention')(h, identity.get(h.shape[1]))
        h = self.block(h.shape[-1], 'middle_block_1')(h, embedding, train)
        return h, skips


class UNet(Encoder):
    """ADM's UNet, called with z, λ, the labels and, if guidance_input is set, the guidance weight w of each image.

    guidance_input: the network takes w, 0 where none is given; its output is then the guided one.
    identity_attention: for which images attention is the identity (PAG), at the image sizes of identity_resolutions.
    num_labels: rows of the label embedding, including the null label's; 0 for a network without labels.
    out_channels: the images', or twice as many if the variance is learned (its channels come last).
    """

    num_labels: int = 0
    out_channels: int = 3
    guidance_input: bool = False

    @nn.compact
    def __call__(
        self,
        z: Float[Array, 'B H W C'],
        logsnr: Float[Array, ' B'],
        labels: Int[Array, ' B'] | None = None,
        weight: Float[Array, ' B'] | None = None,
        *,
        train: bool = False,
        identity_attention: Bool[Array, ' B'] | None = None,
        identity_resolutions: tuple[int, ...] = (),
    ) -> Float32[Array, 'B H W {self.out_channels}']:
        embedding = self.embed_time(logsnr)
        if self.num_labels:
            # PyTorch's default for embeddings, N(0, 1), as in ADM.
            label_embedding = nn.Embed(
                self.num_labels,
                4 * self.channels,
                embedding_init=nn.initializers.normal(1.0),
                dtype=self.dtype,
                name='label',
            )
            embedding = embedding + label_embedding(labels)
        if self.guidance_input:
            embedding = embedding + self.embed_weight(jnp.zeros_like(logsnr) if weight is None else weight)
        identity = {} if identity_attention is None else dict.fromkeys(identity_resolutions, identity_attention)
        h, skips = self.encode(z, embedding, train, identity)
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self.block(self.channels * mult, f'up_{level}_block_{i}')(h, embedding, train)
                if h.shape[1] in self.attention_resolutions:
                    h = self.attention(h.shape[-1], f'up_{level}_attention_{i}')(h, identity.get(h.shape[1]))
            if level:
                h = self.block(h.shape[-1], f'up_{level}_resample', blocks.upsample)(h, embedding, train)
        h = nn.silu(blocks.GroupNorm(self.num_groups, name='norm_out')(h)).astype(jnp.float32)
        return blocks.Conv3x3(self.out_channels, kernel_init=blocks.zeros, name='conv_out')(h)
