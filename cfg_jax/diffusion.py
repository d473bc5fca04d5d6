"""The forward process q and its posteriors, in terms of λ = log SNR (CFG paper, section 2).

z = alpha x + sigma eps with alpha² = sigmoid(λ), sigma² = sigmoid(-λ). Every function takes λ as a scalar or one per
image ([B]) and broadcasts it over the remaining axes of the images it comes with.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prediction(NamedTuple):
    """What a denoiser returns for z at λ.

    eps: the predicted noise, shape of z.
    v: learned interpolation of the log-variance in [0, 1] (shape of z), or None where the sampler's constant holds.
    """

    eps: jax.Array
    v: jax.Array | None = None


def broadcast_to_images(value, images):
    """`value`, a scalar or [B], with trailing axes so that it broadcasts against images [B, ...]."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (images.ndim - value.ndim)) if value.ndim else value


def alpha_sigma(logsnr):
    """(alpha, sigma) = (sqrt(sigmoid(λ)), sqrt(sigmoid(-λ))), each of λ's shape. The only place they are computed."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


# ---------------------------------------------------------------- eq. 1: q(z_λ | x), and its inverses


def q_sample(x, eps, logsnr):
    """z = alpha x + sigma eps."""
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, x))
    return alpha * x + sigma * eps


def predict_x(z, eps, logsnr):
    """x = (z - sigma eps) / alpha."""
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, z))
    return (z - sigma * eps) / alpha


def predict_eps(z, x, logsnr):
    """eps = (z - alpha x) / sigma."""
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, z))
    return (z - alpha * x) / sigma


def velocity(x, eps, logsnr):
    """v = alpha eps - sigma x (Salimans & Ho 2022): the third parameterisation."""
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, x))
    return alpha * eps - sigma * x


def network_eps(output, z, logsnr, prediction):
    """eps from a network's output, which is 'eps', 'x' or 'v' (velocity)."""
    if prediction == 'eps':
        return output
    if prediction == 'x':
        return predict_eps(z, output, logsnr)
    if prediction == 'v':
        alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, z))
        return sigma * z + alpha * output
    raise ValueError(f"prediction is {prediction!r}; allowed: 'eps', 'x', 'v'")


def clip_prediction(prediction, z, logsnr):
    """The prediction whose eps fits its x clipped to [-1, 1].

    ADM's classifier-guided DDIM clips before it guides and not after: guide a denoiser clipped so, clip_x=False.
    """
    x = jnp.clip(predict_x(z, prediction.eps, logsnr), -1.0, 1.0)
    return prediction._replace(eps=predict_eps(z, x, logsnr))


def split_variance(output):
    """A network's output [..., 2C] -> (its first C channels, v = (the last C + 1) / 2) (IDDPM, eq. 15)."""
    prediction, variance = jnp.split(output, 2, axis=-1)
    return prediction, (variance + 1.0) / 2.0


# ---------------------------------------------------------------- eq. 3: q(z_s | z_t, x); eq. 4: the reverse process


def q_posterior(x, z_t, logsnr_t, logsnr_s):
    """(mean, variance) of q(z_s | z_t, x), λ_t < λ_s; the variance broadcasts against the mean (eq. 3).

    mean = e^{λt-λs} (alpha_s / alpha_t) z_t + (1 - e^{λt-λs}) alpha_s x,  variance = (1 - e^{λt-λs}) sigma_s².
    """
    logsnr_t, logsnr_s = broadcast_to_images(logsnr_t, z_t), broadcast_to_images(logsnr_s, z_t)
    ratio = jnp.exp(logsnr_t - logsnr_s)
    one_minus_ratio = -jnp.expm1(logsnr_t - logsnr_s)
    alpha_t, _ = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    mean = ratio * (alpha_s / alpha_t) * z_t + one_minus_ratio * alpha_s * x
    return mean, one_minus_ratio * sigma_s**2


def reverse_variance(logsnr_t, logsnr_s, v):
    """(σ~²)^{1-v} (σ²_{t|s})^v: between q(z_s | z_t, x)'s variance (v=0) and q(z_t | z_s)'s (v=1) (eq. 4).

    σ~² = (1 - e^{λt-λs}) sigma_s² and σ²_{t|s} = (1 - e^{λt-λs}) sigma_t²; the arguments broadcast together.
    """
    log_sigma2_t, log_sigma2_s = jax.nn.log_sigmoid(-logsnr_t), jax.nn.log_sigmoid(-logsnr_s)
    return -jnp.expm1(logsnr_t - logsnr_s) * jnp.exp((1.0 - v) * log_sigma2_s + v * log_sigma2_t)


def last_variance(logsnr_t, logsnr_before, v):
    """(σ~²)^{1-v} (σ_t²)^v of the last step, λ_t to the data, for λ_before < λ_t; the arguments broadcast together.

    The last step's own σ~² is 0. That of the step before, λ_before to λ_t, stands in for it, as in ADM.
    """
    log_ratio = jnp.log(-jnp.expm1(logsnr_before - logsnr_t))
    return jnp.exp(jax.nn.log_sigmoid(-logsnr_t) + (1.0 - v) * log_ratio)


# ---------------------------------------------------------------- the reverse process on a table (Improved DDPM)


def table_step(logsnrs, t):
    """(λ_t, λ_s) of a step from timestep t to t - 1, each [B]; from t = 0 it goes to the data, λ_s = inf.

    logsnrs: [T], t=0 first. t: int [B].
    """
    logsnrs = jnp.asarray(logsnrs, jnp.float32)
    return logsnrs[t], jnp.where(t == 0, jnp.inf, logsnrs[jnp.maximum(t - 1, 0)])


def table_log_variance(logsnrs, t, v):
    """log of `reverse_variance` from timestep t to t - 1, and of `last_variance` at t = 0. Shape of v.

    logsnrs: [T], t=0 first, T > 1. t: int [B]. v: [B, ...].
    """
    logsnrs = jnp.asarray(logsnrs, jnp.float32)
    t = broadcast_to_images(t, v)
    earlier = jnp.maximum(t, 1)  # both branches stay finite, and with them the gradient
    inner = reverse_variance(logsnrs[earlier], logsnrs[earlier - 1], v)
    return jnp.log(jnp.where(t == 0, last_variance(logsnrs[0], logsnrs[1], v), inner))


def table_reverse(prediction, z, t, *, logsnrs, clip_x):
    """p(z_s | z_t) of one step from timestep t [B] to t - 1: (x, mean, log variance), each of z's shape.

    prediction: with its v. At t = 0 the mean is x. clip_x: x within [-1, 1], as for sampling.
    """
    logsnr_t, logsnr_s = table_step(logsnrs, t)
    x = predict_x(z, prediction.eps, logsnr_t)
    x = jnp.clip(x, -1.0, 1.0) if clip_x else x
    mean, _ = q_posterior(x, z, logsnr_t, logsnr_s)
    return x, mean, table_log_variance(logsnrs, t, prediction.v)


def to_unit_range(images):
    """Return uint8 [0, 255] as float32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x):
    """Return float [-1, 1] as uint8 [0, 255], rounded; values outside are clipped."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
