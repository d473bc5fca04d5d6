"""Samplers: a denoiser, a start and a grid of λ to images. They know nothing of labels, weights or classifiers.

`logsnrs` increases; each of its entries is one call of the denoiser (Heun: two, but for the last), all within one
`lax.scan`, or one for each part of the grid if the denoiser switches (`denoisers.Switched`). The last call's x is
returned, without noise. clip_x: keep the predicted x within [-1, 1], or a function that limits it, such as
`diffusion.dynamic_threshold`. A grid that does not increase and a denoiser that returns no `Prediction` are a
ValueError; a grid that jit traces cannot be checked (`diffusion.check_logsnrs`, before it is given to the jitted
function, can).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import denoisers, diffusion
from cfg_jax.diffusion import Denoiser, MeanShift
from cfg_jax.typing import Array, Float, Int, Integer, Key, Scalar

Clipping = bool | Callable[[Float[Array, ' B *D']], Float[Array, ' B *D']]

# ---------------------------------------------------------------- CFG paper, Algorithm 2: z_1 ~ N(0, I)


def step_noise(
    keys: Key[Array, ' B'], step: int | Int[Array, ''], image_shape: tuple[int, ...]
) -> Float[Array, 'B ...']:
    """Draw standard normal noise [B, *image_shape]; image i's depends on keys[i] and step alone.

    Step 0 is the start z ~ N(0, I); a sampler's T-1 noisy steps are 1 .. T-1.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), image_shape))(keys)


def image_keys(seed: int | Integer[Array, ''], indices: Integer[Array, ' B']) -> Key[Array, ' B']:
    """Return the typed PRNG key of each image, fold_in(seed, image index)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


# ---------------------------------------------------------------- the walk that all samplers share


class _Step(NamedTuple):
    """A step from λ_t, where the denoiser is called, to λ_s. number: 1, 2, ...; options: the sampler's own numbers."""

    number: Any
    logsnr_t: Any
    logsnr_s: Any
    options: Any = ()


class _Seen(NamedTuple):
    """The denoiser's prediction at z: x (clipped), the eps that goes with it, v or None.

    Where a prediction has its own renoise_eps, eps is that, and z is alpha x + sigma eps: every solver then adds that
    noise back, but for those that step from an earlier z.
    """

    z: Any
    x: Any
    eps: Any
    v: Any


def _see(prediction, z, logsnr, clip_x):
    """Return what a sampler sees of a prediction, `_Seen`."""
    x = diffusion.limit_x(diffusion.predict_x(z, prediction.eps, logsnr), clip_x)
    eps, renoise = diffusion.predict_eps(z, x, logsnr) if clip_x else prediction.eps, prediction.renoise_eps
    if renoise is not None:  # an image whose own eps is added back is stepped like any other, clipping included
        own = (renoise == prediction.eps).all(axis=tuple(range(1, z.ndim)), keepdims=True)
        z = jnp.where(own, z, diffusion.q_sample(x, renoise, logsnr))
        eps = jnp.where(own, eps, renoise)
    return _Seen(z, x, eps, prediction.v)


def _walk(denoise, z, logsnrs, clip_x, step_to, *, memory=(), targets=None, options=(), renoises=True):
    """Scan over the calls of the denoiser, at `logsnrs`; return the last call's x.

    step_to(step, seen, memory) -> (z at the next call, memory): `_Step`, `_Seen`, and any tree of arrays that a solver
    of several steps carries along. targets: λ_s of each step. options: arrays with an entry for each step. renoises:
    False if the solver cannot add another eps back.
    """
    # The last step takes x in place of z_s, so any finite λ_s will do there.
    targets = jnp.append(logsnrs[1:], logsnrs[-1] + 1.0) if targets is None else targets
    steps = _Step(jnp.arange(1, len(logsnrs) + 1), jnp.asarray(logsnrs), jnp.asarray(targets), options)
    start, parts = denoisers.parts(denoise, logsnrs)
    carry = z, memory, start(z)
    for part, call in parts:

        def body(carry, step, call=call):
            z, memory, state = carry
            prediction, state = call(z, jnp.full(z.shape[:1], step.logsnr_t), state)
            prediction = diffusion.check_prediction(prediction, z)
            if prediction.renoise_eps is not None and not renoises:
                raise ValueError('this sampler cannot renoise with another eps (CFG++): take ddim, ancestral or 2M')
            seen = _see(prediction, z, step.logsnr_t, clip_x)
            z_s, memory = step_to(step, seen, memory)
            return (jnp.where(step.number == len(logsnrs), seen.x, z_s), memory, state), None

        carry, _ = jax.lax.scan(body, carry, jax.tree.map(lambda values, part=part: values[part], steps))
    return carry[0]


# ---------------------------------------------------------------- CFG paper, Algorithm 2, with eq. 3 and 4


def ancestral(
    denoise: Denoiser,
    z: Float[Array, ' B *D'],
    logsnrs: Float[Array, ' T'],
    keys: Key[Array, ' B'],
    *,
    v: Scalar = 0.3,
    clip_x: Clipping = True,
    mean_shift: MeanShift | None = None,
) -> Float[Array, ' B *D']:
    """Sample each step z_s ~ N(mean of q(z_s | z_t, x), (σ~²)^{1-v} (σ²_{t|s})^v).

    keys: one per image. v: the constant of eq. 4, unless the denoiser predicts its own.
    mean_shift(z, logsnr_t, variance) -> shape of z is added to the mean of every step but the last. ADM's
    Algorithm 1 shifts the last step too, which changes the reference's images by 2e-6.
    """
    diffusion.check_logsnrs(logsnrs)

    def step_to(step, seen, memory):
        mean, _ = diffusion.q_posterior(seen.x, seen.z, step.logsnr_t, step.logsnr_s)
        variance = diffusion.reverse_variance(step.logsnr_t, step.logsnr_s, v if seen.v is None else seen.v)
        if mean_shift is not None:
            mean = mean + mean_shift(seen.z, jnp.full(z.shape[:1], step.logsnr_t), variance)
        return mean + jnp.sqrt(variance) * step_noise(keys, step.number, z.shape[1:]), memory

    return _walk(denoise, z, logsnrs, clip_x, step_to)


# ---------------------------------------------------------------- DDIM, eq. 12 and 16 (Song et al. 2021)


def ddim(
    denoise: Denoiser,
    z: Float[Array, ' B *D'],
    logsnrs: Float[Array, ' T'],
    keys: Key[Array, ' B'] | None = None,
    *,
    eta: float = 0.0,
    clip_x: Clipping = True,
) -> Float[Array, ' B *D']:
    """Sample each step z_s = alpha_s x + sqrt(sigma_s² - c²) eps + c noise, c² = eta² σ~².

    eta=0 is deterministic and needs no keys; eta=1 has the posterior's variance. keys: one per image. eps is the one
    that fits the clipped x, as in ADM (which clips before guidance: `diffusion.clip_prediction`).
    """
    diffusion.check_logsnrs(logsnrs)
    if eta:
        _require_keys(keys, 'ddim with eta > 0')

    def step_to(step, seen, memory):
        alpha_s, sigma_s = diffusion.alpha_sigma(step.logsnr_s)
        if not eta:
            return alpha_s * seen.x + sigma_s * seen.eps, memory
        # c² = η² (1 - e^{λt-λs}) sigma_s²: factored, so that the rest of sigma_s² never rounds below zero
        share = eta**2 * diffusion.one_minus_ratio(step.logsnr_t, step.logsnr_s)
        noise = step_noise(keys, step.number, z.shape[1:])
        z_s = alpha_s * seen.x + sigma_s * (jnp.sqrt(1.0 - share) * seen.eps + jnp.sqrt(share) * noise)
        return z_s, memory

    return _walk(denoise, z, logsnrs, clip_x, step_to)


def _require_keys(keys, name):
    if keys is None:
        raise ValueError(f'{name} adds noise and needs keys, one per image')


# ---------------------------------------------------------------- DPM-Solver++(2M), Algorithm 2 (Lu et al. 2022)


def dpmpp_2m(
    denoise: Denoiser,
    z: Float[Array, ' B *D'],
    logsnrs: Float[Array, ' T'],
    keys: Key[Array, ' B'] | None = None,
    *,
    clip_x: Clipping = True,
    lower_order_final: bool = False,
) -> Float[Array, ' B *D']:
    """Sample each step z_s = (sigma_s / sigma_t) z_t + alpha_s (1 - e^{-h}) D, h = (λ_s - λ_t) / 2.

    D = x + (x - x_before) h / (2 h_before) extrapolates x from the last two steps; the first step has D = x. It is
    deterministic: keys are not used. The error falls as 1/T² where neighbouring steps are alike.
    lower_order_final: take the last step with D = x too, for grids whose last step is much longer than the one before,
    such as uniform u: there D would go far beyond x.
    """
    diffusion.check_logsnrs(logsnrs)

    def step_to(step, seen, x_before):
        h = 0.5 * (step.logsnr_s - step.logsnr_t)
        return _exponential_step(step, seen.z, -jnp.expm1(-h) * _extrapolated(step.options, seen.x, x_before)), seen.x

    ratios = _step_ratios(logsnrs, lower_order_final)
    return _walk(denoise, z, logsnrs, clip_x, step_to, memory=z, options=ratios)


def _extrapolated(ratio, x, x_before):
    """Return x in the middle of the next step; ratio: h / h_before."""
    return x + 0.5 * ratio * (x - x_before)


def _exponential_step(step, z, displacement, *, decay=1.0):
    """Return (sigma_s / sigma_t) decay z + alpha_s displacement."""
    (_, sigma_t), (alpha_s, sigma_s) = diffusion.alpha_sigma(step.logsnr_t), diffusion.alpha_sigma(step.logsnr_s)
    return sigma_s / sigma_t * decay * z + alpha_s * displacement


def _step_ratios(logsnrs, lower_order_final):
    """Return h / h_before of each call's step, 0 for the first; the last call takes no step."""
    h = jnp.diff(logsnrs)
    ratios = h[1:] / h[:-1]
    if lower_order_final:
        ratios = jnp.where(jnp.arange(len(ratios)) == len(ratios) - 1, 0.0, ratios)
    return jnp.concatenate([jnp.zeros(1), ratios, jnp.zeros(1)])[: len(logsnrs)]


# ---------------------------------------------------------------- SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix B.5)


def dpmpp_2m_sde(
    denoise: Denoiser,
    z: Float[Array, ' B *D'],
    logsnrs: Float[Array, ' T'],
    keys: Key[Array, ' B'],
    *,
    clip_x: Clipping = True,
    lower_order_final: bool = False,
) -> Float[Array, ' B *D']:
    """Sample z_s = (sigma_s / sigma_t) e^{-h} z_t + alpha_s (1 - e^{-2h}) D + sigma_s sqrt(1 - e^{-2h}) noise.

    h, D and lower_order_final are those of `dpmpp_2m`. keys: one per image.
    """
    diffusion.check_logsnrs(logsnrs)
    _require_keys(keys, 'dpmpp_2m_sde')

    def step_to(step, seen, x_before):
        rest = diffusion.one_minus_ratio(step.logsnr_t, step.logsnr_s)  # 1 - e^{-2h}
        x = _extrapolated(step.options, seen.x, x_before)
        decay = jnp.exp(0.5 * (step.logsnr_t - step.logsnr_s))
        _, sigma_s = diffusion.alpha_sigma(step.logsnr_s)
        noise = step_noise(keys, step.number, z.shape[1:])
        return _exponential_step(step, seen.z, rest * x, decay=decay) + sigma_s * jnp.sqrt(rest) * noise, seen.x

    ratios = _step_ratios(logsnrs, lower_order_final)
    return _walk(denoise, z, logsnrs, clip_x, step_to, memory=z, options=ratios)


# ---------------------------------------------------------------- UniPC-2, B_2(h) (Zhao et al. 2023, Algorithm 1)


class _Remembered(NamedTuple):
    """The two steps before: z at the last, x at the last and at the one before."""

    z: Any
    x: Any
    x_before: Any


def unipc_2(
    denoise: Denoiser,
    z: Float[Array, ' B *D'],
    logsnrs: Float[Array, ' T'],
    keys: Key[Array, ' B'] | None = None,
    *,
    clip_x: Clipping = True,
    lower_order_final: bool = False,
) -> Float[Array, ' B *D']:
    """Sample with the predictor and the corrector of order 2: the x found at a step also corrects the step to it.

    Deterministic: keys are not used. It calls the denoiser as often as `dpmpp_2m`, whose lower_order_final it has; its
    error falls as 1/T³ where neighbouring steps are alike. ValueError for a denoiser with a renoise_eps.
    """
    diffusion.check_logsnrs(logsnrs)

    def step_to(step, seen, kept):
        first, before, ratio, weights = step.options
        arrived = _Step(step.number, before, step.logsnr_t)
        h = 0.5 * (step.logsnr_t - before)
        # corrector: once more from the step before, with the x that was found here
        slope = (kept.x_before - kept.x) * weights[0] + (seen.x - kept.x) * weights[1]
        corrected = _exponential_step(arrived, kept.z, -jnp.expm1(-h) * (kept.x + slope))
        z_t = jnp.where(first, seen.z, corrected)
        # predictor: as 2M, from there
        h = 0.5 * (step.logsnr_s - step.logsnr_t)
        z_s = _exponential_step(step, z_t, -jnp.expm1(-h) * _extrapolated(ratio, seen.x, kept.x))
        return z_s, _Remembered(z_t, seen.x, kept.x)

    options = _unipc_options(logsnrs, lower_order_final)
    memory = _Remembered(z, z, z)
    return _walk(denoise, z, logsnrs, clip_x, step_to, memory=memory, options=options, renoises=False)


def _unipc_options(logsnrs, lower_order_final):
    """Return (is first, λ of the step before, h / h_before, weights [T, 2] of the corrector's two differences).

    The weights solve the paper's order conditions R rho = b for B_2(h) = e^{-h} - 1; the first corrector has order 1.
    """
    traced = isinstance(logsnrs, jax.core.Tracer)
    xp = jnp if traced else np  # in float64 where the values are known: phi_3 loses digits at small h
    number, half = len(logsnrs), 0.5 * (logsnrs if traced else np.asarray(logsnrs, np.float64))
    before = xp.concatenate([half[:1] - 1.0, half[:-1]])
    h = half - before
    r = -xp.concatenate([xp.ones(2), h[1:-1] / h[2:]])[:number]  # (λ two steps before - λ before) / h
    phi_1 = xp.expm1(-h)
    phi_2 = phi_1 / -h - 1.0
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / phi_1, 2.0 * phi_3 / phi_1
    far = (b_1 - b_2) / (1.0 - r)
    order_1 = np.arange(number) < 2
    near = xp.where(order_1, 0.5, b_1 - far)
    # the far difference is (x two steps before - x before) / r
    weights = xp.stack([xp.where(order_1, 0.0, far / r), near], axis=1)
    return (
        np.arange(number) == 0,
        jnp.float32(2.0 * before),
        _step_ratios(logsnrs, lower_order_final),
        jnp.float32(weights),
    )


# ---------------------------------------------------------------- EDM, Algorithms 1 and 2 (Karras et al. 2022)


class _Half(NamedTuple):
    """The first half of a step of Heun's: z where it began, and its eps there."""

    z: Any
    eps: Any


def heun(
    denoise: Denoiser,
    z: Float[Array, ' B *D'],
    logsnrs: Float[Array, ' T'],
    keys: Key[Array, ' B'] | None = None,
    *,
    clip_x: Clipping = True,
    churn: float = 0.0,
    churn_interval: tuple[float, float] = (-np.inf, np.inf),
    churn_noise: float = 1.0,
) -> Float[Array, ' B *D']:
    """Sample by Heun's method on d(z/alpha) / d(sigma/alpha) = eps: 2T - 1 calls of the denoiser, error as 1/T².

    churn: EDM's S_churn: before a step, noise is added that raises sigma/alpha by min(churn / T, sqrt(2) - 1) of
    itself, where λ is in churn_interval (S_max and S_min, as λ = -2 log sigma); churn_noise: S_noise, its standard
    deviation. With churn it needs keys, one per image. ValueError for a denoiser with a renoise_eps.
    """
    diffusion.check_logsnrs(logsnrs)
    if churn:
        _require_keys(keys, 'heun with churn > 0')
    noisier, calls = _heun_logsnrs(logsnrs, churn, churn_interval)

    def add_noise(z, number, logsnr, to):
        """Return z at the lower λ `to`, noise added; numbers of noise are those of the step that begins there."""
        if not churn:
            return z
        (alpha, sigma), (alpha_to, sigma_to) = diffusion.alpha_sigma(logsnr), diffusion.alpha_sigma(to)
        added = jnp.maximum((sigma_to / alpha_to) ** 2 - (sigma / alpha) ** 2, 0.0)
        noise = step_noise(keys, number, z.shape[1:])
        return alpha_to * (z / alpha + churn_noise * jnp.sqrt(added) * noise)

    def step_to(step, seen, half):
        predicts, begun, number, after = step.options
        alpha_s, sigma_s = diffusion.alpha_sigma(step.logsnr_s)
        alpha_t, sigma_t = diffusion.alpha_sigma(begun)
        base = jnp.where(predicts, seen.z, half.z)
        eps = jnp.where(predicts, seen.eps, 0.5 * (half.eps + seen.eps))
        z_s = alpha_s / alpha_t * base + (sigma_s - alpha_s * sigma_t / alpha_t) * eps
        return jnp.where(predicts, z_s, add_noise(z_s, number, step.logsnr_s, after)), _Half(base, seen.eps)

    predicts, step, following = _heun_order(len(logsnrs))
    options = predicts, jnp.asarray(noisier)[step], jnp.asarray(step + 2), jnp.asarray(noisier)[following]
    targets = jnp.asarray(logsnrs)[following]
    z = add_noise(z, 1, jnp.float32(logsnrs[0]), jnp.float32(noisier[0]))
    memory = _Half(z, jnp.zeros_like(z))
    walk = {'memory': memory, 'targets': targets, 'options': options, 'renoises': False}
    return _walk(denoise, z, calls, clip_x, step_to, **walk)


def heun_calls(
    logsnrs: Float[Array, ' T'], *, churn: float = 0.0, churn_interval: tuple[float, float] = (-np.inf, np.inf)
) -> Float[Array, ' calls']:
    """Return λ of the 2T - 1 calls that `heun` makes of its denoiser; known λ stay numpy."""
    return _heun_logsnrs(logsnrs, churn, churn_interval)[1]


def _heun_order(number):
    """Return (is it the first half of a step, the step, the step after it) of each call."""
    call = np.arange(2 * number - 1)
    return call % 2 == 0, call // 2, np.minimum(call // 2 + 1, number - 1)


def _heun_logsnrs(logsnrs, churn, churn_interval):
    """Return (λ of each step after its noise is added, λ of each call)."""
    xp = jnp if isinstance(logsnrs, jax.core.Tracer) else np
    logsnrs, (low, high) = xp.asarray(logsnrs), churn_interval
    raised = 2.0 * np.log1p(min(churn / len(logsnrs), np.sqrt(2.0) - 1.0))
    noisier = logsnrs - xp.where((logsnrs >= low) & (logsnrs <= high), raised, 0.0)
    noisier = xp.append(noisier[:-1], logsnrs[-1]).astype(np.float32)  # the last x is returned: no noise before it
    predicts, step, following = _heun_order(len(logsnrs))
    return noisier, xp.where(predicts, noisier[step], logsnrs[following]).astype(np.float32)
