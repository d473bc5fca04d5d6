"""Post-hoc EMA (Karras et al. 2024, arXiv 2312.02696): averages of the parameters, whose length is chosen afterwards.

A run keeps a few averages with power-function profiles and saves snapshots of them. An average of another length, at
one of these steps, is nearly a weighted sum of the snapshots. A length is sigma_rel, the standard deviation of the
profile in units of the training time. All in float64; equations are numbered as in the paper.
"""

from collections.abc import Sequence

import numpy as np

from cfg_jax.errors import UserError
from cfg_jax.typing import Array, Float64, Real

SHORTEST = 0.001  # sigma_rel: a shorter average is nearly the parameters themselves
LONGEST = 0.5 / np.sqrt(3.0)  # sigma_rel at gamma = 0: the mean of all steps
_LARGEST_ERROR = 0.1  # of a profile made of snapshots, L2 norm in units of that of the wanted one
_LARGEST_GAIN = 300.0  # sum of the absolute weights, by which the rounding of the snapshots is multiplied
_TRIED = np.geomspace(0.005, LONGEST, 100)  # lengths, for the range in an error

# ------------------------------------------------------------------------------------------------
# Equation 123: the relative standard deviation of the profile p(tau) ~ tau^gamma on [0, t].


def sigma_rel(gamma: float) -> float:
    """Return the length of the profile with the exponent `gamma`, float64."""
    gamma = np.float64(gamma)
    return np.sqrt(gamma + 1.0) / ((gamma + 2.0) * np.sqrt(gamma + 3.0))


# ------------------------------------------------------------------------------------------------
# Equation 126: its inverse, the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.


def gamma(length: float) -> float:
    """Return the exponent of the profile of a length, sigma_rel in [SHORTEST, LONGEST], float64."""
    inverse = np.float64(length) ** -2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return roots.real.max()


# ------------------------------------------------------------------------------------------------
# Equation 127: the decay of step t, beta(t) = (1 - 1 / t)^(gamma + 1). `optim.power_ema` uses 1 - beta.


def weights_of_steps(length: float, time: int) -> Float64[np.ndarray, ' time']:
    """Return the weight of each of the steps 1 .. `time` in the average that `optim.power_ema` keeps, float64 [time].

    It is the profile's integral over the step: beta(1) = 0, so that nothing before the first step counts.
    """
    steps = np.arange(time + 1.0)
    return np.diff((steps / time) ** (gamma(length) + 1.0))


# ------------------------------------------------------------------------------------------------
# Equation 151: inner products of profiles, the integral of p_a(tau) p_b(tau).


def inner_products(
    gammas_a: Real[Array, ' A'], times_a: Real[Array, ' A'], gammas_b: Real[Array, ' B'], times_b: Real[Array, ' B']
) -> Float64[np.ndarray, 'A B']:
    """Return the inner products of two lists of profiles, float64 [A, B]. gammas, times: [A] and [B]."""
    a, b = np.asarray(gammas_a, np.float64)[:, None], np.asarray(gammas_b, np.float64)[None]
    s, t = np.asarray(times_a, np.float64)[:, None], np.asarray(times_b, np.float64)[None]
    ratio = (np.minimum(s, t) / np.maximum(s, t)) ** np.where(s < t, b, a)
    return (a + 1.0) * (b + 1.0) / (a + b + 1.0) * ratio / np.maximum(s, t)


# ------------------------------------------------------------------------------------------------
# Algorithm 3: the snapshots' weights, by least squares on the profiles.


def fit(
    lengths: Sequence[float], steps: Sequence[int], wanted: Sequence[float], step: int
) -> tuple[Float64[np.ndarray, 'K N L'], Float64[np.ndarray, ' K']]:
    """Return (weights of the snapshots, float64 [K, steps, lengths]; errors [K]) for K `wanted` lengths at `step`.

    A snapshot of each of `steps` has an average of each of `lengths`. Weights sum to 1. The error is the L2 norm of the
    difference between the profile that they make and that of the wanted length, in units of the latter's.
    """
    gammas, times = np.tile([gamma(each) for each in lengths], len(steps)), np.repeat(steps, len(lengths))
    aims, ends = np.array([gamma(each) for each in wanted]), np.full(len(wanted), step)
    between, across = inner_products(gammas, times, gammas, times), inner_products(gammas, times, aims, ends)
    squares = np.diag(inner_products(aims, ends, aims, ends))
    scale = np.diag(between)[:, None] ** -0.5  # profiles of norm 1: those of early snapshots are tall
    weights = scale * np.linalg.lstsq(scale * between * scale.T, scale * across)[0]
    weights /= weights.sum(0)
    errors = np.sum(weights * (between @ weights - 2.0 * across), axis=0) + squares
    return weights.T.reshape(len(wanted), len(steps), -1), np.sqrt(np.maximum(errors, 0.0) / squares)


def snapshot_weights(
    lengths: Sequence[float], steps: Sequence[int], length: float, step: int
) -> Float64[np.ndarray, 'N L']:
    """Return the weights of snapshots in the average of `length` at `step`, float64 [steps, lengths]; see `fit`.

    Raises UserError if the snapshots cannot give that length, and names those that they can.
    """
    tried = [length] if SHORTEST <= length <= LONGEST else []
    weights, errors = fit(lengths, steps, [*tried, *_TRIED], step)
    usable = (errors <= _LARGEST_ERROR) & (np.abs(weights).sum((1, 2)) <= _LARGEST_GAIN)
    if tried and usable[0]:
        return weights[0]
    able = _TRIED[usable[len(tried) :]]
    there = f'from {able[0]:.3f} to {able[-1]:.3f}' if len(able) else 'none'
    raise UserError(
        f'an EMA of length {length:g} cannot be made of the {len(steps)} snapshots up to step {step}; usable lengths '
        f'(sigma_rel) are {there} (ema, config.eval.ema, config.eval.weak_ema, config.guidance.weak_ema).'
    )
