"""A small fully connected network for data of few dimensions, as denoiser or as classifier of noisy data."""

import flax.linen as nn
import jax.numpy as jnp

from cfg_jax import schedules
from cfg_jax.models import blocks
from cfg_jax.typing import Array, Float, Float32, Int


class MLP(nn.Module):
    """A perceptron called as the UNet is, with z, λ and the labels, or as the classifier, without labels.

    features: numbers that it returns for each z; D for a denoiser, the number of classes for a classifier.
    num_labels: rows of the label embedding, including the null label's; 0 for a network without labels.
    """

    features: int
    num_labels: int = 0
    width: int = 128
    depth: int = 3

    @nn.compact
    def __call__(
        self, z: Float[Array, 'B D'], logsnr: Float[Array, ' B'], labels: Int[Array, ' B'] | None = None
    ) -> Float32[Array, 'B {self.features}']:
        time = schedules.continuous_time_input(logsnr)
        inputs = [z, time[:, None] / 500.0 - 1.0, blocks.sinusoidal_embedding(time, 32)]
        if self.num_labels:
            inputs.append(nn.Embed(self.num_labels, 16, name='label')(labels))
        h = jnp.concatenate(inputs, axis=1)
        for _ in range(self.depth):
            h = nn.silu(nn.Dense(self.width)(h))
        return nn.Dense(self.features, name='out')(h)
