"""A mixture of Gaussians whose denoisers are known in closed form (CFG paper, figure 2)."""

import jax
import jax.numpy as jnp

from cfg_jax import diffusion
from cfg_jax.diffusion import Prediction

NULL = 3
MEANS = jnp.array([[0.0, 0.9], [0.8, -0.5], [-0.8, -0.5]])  # class c is N(MEANS[c], SCALE² I), each a third of the data
SCALE = 0.3


def log_densities(z, logsnr):
    """Return log p(z | c, λ) of every class: [B, 3]. z: [B, 2], logsnr [B]."""
    alpha, sigma = diffusion.alpha_sigma(logsnr[:, None])
    variance = (alpha * SCALE) ** 2 + sigma**2
    square = jnp.sum((z[:, None] - alpha[..., None] * MEANS) ** 2, axis=-1)
    return -0.5 * square / variance - jnp.log(2 * jnp.pi * variance)


def log_posterior(z, logsnr, labels):
    """Return log p(c | z, λ): [B]."""
    return jnp.take_along_axis(jax.nn.log_softmax(log_densities(z, logsnr)), labels[:, None], axis=1)[:, 0]


def model(z, logsnr, labels):
    """Return the exact eps = -sigma ∇ log p(z | c, λ), with p(z | λ) of the whole mixture where the label is NULL."""

    def log_density(z):
        every = log_densities(z, logsnr)
        chosen = jnp.take_along_axis(every, jnp.minimum(labels, NULL - 1)[:, None], axis=1)[:, 0]
        return jnp.where(labels == NULL, jax.nn.logsumexp(every, axis=1) - jnp.log(3.0), chosen).sum()

    _, sigma = diffusion.alpha_sigma(logsnr[:, None])
    return Prediction(-sigma * jax.grad(log_density)(z))
