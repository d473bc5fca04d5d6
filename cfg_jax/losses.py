"""Training objectives, one short function a line of the algorithm, and the bound on the likelihood.

`diffusion_loss` is the CFG paper's Algorithm 1; `hybrid_loss` adds Improved DDPM's bound, which learns the variances.
Every loss is one number per image, [B]. Equations are the CFG paper's where no other is named.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import diffusion
from cfg_jax.diffusion import Denoiser, Prediction, Schedule
from cfg_jax.typing import Array, Bool, Float, Int, Key, PerImage, Scalar

# network(z, λ, labels) -> its raw output
Network = Callable[[Float[Array, 'B *D C'], Float[Array, ' B'], Int[Array, ' B']], Float[Array, 'B *D F']]

# network(z, λ, labels, w) -> its raw output, shape of z
GuidedNetwork = Callable[
    [Float[Array, ' B *D'], Float[Array, ' B'], Int[Array, ' B'], Float[Array, ' B']], Float[Array, ' B *D']
]
Weighting = Callable[..., Float[Array, ' B']]  # weighting(λ, rate=-dλ/du) -> log of the weight of each image's error


class Loss(NamedTuple):
    """Per-image losses, the λ they were drawn at, and True where the label had been dropped.

    correct: True where a classifier found the label; None for other losses.
    """

    loss: Float[Array, ' B']
    logsnr: Float[Array, ' B']
    dropped: Bool[Array, ' B']
    correct: Bool[Array, ' B'] | None = None


# ---------------------------------------------------------------- Algorithm 1: u, eps and the labels drawn


def sample_u(key: Key[Array, ''], batch_size: int, *, low_discrepancy: bool) -> Float[Array, ' {batch_size}']:
    """Draw u ~ Uniform[0, 1), one per image.

    low_discrepancy: u_i = (i + offset) / B mod 1, one random offset for all (Variational Diffusion Models, app. I.1):
    each u is still uniform, and the batch covers [0, 1) evenly.
    """
    if not low_discrepancy:
        return jax.random.uniform(key, (batch_size,))
    return (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0


def drop_labels(
    key: Key[Array, ''], labels: Int[Array, ' B'], *, p_uncond: Scalar, null_label: int
) -> tuple[Int[Array, ' B'], Bool[Array, ' B']]:
    """Replace each label by the null label with probability p_uncond. Return (labels, dropped)."""
    dropped = jax.random.bernoulli(key, p_uncond, labels.shape)
    return jnp.where(dropped, null_label, labels), dropped


def _draw(key, x, labels, *, null_label, p_uncond, low_discrepancy):
    """Draw a loss's random numbers: (u [B], eps, labels, dropped)."""
    u_key, eps_key, label_key = jax.random.split(key, 3)
    labels, dropped = drop_labels(label_key, labels, p_uncond=p_uncond, null_label=null_label)
    u = sample_u(u_key, len(x), low_discrepancy=low_discrepancy)
    return u, jax.random.normal(eps_key, x.shape), labels, dropped


# ---------------------------------------------------------------- eq. 5: E |eps_θ(z_λ, c) - eps|²


def squared_error(
    output: Float[Array, ' B *D'],
    z: Float[Array, ' B *D'],
    x: Float[Array, ' B *D'],
    eps: Float[Array, ' B *D'],
    logsnr: Float[Array, ' B'],
    *,
    prediction: str,
    target: str = 'eps',
    sigma_data: Scalar = 0.5,
    log_weight: Float[Array, ' B'] | None = None,
) -> Float[Array, ' B']:
    """Return the mean squared error of each image, measured on `target` ('eps' as in the paper, 'x' or 'v').

    The network's output is `prediction`, an entry of `diffusion.PARAMETERISATIONS`. Where the two differ, the error is
    rescaled rather than the output converted: error_eps = (alpha/sigma) error_x = alpha error_v, which stays finite at
    both ends of λ. log_weight: log of a factor of each image's error, or None for 1.
    """
    truth = diffusion.parameterisation(prediction).truth(x, eps, logsnr, sigma_data)
    meaning = {'prediction': prediction, 'target': target, 'sigma_data': sigma_data}
    return mean_square(output - truth, logsnr, **meaning, log_weight=log_weight)


def mean_square(
    error: Float[Array, ' B *D'],
    logsnr: Float[Array, ' B'],
    *,
    prediction: str,
    target: str,
    sigma_data: Scalar = 0.5,
    log_weight: Float[Array, ' B'] | None = None,
) -> Float[Array, ' B']:
    """Return the mean square of an error of a network's output, a `prediction`, as one on `target`, weighted."""
    mse = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    if prediction == target and log_weight is None:
        return mse
    of_output, of_target = (
        diffusion.parameterisation(name).log_error(logsnr, sigma_data) for name in (prediction, target)
    )
    return mse * jnp.exp(of_output - of_target + (0.0 if log_weight is None else log_weight))


# ---------------------------------------------------------------- min(SNR, γ) on x (Hang et al. 2023, sec. 3.4)


def min_snr_weighting(logsnr: Float[Array, ' B'], *, gamma: float = 5.0, **_: object) -> Float[Array, ' B']:
    """Return log of min(SNR, gamma) / SNR."""
    return jnp.minimum(0.0, math.log(gamma) - logsnr)


# ---------------------------------------------------------------- max(SNR, 1) on x (Salimans & Ho 2022, sec. 4)


def truncated_snr_weighting(logsnr: Float[Array, ' B'], **_: object) -> Float[Array, ' B']:
    """Return log of max(SNR, 1) / SNR."""
    return jnp.maximum(0.0, -logsnr)


# ---------------------------------------------------------------- (σ² + σ_data²)/(σ σ_data)² on x (EDM, table 1)


def edm_weighting(logsnr: Float[Array, ' B'], *, sigma_data: float = 0.5, **_: object) -> Float[Array, ' B']:
    """Return log of (σ² + sigma_data²) / sigma_data², where σ = e^{-λ/2} is EDM's: the error of its F, not weighted."""
    return -diffusion.parameterisation('edm').log_error(logsnr, sigma_data)


# ---------------------------------------------------------------- sigmoid(b - λ) (-dλ/du) (Kingma & Gao 2023)


def sigmoid_weighting(
    logsnr: Float[Array, ' B'], *, rate: Float[Array, ' B'], bias: Scalar = 2.0, **_: object
) -> Float[Array, ' B']:
    """Return log of sigmoid(bias - λ) rate: the weight sigmoid(bias - λ) of an integral over λ, where u is uniform.

    rate: -dλ/du of the function u -> λ that λ was drawn by. bias: Kingma & Gao's 2; SiD2 (Hoogeboom et al. 2024) lowers
    it for large images.
    """
    return jax.nn.log_sigmoid(bias - logsnr) + jnp.log(rate)


def _rate(schedule, u):
    """Return -dλ/du of a schedule at u [B]."""
    return -jax.jvp(schedule, (u,), (jnp.ones_like(u),))[1]


def log_weight(weighting: Weighting | None, schedule: Schedule, u: Float[Array, ' B']) -> Float[Array, ' B'] | None:
    """Return the log of the weight of each image's error at λ = schedule(u); None for no weighting."""
    return None if weighting is None else weighting(schedule(u), rate=_rate(schedule, u))


# log of the weight of the squared error on eps, as functions of λ [B]. Papers state most of them on x, whose squared
# error is that on eps / SNR. Each takes all keywords (gamma, sigma_data, bias, rate) and reads its own.
WEIGHTINGS = {
    'min_snr': min_snr_weighting,
    'truncated_snr': truncated_snr_weighting,
    'edm': edm_weighting,
    'sigmoid': sigmoid_weighting,
}


# ---------------------------------------------------------------- Algorithm 1


def diffusion_loss(
    network: Network,
    x: Float[Array, ' B *D'],
    labels: Int[Array, ' B'],
    key: Key[Array, ''],
    *,
    schedule: Schedule,
    null_label: int,
    p_uncond: Scalar,
    prediction: str = 'eps',
    target: str = 'eps',
    sigma_data: Scalar = 0.5,
    weighting: Weighting | None = None,
    low_discrepancy: bool = False,
) -> Loss:
    """Compute Algorithm 1's loss of images x in [-1, 1].

    network(z, logsnr, labels) -> shape of z, an entry of `diffusion.PARAMETERISATIONS`. schedule: u -> λ, of a uniform
    u. weighting(λ, rate=-dλ/du) -> log of the weight of each image's error, such as a function of WEIGHTINGS.
    """
    u, eps, labels, dropped = _draw(
        key, x, labels, null_label=null_label, p_uncond=p_uncond, low_discrepancy=low_discrepancy
    )
    logsnr = schedule(u)
    z = diffusion.q_sample(x, eps, logsnr)
    output = network(z, logsnr, labels)
    meaning = {'prediction': prediction, 'target': target, 'sigma_data': sigma_data}
    meaning['log_weight'] = log_weight(weighting, schedule, u)
    return Loss(squared_error(output, z, x, eps, logsnr, **meaning), logsnr, dropped)


# ---------------------------------------------------------------- GFT: β f(z, c, β) + (1-β) sg f(z) (Chen et al. 2025)


def guidance_free_output(
    conditional: Float[Array, ' B *D'], unconditional: Float[Array, ' B *D'], weight: PerImage
) -> Float[Array, ' B *D']:
    """Return β conditional + (1 - β) stop_gradient(unconditional), β = 1 / (1 + w).

    It is the right answer where `conditional` is the guided one, (1 + w) right - w unconditional, which a network so
    learns. The outputs may be of any parameterisation, since each is linear in eps and z.
    """
    beta = 1.0 / (1.0 + diffusion.broadcast_to_images(weight, conditional))
    return beta * conditional + (1.0 - beta) * jax.lax.stop_gradient(unconditional)


def guidance_free(
    network: GuidedNetwork, frozen: GuidedNetwork, key: Key[Array, ''], *, null_label: int, weight_max: Scalar
) -> Network:
    """Return the network (z, λ, labels) -> `guidance_free_output`, by which `diffusion_loss` trains one that takes w.

    β ~ Uniform[1 / (1 + weight_max), 1] for each image. Where the label is the null label, w is 0 and β is 1: it is
    trained as ever. frozen: the same network without dropout, asked for the null label at w = 0; it gets no gradient.
    """

    def output(z: Float[Array, ' B *D'], logsnr: Float[Array, ' B'], labels: Int[Array, ' B']) -> Float[Array, ' B *D']:
        beta = jax.random.uniform(key, labels.shape, minval=1.0 / (1.0 + weight_max))
        weight = jnp.where(labels == null_label, 0.0, 1.0 / beta - 1.0)
        null = frozen(z, logsnr, jnp.full_like(labels, null_label), jnp.zeros_like(weight))
        return guidance_free_output(network(z, logsnr, labels, weight), null, weight)

    return output


# ---------------------------------------------------------------- L_{t-1}, L_T: KL of Gaussians (IDDPM, eq. 6 and 7)


def bits_per_dim(nats: Float[Array, ' B *D']) -> Float[Array, ' B']:
    """Convert nats per dimension to their mean over an image, in bits."""
    return jnp.mean(nats, axis=tuple(range(1, nats.ndim))) / math.log(2.0)


def gaussian_kl(
    mean_a: Scalar | Float[Array, '...'],
    log_variance_a: Scalar | Float[Array, '...'],
    mean_b: Scalar | Float[Array, '...'],
    log_variance_b: Scalar | Float[Array, '...'],
) -> Float[Array, '...']:
    """Return KL(N(mean_a, variance_a) || N(mean_b, variance_b)) of each dimension, in nats; the arguments broadcast."""
    log_ratio = log_variance_a - log_variance_b
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio + jnp.square(mean_a - mean_b) * jnp.exp(-log_variance_b))


# ---------------------------------------------------------------- L_0: -log p(x_0 | x_1) (IDDPM, eq. 5; DDPM, eq. 13)


def _normal_cdf(value):
    """Return Page's approximation of the normal distribution function, which the published bits per dimension rest on.

    sigmoid(2 y) is (1 + tanh y) / 2 without its rounding in the lower tail.
    """
    return jax.nn.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3))


def discretized_log_likelihood(
    x: Float[Array, '*S'], mean: Scalar | Float[Array, '...'], log_variance: Scalar | Float[Array, '...']
) -> Float[Array, '*S']:
    """Return log of N(mean, variance)'s mass on each value's bin, in nats, at least log 1e-12. Shape of x.

    x: 8-bit data scaled to [-1, 1]. A bin reaches 1/255 to either side; the outermost ones reach infinity.
    """
    inverse_std, half_bin = jnp.exp(-0.5 * log_variance), 1.0 / 255.0
    distance = -jnp.abs(x - mean)  # both tails are computed as the lower one, where float32 is fine
    inner = _normal_cdf(inverse_std * (distance + half_bin)) - _normal_cdf(inverse_std * (distance - half_bin))
    outer = _normal_cdf(inverse_std * (half_bin - jnp.sign(x) * (x - mean)))
    return jnp.log(jnp.maximum(jnp.where(jnp.abs(x) > 0.999, outer, inner), 1e-12))


# ---------------------------------------------------------------- one term of L_vlb = L_0 + ... + L_T (IDDPM, eq. 4)


def variational_bound(
    prediction: Prediction,
    x: Float[Array, ' B *D'],
    z: Float[Array, ' B *D'],
    t: Int[Array, ' B'],
    *,
    logsnrs: Float[Array, ' T'],
    clip_x: bool,
) -> Float[Array, ' B']:
    """Return the bound's term at timestep t, in bits per dimension.

    KL(q(z_s | z_t, x) || p(z_s | z_t)) for t > 0, -log p(x | z_0) for t = 0. prediction: with its v.
    logsnrs: t=0 first.
    """
    _, mean, log_variance = diffusion.table_reverse(prediction, z, t, logsnrs=logsnrs, clip_x=clip_x)
    true_mean, _ = diffusion.q_posterior(x, z, *diffusion.table_step(logsnrs, t))
    true_log_variance = diffusion.table_log_variance(logsnrs, t, jnp.zeros_like(prediction.v))
    kl = bits_per_dim(gaussian_kl(true_mean, true_log_variance, mean, log_variance))
    return jnp.where(t == 0, -bits_per_dim(discretized_log_likelihood(x, mean, log_variance)), kl)


# ---------------------------------------------------------------- L_hybrid = L_simple + λ L_vlb (IDDPM, eq. 16)


def hybrid_terms(
    output: Float[Array, 'B *D F'],
    z: Float[Array, 'B *D C'],
    x: Float[Array, 'B *D C'],
    eps: Float[Array, 'B *D C'],
    t: Int[Array, ' B'],
    *,
    logsnrs: Float[Array, ' T'],
) -> tuple[Float[Array, ' B'], Float[Array, ' B']]:
    """Return (mean squared error on eps, bound · T/1000): their sum is L_hybrid, weighted as in ADM.

    output: a network's, F = 2C (`diffusion.split_variance`). The bound trains v alone: no gradient reaches eps through
    it. logsnrs: t=0 first. t: the timesteps at which z was made from x and eps.
    """
    eps_hat, v = diffusion.split_variance(output)
    mse = jnp.mean(jnp.square(eps_hat - eps), axis=tuple(range(1, z.ndim)))
    frozen = Prediction(jax.lax.stop_gradient(eps_hat), v)
    bound = variational_bound(frozen, x, z, t, logsnrs=logsnrs, clip_x=False)
    return mse, bound * (len(logsnrs) / 1000.0)


def hybrid_loss(
    network: Network,
    x: Float[Array, ' B *D'],
    labels: Int[Array, ' B'],
    key: Key[Array, ''],
    *,
    logsnrs: Float[Array, ' T'],
    null_label: int,
    p_uncond: Scalar,
    low_discrepancy: bool = False,
) -> Loss:
    """Compute L_hybrid at uniform timesteps, with Algorithm 1's dropped labels, of images x in [-1, 1].

    network(z, logsnr, labels) -> [..., 2C], eps and then the variance's half. logsnrs: t=0 first.
    """
    u, eps, labels, dropped = _draw(
        key, x, labels, null_label=null_label, p_uncond=p_uncond, low_discrepancy=low_discrepancy
    )
    diffusion.check_logsnrs(logsnrs, increasing=False)
    t = diffusion.uniform_timestep(u, len(logsnrs))
    logsnr, _ = diffusion.table_step(logsnrs, t)
    z = diffusion.q_sample(x, eps, logsnr)
    mse, bound = hybrid_terms(network(z, logsnr, labels), z, x, eps, t, logsnrs=logsnrs)
    return Loss(mse + bound, logsnr, dropped)


# ---------------------------------------------------------------- the noisy classifier's -log p(c|z) (ADM, section 4)


def label_log_prob(logits: Float[Array, 'B K'], labels: Int[Array, ' B']) -> Float[Array, ' B']:
    """Return log p(label) of each image."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def classifier_loss(
    network: Callable[[Float[Array, ' B *D'], Float[Array, ' B']], Float[Array, 'B K']],
    x: Float[Array, ' B *D'],
    labels: Int[Array, ' B'],
    key: Key[Array, ''],
    *,
    schedule: Schedule,
    low_discrepancy: bool = False,
) -> Loss:
    """Compute the cross-entropy of p(label | z_λ) at random λ, of images x in [-1, 1].

    network(z, logsnr) -> logits.
    """
    u, eps, _, dropped = _draw(key, x, labels, null_label=0, p_uncond=0.0, low_discrepancy=low_discrepancy)
    logsnr = schedule(u)
    logits = network(diffusion.q_sample(x, eps, logsnr), logsnr)
    return Loss(-label_log_prob(logits, labels), logsnr, dropped, correct=logits.argmax(1) == labels)


# ---------------------------------------------------------------- L_vlb of each image, every term (IDDPM, eq. 4)


def bits_per_dim_terms(
    denoise: Denoiser,
    x: Float[Array, ' B *D'],
    keys: Key[Array, ' B'],
    *,
    logsnrs: Float[Array, ' T'],
    v: Scalar = 0.3,
    clip_x: bool = True,
) -> dict[str, Float[Array, 'B ...']]:
    """Compute the bound on -log p(x), in bits per dimension, and its parts, as a dict.

    'total' [B], 'prior' [B], and, by timestep, [B, T]: 'terms' (total = prior + their sum), 'x_mse' and 'eps_mse' (of
    the eps that fits the clipped x).

    x: 8-bit images scaled to [-1, 1]. keys: one per image. logsnrs: t=0 first: a table, or a sampler's grid reversed.
    v: as in `samplers.ancestral`.
    """
    diffusion.check_logsnrs(logsnrs, increasing=False)
    logsnrs = jnp.asarray(logsnrs, jnp.float32)

    def term(_, t):
        eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), x.shape[1:]))(keys)
        t = jnp.full(x.shape[:1], t)
        z = diffusion.q_sample(x, eps, logsnrs[t])
        prediction = diffusion.check_prediction(denoise(z, logsnrs[t]), z)
        if prediction.v is None:
            prediction = prediction._replace(v=jnp.full_like(z, v))
        x_hat, _, _ = diffusion.table_reverse(prediction, z, t, logsnrs=logsnrs, clip_x=clip_x)
        eps_hat = diffusion.predict_eps(z, x_hat, logsnrs[t]) if clip_x else prediction.eps
        axes = tuple(range(1, x.ndim))
        return None, {
            'terms': variational_bound(prediction, x, z, t, logsnrs=logsnrs, clip_x=clip_x),
            'x_mse': jnp.mean(jnp.square(x_hat - x), axis=axes),
            'eps_mse': jnp.mean(jnp.square(eps_hat - eps), axis=axes),
        }

    terms = jax.lax.scan(term, None, jnp.arange(len(logsnrs)))[1]
    terms = {name: value.T for name, value in terms.items()}
    alpha, _ = diffusion.alpha_sigma(logsnrs[-1])
    prior = bits_per_dim(gaussian_kl(alpha * x, diffusion.log_sigma2(logsnrs[-1]), 0.0, 0.0))
    return {'total': prior + terms['terms'].sum(axis=1), 'prior': prior, **terms}


# ---------------------------------------------------------------- p(x | z_λ) ∝ q(z_λ | x) (Kingma et al. 2021)


def value_log_likelihood(
    x: Float[Array, ' B *D'], eps: Float[Array, ' B *D'], logsnr: PerImage
) -> Float[Array, ' B *D']:
    """Return log p(x | z_λ) of z_λ = alpha x + sigma eps, in nats: how surely z tells each 8-bit value. Shape of x.

    p(x | z) is q(z | x) divided by its sum over the 256 values. x: 8-bit data scaled to [-1, 1].
    """
    ratio = jnp.exp(0.5 * diffusion.broadcast_to_images(logsnr, x)) / 127.5  # between neighbours, in sigmas of z
    number = jnp.round((x + 1.0) * 127.5)  # whole, so that x's own term is exactly 1

    def add(total, other):
        distance = ratio * (number - other)
        return jnp.logaddexp(total, -distance * (eps + 0.5 * distance)), None  # log q(z | other) - log q(z | x)

    return -jax.lax.scan(add, jnp.full_like(x, -jnp.inf), jnp.arange(256.0))[0]


# ---------------------------------------------------------------- prior + -log p(x | z_λmax) + 1/2 ∫ |eps - eps^|² dλ


def continuous_bound(
    denoise: Denoiser,
    x: Float[Array, ' B *D'],
    keys: Key[Array, ' B'],
    *,
    logsnr_min: Scalar = -20.0,
    logsnr_max: Scalar = 13.3,
    num_evaluations: int = 100,
    clip_x: bool = True,
) -> dict[str, Float[Array, ' B']]:
    """Estimate the bound on -log p(x) in continuous time, in bits per dimension, and its parts, as a dict of [B].

    Variational Diffusion Models (Kingma et al. 2021): total = prior + reconstruction + diffusion, where
    prior = KL(q(z_λmin | x) || N(0, I)), reconstruction = -E log p(x | z_λmax) (`value_log_likelihood`) and
    diffusion = 1/2 ∫ E|eps - eps^|² dλ from λmin to λmax. It bounds -log p(x) at any λmax, and does not depend on a
    sampler. The default is the paper's: z tells neighbouring values apart (they are 6 sigma from each other).

    The integral is taken at `num_evaluations` λ per image, evenly spread from a random offset of the image's own (the
    paper's low-discrepancy times), so the estimate is unbiased at any number. x: 8-bit images scaled to [-1, 1].
    keys: one per image; image i's estimate depends on keys[i] alone. clip_x: clip the predicted x to [-1, 1].
    """
    if isinstance(logsnr_min, float) and isinstance(logsnr_max, float):
        diffusion.check_logsnrs(np.array([logsnr_min, logsnr_max]))
    axes, width = tuple(range(1, x.ndim)), (logsnr_max - logsnr_min) / num_evaluations
    offsets = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(keys)

    def noise(number):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), x.shape[1:]))(keys)

    def add(total, step):
        eps, logsnr = noise(step + 2), logsnr_min + (step + offsets) * width
        z = diffusion.q_sample(x, eps, logsnr)
        prediction = diffusion.check_prediction(denoise(z, logsnr), z)
        prediction = diffusion.clip_prediction(prediction, z, logsnr) if clip_x else prediction
        return total + jnp.mean(jnp.square(prediction.eps - eps), axis=axes), None

    squares = jax.lax.scan(add, jnp.zeros(len(x)), jnp.arange(num_evaluations))[0]
    alpha, _ = diffusion.alpha_sigma(logsnr_min)
    parts = {
        'prior': bits_per_dim(gaussian_kl(alpha * x, diffusion.log_sigma2(logsnr_min), 0.0, 0.0)),
        'reconstruction': -bits_per_dim(value_log_likelihood(x, noise(1), logsnr_max)),
        'diffusion': 0.5 * width * squares / math.log(2.0),
    }
    return {'total': sum(parts.values()), **parts}
