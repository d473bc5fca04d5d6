"""Guidance: functions from denoisers to denoisers, so that they compose.

A model is `model(z, logsnr, labels) -> Prediction`; a denoiser is `denoise(z, logsnr) -> Prediction`. Here z is
[B, ...], logsnr [B], labels int32 [B], and a weight a scalar or one per image ([B]), always traced: a sweep over
weights compiles once.
"""

import jax
import jax.numpy as jnp

from cfg_jax import diffusion
from cfg_jax.diffusion import Prediction

# ---------------------------------------------------------------- classifier-free guidance (CFG paper, eq. 6)


def classifier_free(model, labels, weight, *, null_label):
    """eps~ = (1 + w) eps(z, λ, c) - w eps(z, λ, null). w = 0 is the conditional model.

    One forward of 2B: labels first, then the null label. A learned variance is that of the conditional half.
    """

    def denoise(z, logsnr):
        both_labels = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
        both = model(jnp.concatenate([z, z]), jnp.concatenate([logsnr, logsnr]), both_labels)
        conditional, unconditional = jax.tree.map(lambda a: a[: len(z)], both), both.eps[len(z) :]
        w = diffusion.broadcast_to_images(weight, z)
        return Prediction(eps=(1.0 + w) * conditional.eps - w * unconditional, v=conditional.v)

    return denoise


def conditional(model, labels, weight, *, null_label):
    """No guidance, and one forward of B: eps(z, λ, c). For models without a null label; the weight is not used."""
    return lambda z, logsnr: model(z, logsnr, labels)


def unconditional(model, labels, weight, *, null_label):
    """eps(z, λ, null): what a classifier alone then guides. Models without labels ignore the null label."""
    return lambda z, logsnr: model(z, logsnr, jnp.full_like(labels, null_label))


# ---------------------------------------------------------------- classifier guidance (CFG paper, eq. 5; ADM, Alg. 2)


def classifier(denoise, log_prob, labels, weight):
    """eps~ = eps(z, λ) - w sigma ∇_z log p(c | z, λ), around any denoiser.

    log_prob(z, logsnr, labels) -> [B], log p(c | z) of each image; its gradient is `jax.grad`'s.
    """

    def guided(z, logsnr):
        prediction = denoise(z, logsnr)
        gradient = _gradient(log_prob, z, logsnr, labels)
        _, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_images(logsnr, z))
        w = diffusion.broadcast_to_images(weight, z)
        return prediction._replace(eps=prediction.eps - w * sigma * gradient)

    return guided


def classifier_mean_shift(log_prob, labels, weight):
    """A sampler's `mean_shift`: w variance ∇_z log p(c | z, λ) is added to the posterior mean (ADM, Algorithm 1).

    The gradient is taken at z_t, as ADM's program does; the derivation has it at the mean.
    """

    def mean_shift(z, logsnr, variance):
        w = diffusion.broadcast_to_images(weight, z)
        return w * variance * _gradient(log_prob, z, logsnr, labels)

    return mean_shift


def _gradient(log_prob, z, logsnr, labels):
    """∇_z log p(c | z, λ) of every image; images do not mix, so that the gradient of the sum is each one's own."""
    return jax.grad(lambda z: log_prob(z, logsnr, labels).sum())(z)
