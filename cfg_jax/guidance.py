"""Guidance: functions from denoisers to denoisers, so that they compose.

A model is `model(z, logsnr, labels) -> Prediction`; a denoiser is `denoise(z, logsnr) -> Prediction`. A weight is the
paper's w, a scalar or one per image, always traced: a sweep over weights compiles once. Equations are the CFG paper's
where no other is named.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cfg_jax import diffusion
from cfg_jax.diffusion import Denoiser, MeanShift, Model, Prediction
from cfg_jax.typing import Array, Float, Int, PerImage, Scalar

# log_prob(z, λ, labels) -> log p(label | z, λ) of each image
LogProb = Callable[[Float[Array, ' B *D'], Float[Array, ' B'], Int[Array, ' B']], Float[Array, ' B']]


# ---------------------------------------------------------------- eq. 6: eps~ = (1 + w) eps(z, λ, c) - w eps(z, λ)


def classifier_free(model: Model, labels: Int[Array, ' B'], weight: PerImage, *, null_label: int) -> Denoiser:
    """Return the guided denoiser: eps~ = (1 + w) eps(z, λ, c) - w eps(z, λ, null). w = 0 is the conditional model.

    One forward of 2B: labels first, then the null label. A learned variance is that of the conditional half.
    """

    def denoise(z: Float[Array, ' B *D'], logsnr: Float[Array, ' B']) -> Prediction:
        conditional, unconditional = _with_and_without_labels(model, z, logsnr, labels, null_label)
        w = diffusion.broadcast_to_images(weight, z)
        return Prediction(eps=(1.0 + w) * conditional.eps - w * unconditional, v=conditional.v)

    return denoise


def _with_and_without_labels(model, z, logsnr, labels, null_label):
    """Return (the conditional prediction, the unconditional eps), computed in one forward of 2B."""
    both_labels = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
    doubled = jnp.concatenate([z, z])
    both = diffusion.check_prediction(model(doubled, jnp.concatenate([logsnr, logsnr]), both_labels), doubled)
    return jax.tree.map(lambda a: a[: len(z)], both), both.eps[len(z) :]


def conditional(model: Model, labels: Int[Array, ' B'], weight: PerImage, *, null_label: int) -> Denoiser:
    """Return eps(z, λ, c), unguided: one forward of B, for models without a null label. The weight is not used."""
    return lambda z, logsnr: diffusion.check_prediction(model(z, logsnr, labels), z)


def unconditional(model: Model, labels: Int[Array, ' B'], weight: PerImage, *, null_label: int) -> Denoiser:
    """Return eps(z, λ, null), for a classifier to guide. Models without labels ignore the null label."""
    return lambda z, logsnr: diffusion.check_prediction(model(z, logsnr, jnp.full_like(labels, null_label)), z)


# ---------------------------------------------------------------- section 3.2: ∇ log p^i(c|z) = -(eps_c - eps) / sigma


def implicit_classifier_score(
    model: Model, labels: Int[Array, ' B'], *, null_label: int
) -> Callable[[Float[Array, ' B *D'], Float[Array, ' B']], Float[Array, ' B *D']]:
    """Return the function (z, λ) -> ∇_z log p^i(c | z) of the implicit classifier p^i(c | z) ∝ p(z | c) / p(z).

    `classifier_free` is classifier guidance of the conditional model by this gradient.
    """

    def gradient(z: Float[Array, ' B *D'], logsnr: Float[Array, ' B']) -> Float[Array, ' B *D']:
        conditional, unconditional = _with_and_without_labels(model, z, logsnr, labels, null_label)
        return diffusion.score(conditional.eps - unconditional, logsnr)

    return gradient


# ---------------------------------------------------------------- sec. 3.1; ADM, Alg. 2: eps - w sigma ∇ log p(c|z)


def classifier(denoise: Denoiser, log_prob: LogProb, labels: Int[Array, ' B'], weight: PerImage) -> Denoiser:
    """Return the guided denoiser eps~ = eps(z, λ) - w sigma ∇_z log p(c | z, λ), around any denoiser.

    The gradient of log_prob is `jax.grad`'s.
    """

    def guided(z: Float[Array, ' B *D'], logsnr: Float[Array, ' B']) -> Prediction:
        prediction = diffusion.check_prediction(denoise(z, logsnr), z)
        gradient = _gradient(log_prob, z, logsnr, labels)
        _, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_images(logsnr, z))
        w = diffusion.broadcast_to_images(weight, z)
        return prediction._replace(eps=prediction.eps - w * sigma * gradient)

    return guided


# ---------------------------------------------------------------- ADM, Algorithm 1: mean + w variance ∇ log p(c|z)


def classifier_mean_shift(log_prob: LogProb, labels: Int[Array, ' B'], weight: PerImage) -> MeanShift:
    """Return a sampler's `mean_shift`: w variance ∇_z log p(c | z, λ) is added to the posterior mean.

    The gradient is taken at z_t, as in ADM's program; the derivation has it at the mean.
    """

    def mean_shift(
        z: Float[Array, ' B *D'], logsnr: Float[Array, ' B'], variance: Scalar | Float[Array, '...']
    ) -> Float[Array, ' B *D']:
        w = diffusion.broadcast_to_images(weight, z)
        return w * variance * _gradient(log_prob, z, logsnr, labels)

    return mean_shift


def _gradient(log_prob, z, logsnr, labels):
    """Return ∇_z log p(c | z, λ) of each image. Images do not mix, so the gradient of the sum is each one's own."""

    def total(z):
        values = log_prob(z, logsnr, labels)
        if jnp.shape(values) != z.shape[:1]:
            raise ValueError(
                f'log_prob returned shape {jnp.shape(values)} for {len(z)} images; it must return log p(label | z), '
                'one number per image'
            )
        return values.sum()

    return jax.grad(total)(z)
