"""Noise schedules: numbers u in [0, 1], or timesteps, to log signal-to-noise ratios.

A schedule is a function u -> logsnr (λ), decreasing from λ_max at u=0 (data) to λ_min at u=1 (noise). Discrete
schedules are tables of λ, one per timestep, t=0 (data) first. Equations are the CFG paper's where no
other is named.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from cfg_jax import diffusion
from cfg_jax.diffusion import Schedule
from cfg_jax.errors import UserError
from cfg_jax.typing import Array, Float, Float32, Float64, Scalar

# ---------------------------------------------------------------- section 2: λ(u) = -2 log tan(a u + b)


def _cosine_ends(logsnr_min, logsnr_max):
    """Return the cosine schedule's end angles (start, stop): arctan(e^{-λmax/2}) and its mirror arctan(e^{λmin/2})."""
    return math.atan(math.exp(-0.5 * logsnr_max)), math.atan(math.exp(0.5 * logsnr_min))


def cosine_logsnr(
    u: Scalar | Float[Array, '*S'], *, logsnr_min: float = -20.0, logsnr_max: float = 20.0
) -> Float32[Array, '*S']:
    """Return λ(u) = -2 log tan(a u + b), b = arctan(e^{-λmax/2}), a = arctan(e^{-λmin/2}) - b. Shape of u.

    Above u = 1/2 the same function is evaluated as 2 log tan(π/2 - a u - b): near π/2 the tangent would lose three
    digits of λ in float32.
    """
    start, stop = _cosine_ends(logsnr_min, logsnr_max)
    slope = 0.5 * math.pi - start - stop
    u = jnp.asarray(u, jnp.float32)
    # Each branch sees only its own half, so that neither makes a NaN that a gradient would carry. A minimum instead of
    # the inner `where` would share the gradient at u = 1/2 out to both of its arguments.
    is_data = u < 0.5
    near_data = -2.0 * jnp.log(jnp.tan(slope * jnp.where(is_data, u, 0.5) + start))
    near_noise = 2.0 * jnp.log(jnp.tan(slope * jnp.where(is_data, 0.5, 1.0 - u) + stop))
    return jnp.where(is_data, near_data, near_noise)


def cosine_u(
    logsnr: Scalar | Float[Array, '*S'], *, logsnr_min: float = -20.0, logsnr_max: float = 20.0
) -> Float32[Array, '*S']:
    """Return u in [0, 1], the inverse of `cosine_logsnr`. Shape of logsnr."""
    start, stop = _cosine_ends(logsnr_min, logsnr_max)
    slope = 0.5 * math.pi - start - stop
    logsnr = jnp.asarray(logsnr, jnp.float32)
    near_data = (jnp.arctan(jnp.exp(-0.5 * logsnr)) - start) / slope
    near_noise = 1.0 - (jnp.arctan(jnp.exp(0.5 * logsnr)) - stop) / slope
    return jnp.where(logsnr > 0.0, near_data, near_noise)


# ---------------------------------------------------------------- Algorithm 2: λ_1 < ... < λ_T, from T uniform u


def _check_num_steps(num_steps):
    if num_steps < 1:
        raise UserError(f'num_steps is {num_steps}; it must be at least 1 (config.sample.num_steps).')


def logsnr_grid(schedule: Schedule, num_steps: int) -> Float[Array, ' {num_steps}']:
    """Return λ at `num_steps` uniformly spaced u, from schedule(1) = λ_min up to schedule(0) = λ_max."""
    _check_num_steps(num_steps)
    return schedule(jnp.linspace(1.0, 0.0, num_steps))


def open_logsnr_grid(schedule: Schedule, num_steps: int) -> Float[Array, ' {num_steps}']:
    """Return λ at u = 1, ..., 2/T, 1/T, without u = 0, where the last of T steps ends (Salimans & Ho 2022, Alg. 2)."""
    _check_num_steps(num_steps)
    return schedule(jnp.arange(num_steps, 0, -1) / num_steps)


# ---------------------------------------------------------------- uniform λ (DPM-Solver, section 3)


def uniform_logsnr_grid(
    num_steps: int, *, logsnr_min: float = -20.0, logsnr_max: float = 20.0
) -> Float32[Array, ' {num_steps}']:
    """Return `num_steps` uniformly spaced λ, from λ_min up to λ_max."""
    _check_num_steps(num_steps)
    return jnp.linspace(logsnr_min, logsnr_max, num_steps, dtype=jnp.float32)


# ---------------------------------------------------------------- EDM, eq. 5: sigma_i; λ = -2 log sigma


def karras_grid(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float32[Array, ' {num_steps}']:
    """Return λ = -2 log sigma of EDM's steps, increasing: sigma^(1/rho) is uniform from sigma_max to sigma_min.

    sigma is EDM's, sigma / alpha here. Raises ValueError unless 0 < sigma_min < sigma_max and rho > 0.
    """
    if not (0.0 < sigma_min < sigma_max < math.inf and 0.0 < rho < math.inf):
        raise ValueError(
            f'sigma_min {sigma_min:g} must be above 0 and below sigma_max {sigma_max:g}, and rho {rho:g} above 0'
        )
    _check_num_steps(num_steps)
    sigmas = np.linspace(sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho), num_steps) ** rho
    return jnp.asarray(-2.0 * np.log(sigmas), jnp.float32)


# ---------------------------------------------------------------- log(sigma / alpha) ~ N(mean, std²) (EDM, table 1)


def normal_logsnr(
    u: Scalar | Float[Array, '*S'], *, mean: float, std: float, logsnr_min: float = -20.0, logsnr_max: float = 20.0
) -> Float32[Array, '*S']:
    """Return λ = -2 (mean + std Φ⁻¹(u)), clipped to [λ_min, λ_max]: N(-2 mean, 4 std²) of a uniform u. Shape of u.

    EDM draws its sigma, here sigma / alpha, so: mean -1.2, std 1.2. The logit-normal times of Esser et al. 2024 (eq.
    19), logit t ~ N(m, s²) with t = sigma / (alpha + sigma), are the same law, since logit t = log(sigma / alpha).
    """
    u = jnp.clip(jnp.asarray(u, jnp.float32), 2.0**-24, 1.0 - 2.0**-24)  # where Φ⁻¹ is finite, 5.3 deviations out
    return jnp.clip(-2.0 * (mean + std * ndtri(u)), logsnr_min, logsnr_max)


# ---------------------------------------------------------------- the network's time (the authors' ddpm_w_distillation)


def continuous_time_input(logsnr: Scalar | Float[Array, '*S']) -> Float[Array, '*S']:
    """Return a continuous-time network's time input, 1000 · arctan(e^{-λ/2}) / (π/2), in (0, 1000). Shape of logsnr."""
    return jnp.arctan(jnp.exp(-0.5 * logsnr)) * (1000.0 / (0.5 * math.pi))


# ---------------------------------------------------------------- linear β_t (DDPM, section 4)


def linear_betas(num_timesteps: int = 1000) -> Float64[np.ndarray, ' T']:
    """Return DDPM's β_t, linear from 1e-4 to 0.02 at 1000 steps, rescaled for other lengths."""
    scale = 1000.0 / num_timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)


# ---------------------------------------------------------------- cosine β_t (IDDPM, eq. 17)


def iddpm_cosine_betas(num_timesteps: int = 1000, *, max_beta: float = 0.999) -> Float64[np.ndarray, ' T']:
    """Return Improved DDPM's β_t of ᾱ(t) = cos²((t + 0.008)/1.008 · π/2), t in [0, 1], capped at `max_beta`."""
    t = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2.0) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


# ---------------------------------------------------------------- λ_t = log(ᾱ_t / (1 - ᾱ_t)) (DDPM, eq. 4)


def betas_logsnr(betas: Float[Array, ' T']) -> Float64[np.ndarray, ' T']:
    """Return λ_t = log(ᾱ_t / (1 - ᾱ_t)) with ᾱ_t = Π (1 - β), decreasing."""
    alpha_bar = np.cumprod(1.0 - np.asarray(betas, np.float64))
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


def linear_beta_logsnr(num_timesteps: int = 1000) -> Float64[np.ndarray, ' T']:
    """Return λ_t of DDPM's and ADM's linear schedule, t=0 first."""
    return betas_logsnr(linear_betas(num_timesteps))


def iddpm_cosine_logsnr(num_timesteps: int = 1000) -> Float64[np.ndarray, ' T']:
    """Return λ_t of Improved DDPM's cosine schedule, t=0 first."""
    return betas_logsnr(iddpm_cosine_betas(num_timesteps))


# ---------------------------------------------------------------- fewer steps than timesteps (IDDPM, section 4)


def spaced_timesteps(num_timesteps: int, spacing: str | int) -> list[int]:
    """Return the timesteps that a respaced process keeps, sorted.

    spacing: '250' (that many, evenly), 'ddim25' (a fixed stride, as in the DDIM paper) or '10,15,20' (that many from
    each of three equal sections). Raises UserError if the counts do not fit.
    """
    allowed = "'250', 'ddim25' or '10,15,20'"
    wrong = f'config.sample.spacing is {spacing!r}; allowed for {num_timesteps} timesteps: {allowed}'
    spacing = str(spacing)
    try:
        if spacing.startswith('ddim'):
            count = int(spacing[len('ddim') :])
            for stride in range(1, num_timesteps):
                if len(range(0, num_timesteps, stride)) == count:
                    return list(range(0, num_timesteps, stride))
            raise UserError(f'{wrong} (no whole stride gives {count} steps).')
        counts = [int(count) for count in spacing.split(',')]
    except ValueError:
        raise UserError(f'{wrong}.') from None
    if min(counts) < 1:
        raise UserError(f'{wrong} (each section needs at least 1 step).')
    size, extra = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise UserError(f'{wrong} (a section of {length} timesteps cannot give {count} steps).')
        stride = 1.0 if count == 1 else (length - 1) / (count - 1)
        position = 0.0  # summed, not multiplied: the reference rounds the running sum
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return sorted(set(kept))


def spaced_grid(logsnrs: Float[Array, ' T'], spacing: str | int) -> Float32[Array, ' S']:
    """Return λ of the timesteps that `spaced_timesteps` keeps, for a sampler: increasing, t=0 last."""
    logsnrs = np.asarray(logsnrs, np.float64)
    return jnp.asarray(logsnrs[spaced_timesteps(len(logsnrs), spacing)[::-1]], jnp.float32)


# ---------------------------------------------------------------- functions of a table, that compare and hash


@dataclasses.dataclass(frozen=True)
class _TableFunction:
    """function(value, logsnrs) of one table; equal tables make equal functions, as a field of a module needs."""

    function: Callable
    logsnrs: tuple[float, ...] = dataclasses.field(repr=False)

    def __call__(self, value):
        return self.function(value, np.float32(self.logsnrs))


def _table_function(function, logsnrs):
    logsnrs = np.asarray(logsnrs, np.float64)
    if logsnrs.ndim != 1 or len(logsnrs) < 2 or not (np.isfinite(logsnrs).all() and np.all(np.diff(logsnrs) < 0)):
        raise ValueError('a table of λ must be finite and decrease: [T], T > 1, t=0 (data) first')
    return _TableFunction(function, tuple(logsnrs.tolist()))


def _interpolated_timestep(logsnr, logsnrs):
    timesteps = np.arange(len(logsnrs), dtype=np.float32)
    t = jnp.interp(jnp.asarray(logsnr, jnp.float32), logsnrs[::-1], timesteps[::-1])
    return jnp.where(jnp.abs(t - jnp.round(t)) < 1e-2, jnp.round(t), t)


def _uniform_logsnr(u, logsnrs):
    return jnp.asarray(logsnrs)[diffusion.uniform_timestep(u, len(logsnrs))]


# ---------------------------------------------------------------- the network's time on a table (ADM's program)


def table_time_input(logsnrs: Float[Array, ' T']) -> Schedule:
    """Return a discrete-time network's time input: the function λ -> t in [0, T-1], float32, shape of λ.

    logsnrs: t=0 first. Between entries t is linear in λ, beyond them it is constant. A t within 0.01 of a whole number
    is rounded: the table's λ in float32 give their timesteps exactly.
    """
    return _table_function(_interpolated_timestep, logsnrs)


# ---------------------------------------------------------------- λ_t of a uniform t (DDPM, Algorithm 1)


def table_logsnr(logsnrs: Float[Array, ' T']) -> Schedule:
    """Return the training schedule of a table: the function u in [0, 1) -> logsnrs[floor(u T)], float32, shape of u."""
    return _table_function(_uniform_logsnr, logsnrs)
