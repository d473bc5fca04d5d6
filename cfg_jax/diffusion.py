"""The forward process q and its posteriors, in terms of λ = log SNR.

z = alpha x + sigma eps with alpha² = sigmoid(λ), sigma² = sigmoid(-λ). Steps go from λ_t to λ_s, λ_t < λ_s. λ is a
scalar or one per image ([B]), and broadcasts over the remaining axes of the images it comes with. Equations are the CFG
paper's where no other is named.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.typing import Array, Bool, Float, Float32, Int, PerImage, Real, Scalar, UInt8


class Prediction(NamedTuple):
    """A denoiser's output for z at λ.

    eps: the predicted noise, shape of z.
    v: learned interpolation of the log-variance in [0, 1] (shape of z), or None to use the sampler's constant.
    renoise_eps: the noise that a sampler adds back to x in place of eps (CFG++), shape of z, or None for eps itself.
    """

    eps: Float[Array, ' B *D']
    v: Float[Array, ' B *D'] | None = None
    renoise_eps: Float[Array, ' B *D'] | None = None


Schedule = Callable[[Scalar | Float[Array, '*S']], Float[Array, '*S']]  # u -> λ
# denoise(z, λ), model(z, λ, labels), and mean_shift(z, λ_t, variance), which a sampler adds to the posterior mean
Denoiser = Callable[[Float[Array, ' B *D'], Float[Array, ' B']], Prediction]
Model = Callable[[Float[Array, ' B *D'], Float[Array, ' B'], Int[Array, ' B']], Prediction]
MeanShift = Callable[[Float[Array, ' B *D'], Float[Array, ' B'], Scalar | Float[Array, '...']], Float[Array, ' B *D']]


def broadcast_to_images(
    value: Scalar | Real[Array, '...'] | Bool[Array, '...'], images: Real[Array, '...']
) -> Real[Array, '...'] | Bool[Array, '...']:
    """Return `value`, a scalar or [B], with trailing axes so that it broadcasts against images [B, ...]."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (images.ndim - value.ndim)) if value.ndim else value


def check_prediction(prediction: object, z: Float[Array, ' B *D']) -> Prediction:
    """Return the prediction of a model or denoiser; ValueError unless it is a `Prediction` with eps of z's shape."""
    if not isinstance(prediction, Prediction):
        shape = getattr(prediction, 'shape', None)
        found = type(prediction).__name__ if shape is None else f'an array of shape {tuple(shape)}'
        raise ValueError(
            f'a model or denoiser returned {found}; it must return a cfg_jax.diffusion.Prediction, such as '
            'Prediction(eps) of a network that predicts the noise'
        )
    if jnp.shape(prediction.eps) != z.shape:
        raise ValueError(f'a model or denoiser predicted eps of shape {jnp.shape(prediction.eps)} for z of {z.shape}')
    return prediction


def with_eps(prediction: Prediction, eps: Float[Array, ' B *D']) -> Prediction:
    """Return the prediction with another eps; where its own was to be added back, the new one is."""
    renoise = prediction.renoise_eps
    if renoise is not None:
        renoise = jnp.where(renoise == prediction.eps, eps, renoise)
    return prediction._replace(eps=eps, renoise_eps=renoise)


def check_logsnrs(logsnrs: Float[Array, ' T'], *, increasing: bool = True) -> None:
    """Raise ValueError unless the values of λ are finite and increase strictly (increasing=False: decrease).

    λ that jit traces has no values yet and passes: check it where it is an array, before it is given to the function.
    """
    if isinstance(logsnrs, jax.core.Tracer):
        return
    values = np.asarray(logsnrs, np.float64)
    steps = np.diff(values) if increasing else -np.diff(values)
    if not (len(values) and np.isfinite(values).all() and (steps > 0).all()):
        ways = ('increase', 'noise', 'samplers') if increasing else ('decrease', 'data', 'tables')
        reversed_too = np.isfinite(values).all() and len(values) > 1 and (steps < 0).all()
        hint = ', and these are in the reverse order' if reversed_too else ''
        raise ValueError(
            f'the {len(values)} values of λ must be finite and {ways[0]}, the end of {ways[1]} first, as {ways[2]} '
            f'need them{hint}'
        )


# ---------------------------------------------------------------- 8-bit images and [-1, 1] (DDPM, section 3.3)


def to_unit_range(images: UInt8[Array, '*S']) -> Float32[Array, '*S']:
    """Convert uint8 [0, 255] to float32 [-1, 1]; numpy stays numpy."""
    return images.astype(np.float32) / 127.5 - 1.0


def to_uint8(x: Float[Array, '*S']) -> UInt8[Array, '*S']:
    """Convert float [-1, 1] to uint8 [0, 255], rounded and clipped; numpy stays numpy."""
    return ((x + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)


def clip_to_range(x: Float[Array, '*S']) -> Float[Array, '*S']:
    """Clip a predicted x to [-1, 1]; infinity becomes NaN, so that an overflow never looks like a black pixel."""
    return jnp.where(jnp.isinf(x), jnp.nan, jnp.clip(x, -1.0, 1.0))


# ---------------------------------------------------------------- dynamic thresholding (Imagen, section 2.3)


def dynamic_threshold(x: Float[Array, ' B *D'], *, percentile: Scalar = 99.5) -> Float[Array, ' B *D']:
    """Return clip(x, -s, s) / s, s the percentile (in 0 to 100) of an image's |x|, at least 1. Infinity becomes NaN."""
    size = jnp.percentile(jnp.abs(x).reshape(len(x), -1), percentile, axis=1)
    size = broadcast_to_images(jnp.maximum(size, 1.0), x)
    return clip_to_range(jnp.where(jnp.isinf(size), jnp.nan, x / size))


def limit_x(x: Float[Array, ' B *D'], clip_x: bool | Callable[[Array], Array]) -> Float[Array, ' B *D']:
    """Return x clipped to [-1, 1] if clip_x is True, as it is if False; a function's result if it is a function."""
    return clip_x(x) if callable(clip_x) else clip_to_range(x) if clip_x else x


# ---------------------------------------------------------------- eq. 1: alpha² = sigmoid(λ), sigma² = sigmoid(-λ)


def alpha_sigma(logsnr: Scalar | Float[Array, '*S']) -> tuple[Float[Array, '*S'], Float[Array, '*S']]:
    """Return (alpha, sigma), each of λ's shape. The only place they are computed."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def log_alpha2(logsnr: Scalar | Float[Array, '*S']) -> Float[Array, '*S']:
    """Return log alpha², which keeps its digits where alpha is tiny. Shape of λ."""
    return jax.nn.log_sigmoid(logsnr)


def log_sigma2(logsnr: Scalar | Float[Array, '*S']) -> Float[Array, '*S']:
    """Return log sigma², which keeps its digits where sigma is tiny. Shape of λ."""
    return jax.nn.log_sigmoid(-logsnr)


# ---------------------------------------------------------------- eq. 1: q(z_λ | x) = N(alpha x, sigma²)


def q_sample(x: Float[Array, ' B *D'], eps: Float[Array, ' B *D'], logsnr: PerImage) -> Float[Array, ' B *D']:
    """Return z = alpha x + sigma eps."""
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, x))
    return alpha * x + sigma * eps


# ---------------------------------------------------------------- section 2: x = (z - sigma eps) / alpha


def predict_x(z: Float[Array, ' B *D'], eps: Float[Array, ' B *D'], logsnr: PerImage) -> Float[Array, ' B *D']:
    """Return x = (z - sigma eps) / alpha."""
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, z))
    return (z - sigma * eps) / alpha


def predict_eps(z: Float[Array, ' B *D'], x: Float[Array, ' B *D'], logsnr: PerImage) -> Float[Array, ' B *D']:
    """Return eps = (z - alpha x) / sigma."""
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, z))
    return (z - alpha * x) / sigma


def clip_prediction(prediction: Prediction, z: Float[Array, ' B *D'], logsnr: PerImage) -> Prediction:
    """Return the prediction whose eps fits its x clipped to [-1, 1].

    ADM's classifier-guided DDIM clips before it guides and not after: guide a denoiser clipped so, clip_x=False.
    """
    prediction = check_prediction(prediction, z)
    x = clip_to_range(predict_x(z, prediction.eps, logsnr))
    return with_eps(prediction, predict_eps(z, x, logsnr))


# ---------------------------------------------------------------- v = alpha eps - sigma x (Salimans & Ho 2022, sec. 4)


def velocity(x: Float[Array, ' B *D'], eps: Float[Array, ' B *D'], logsnr: PerImage) -> Float[Array, ' B *D']:
    """Return v = alpha eps - sigma x, the third parameterisation."""
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, x))
    return alpha * eps - sigma * x


# ---------------------------------------------------------------- D = c_skip z + c_out F(c_in z) (EDM, eq. 7)


def edm_scale(logsnr: Scalar | Float[Array, '*S'], sigma_data: Scalar = 0.5) -> Float[Array, '*S']:
    """Return s = sqrt(sigma² + alpha² sigma_data²), the deviation of z where x's is sigma_data. Shape of λ.

    The network sees z / s. In EDM's units, z / alpha and sigma / alpha, that is its c_in.
    """
    alpha, sigma = alpha_sigma(logsnr)
    return jnp.hypot(sigma, alpha * sigma_data)


def edm_output(
    x: Float[Array, ' B *D'], eps: Float[Array, ' B *D'], logsnr: PerImage, sigma_data: Scalar = 0.5
) -> Float[Array, ' B *D']:
    """Return F = (sigma x / sigma_data - alpha sigma_data eps) / s, with which D is x. It is -v for sigma_data = 1."""
    logsnr = broadcast_to_images(logsnr, x)
    alpha, sigma = alpha_sigma(logsnr)
    return (sigma / sigma_data * x - alpha * sigma_data * eps) / edm_scale(logsnr, sigma_data)


def edm_x(
    output: Float[Array, ' B *D'], z: Float[Array, ' B *D'], logsnr: PerImage, sigma_data: Scalar = 0.5
) -> Float[Array, ' B *D']:
    """Return D = (alpha sigma_data² / s²) z + (sigma sigma_data / s) F."""
    logsnr = broadcast_to_images(logsnr, z)
    (alpha, sigma), scale = alpha_sigma(logsnr), edm_scale(logsnr, sigma_data)
    return (alpha * sigma_data / scale * z + sigma * output) * (sigma_data / scale)


# ---------------------------------------------------------------- eps of that D: (sigma/s²) z - (alpha sigma_data/s) F


def edm_eps(
    output: Float[Array, ' B *D'], z: Float[Array, ' B *D'], logsnr: PerImage, sigma_data: Scalar = 0.5
) -> Float[Array, ' B *D']:
    """Return (z - alpha D) / sigma, written so that nothing is divided by alpha or sigma: as good at both ends of λ."""
    logsnr = broadcast_to_images(logsnr, z)
    (alpha, sigma), scale = alpha_sigma(logsnr), edm_scale(logsnr, sigma_data)
    return (sigma / scale * z - alpha * sigma_data * output) / scale


# ---------------------------------------------------------------- what a network predicts, one entry each


class Parameterisation(NamedTuple):
    """The meaning of a network's output. The last argument of each function is EDM's sigma_data.

    truth(x, eps, λ, sigma_data): the output without error. to_eps(output, z, λ, sigma_data): the eps that it means.
    to_x, likewise: the x. log_error(λ, sigma_data): log of the squared error of eps per squared error of the output.
    """

    truth: Callable[..., Array]
    to_eps: Callable[..., Array]
    to_x: Callable[..., Array]
    log_error: Callable[..., Array | float]


def _v_eps(output, z, logsnr, _):
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, z))
    return sigma * z + alpha * output


def _v_x(output, z, logsnr, _):
    alpha, sigma = alpha_sigma(broadcast_to_images(logsnr, z))
    return alpha * z - sigma * output


PARAMETERISATIONS = {
    'eps': Parameterisation(
        truth=lambda x, eps, *_: eps,
        to_eps=lambda output, *_: output,
        to_x=lambda output, z, logsnr, _: predict_x(z, output, logsnr),
        log_error=lambda *_: 0.0,
    ),
    'x': Parameterisation(
        truth=lambda x, *_: x,
        to_eps=lambda output, z, logsnr, _: predict_eps(z, output, logsnr),
        to_x=lambda output, *_: output,
        log_error=lambda logsnr, _: logsnr,
    ),
    'v': Parameterisation(
        truth=lambda x, eps, logsnr, _: velocity(x, eps, logsnr),
        to_eps=_v_eps,
        to_x=_v_x,
        log_error=lambda logsnr, _: log_alpha2(logsnr),
    ),
    'edm': Parameterisation(
        truth=edm_output,
        to_eps=edm_eps,
        to_x=edm_x,
        log_error=lambda logsnr, sigma_data: -jax.nn.softplus(-logsnr - 2.0 * jnp.log(sigma_data)),
    ),
}


def parameterisation(prediction: str) -> Parameterisation:
    """Return the entry of PARAMETERISATIONS; ValueError for an unknown name."""
    if prediction not in PARAMETERISATIONS:
        raise ValueError(f'prediction is {prediction!r}; allowed: {", ".join(map(repr, PARAMETERISATIONS))}')
    return PARAMETERISATIONS[prediction]


# ---------------------------------------------------------------- eps and x of it, and the network's input


def network_eps(
    output: Float[Array, ' B *D'], z: Float[Array, ' B *D'], logsnr: PerImage, prediction: str, sigma_data: Scalar = 0.5
) -> Float[Array, ' B *D']:
    """Return eps from a network's output, which is 'eps', 'x', 'v' (velocity) or 'edm' (its F, of this sigma_data)."""
    return parameterisation(prediction).to_eps(output, z, logsnr, sigma_data)


def network_x(
    output: Float[Array, ' B *D'], z: Float[Array, ' B *D'], logsnr: PerImage, prediction: str, sigma_data: Scalar = 0.5
) -> Float[Array, ' B *D']:
    """Return x from a network's output: exact at low λ, where x of eps is not, but for 'eps'."""
    return parameterisation(prediction).to_x(output, z, logsnr, sigma_data)


def network_input(
    z: Float[Array, ' B *D'], logsnr: PerImage, prediction: str, sigma_data: Scalar = 0.5
) -> Float[Array, ' B *D']:
    """Return z as the network sees it: z / s (`edm_scale`) for 'edm', and z itself for the others."""
    return z / edm_scale(broadcast_to_images(logsnr, z), sigma_data) if prediction == 'edm' else z


# ---------------------------------------------------------------- section 2: ∇_z log p(z_λ) = -eps / sigma


def score(eps: Float[Array, ' B *D'], logsnr: PerImage) -> Float[Array, ' B *D']:
    """Return the score that eps estimates. It is linear: a difference of eps gives the difference of scores."""
    _, sigma = alpha_sigma(broadcast_to_images(logsnr, eps))
    return -eps / sigma


# ---------------------------------------------------------------- eq. 2: q(z_t | z_s) = N((αt/αs) z_s, σ²_{t|s})


def one_minus_ratio(
    logsnr_t: Scalar | Float[Array, '...'], logsnr_s: Scalar | Float[Array, '...']
) -> Float[Array, '...']:
    """Return 1 - e^{λt-λs}, without cancellation; the arguments broadcast together."""
    return -jnp.expm1(logsnr_t - logsnr_s)


def q_transition(
    logsnr_t: Scalar | Float[Array, '*S'], logsnr_s: Scalar | Float[Array, '*S']
) -> tuple[Float[Array, '*S'], Float[Array, '*S']]:
    """Return (scale of z_s in the mean, variance): alpha_t / alpha_s and σ²_{t|s} = (1 - e^{λt-λs}) sigma_t²."""
    (alpha_t, sigma_t), (alpha_s, _) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    return alpha_t / alpha_s, one_minus_ratio(logsnr_t, logsnr_s) * sigma_t**2


# ---------------------------------------------------------------- eq. 3: q(z_s | z_t, x)


def q_posterior(
    x: Float[Array, ' B *D'], z_t: Float[Array, ' B *D'], logsnr_t: PerImage, logsnr_s: PerImage
) -> tuple[Float[Array, ' B *D'], Float[Array, '...']]:
    """Return (mean, variance) of q(z_s | z_t, x), λ_t < λ_s; the variance broadcasts against the mean.

    mean = e^{λt-λs} (alpha_s / alpha_t) z_t + (1 - e^{λt-λs}) alpha_s x,  variance = (1 - e^{λt-λs}) sigma_s².
    """
    logsnr_t, logsnr_s = broadcast_to_images(logsnr_t, z_t), broadcast_to_images(logsnr_s, z_t)
    ratio, rest = jnp.exp(logsnr_t - logsnr_s), one_minus_ratio(logsnr_t, logsnr_s)
    alpha_t, _ = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    mean = ratio * (alpha_s / alpha_t) * z_t + rest * alpha_s * x
    return mean, rest * sigma_s**2


# ---------------------------------------------------------------- eq. 4: the variance (σ~²)^{1-v} (σ²_{t|s})^v


def reverse_variance(
    logsnr_t: Scalar | Float[Array, '...'], logsnr_s: Scalar | Float[Array, '...'], v: Scalar | Float[Array, '...']
) -> Float[Array, '...']:
    """Return (σ~²)^{1-v} (σ²_{t|s})^v: between q(z_s | z_t, x)'s variance (v=0) and q(z_t | z_s)'s (v=1).

    σ~² = (1 - e^{λt-λs}) sigma_s² and σ²_{t|s} = (1 - e^{λt-λs}) sigma_t²; the arguments broadcast together.
    """
    log_sigma2_t, log_sigma2_s = log_sigma2(logsnr_t), log_sigma2(logsnr_s)
    return one_minus_ratio(logsnr_t, logsnr_s) * jnp.exp((1.0 - v) * log_sigma2_s + v * log_sigma2_t)


def last_variance(
    logsnr_t: Scalar | Float[Array, '...'], logsnr_before: Scalar | Float[Array, '...'], v: Scalar | Float[Array, '...']
) -> Float[Array, '...']:
    """Return (σ~²)^{1-v} (σ_t²)^v of the last step, λ_t to the data, for λ_before < λ_t; the arguments broadcast.

    The last step's own σ~² is 0. That of the step before, λ_before to λ_t, replaces it, as in ADM.
    """
    log_ratio = jnp.log(one_minus_ratio(logsnr_before, logsnr_t))
    return jnp.exp(log_sigma2(logsnr_t) + (1.0 - v) * log_ratio)


# ---------------------------------------------------------------- exp(v log β_t + (1-v) log β~_t) (IDDPM, eq. 15)


def split_variance(output: Float[Array, '*S F']) -> tuple[Float[Array, '*S C'], Float[Array, '*S C']]:
    """Split a network's output [..., 2C] into (its first C channels, v = (the last C + 1) / 2)."""
    prediction, variance = jnp.split(output, 2, axis=-1)
    return prediction, (variance + 1.0) / 2.0


def table_log_variance(
    logsnrs: Float[Array, ' T'], t: Int[Array, ' B'], v: Float[Array, ' B *D']
) -> Float[Array, ' B *D']:
    """Return log of `reverse_variance` from timestep t to t - 1, and of `last_variance` at t = 0. Shape of v.

    logsnrs: t=0 first, T > 1.
    """
    logsnrs = jnp.asarray(logsnrs, jnp.float32)
    t = broadcast_to_images(t, v)
    earlier = jnp.maximum(t, 1)  # both branches stay finite, and with them the gradient
    inner = reverse_variance(logsnrs[earlier], logsnrs[earlier - 1], v)
    return jnp.log(jnp.where(t == 0, last_variance(logsnrs[0], logsnrs[1], v), inner))


# ---------------------------------------------------------------- t ~ Uniform({0, ..., T-1}) (DDPM, Algorithm 1)


def uniform_timestep(u: Scalar | Float[Array, '*S'], num_timesteps: int) -> Int[Array, '*S']:
    """Return floor(u T), the timestep at u in [0, 1). Shape of u."""
    t = jnp.int32(jnp.asarray(u, jnp.float32) * num_timesteps)
    return jnp.minimum(t, num_timesteps - 1)  # float32's u T may round up to T


# ---------------------------------------------------------------- p(x_{t-1} | x_t) on a table (IDDPM, section 2.1)


def table_step(logsnrs: Float[Array, ' T'], t: Int[Array, ' B']) -> tuple[Float[Array, ' B'], Float[Array, ' B']]:
    """Return (λ_t, λ_s) of a step from timestep t to t - 1; from t = 0 it goes to the data, λ_s = inf.

    logsnrs: t=0 first.
    """
    logsnrs = jnp.asarray(logsnrs, jnp.float32)
    return logsnrs[t], jnp.where(t == 0, jnp.inf, logsnrs[jnp.maximum(t - 1, 0)])


def table_reverse(
    prediction: Prediction, z: Float[Array, ' B *D'], t: Int[Array, ' B'], *, logsnrs: Float[Array, ' T'], clip_x: bool
) -> tuple[Float[Array, ' B *D'], Float[Array, ' B *D'], Float[Array, ' B *D']]:
    """Return (x, mean, log variance) of one step from timestep t to t - 1. At t = 0 the mean is x.

    prediction: with its v. clip_x: keep x within [-1, 1], as for sampling.
    """
    logsnr_t, logsnr_s = table_step(logsnrs, t)
    x = predict_x(z, prediction.eps, logsnr_t)
    x = clip_to_range(x) if clip_x else x
    mean, _ = q_posterior(x, z, logsnr_t, logsnr_s)
    return x, mean, table_log_variance(logsnrs, t, prediction.v)
