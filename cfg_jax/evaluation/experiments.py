"""Measurements on mixtures whose answers are known: what guidance is meant to draw, and what it draws.

Every function takes a `Bench` and returns arrays or rows: dicts with 'quantity', 'method', 'weight', 'strength',
'steps', 'logsnr', 'value' and 'error', of which some may be missing. Class 0 is the one that is guided to. `laboratory`
draws what is found here.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import diffusion, guidance, samplers, schedules
from cfg_jax.mixtures import Mixture, WeightedSamples

LABEL = 0  # the class that is guided to
SOLVERS = {name: getattr(samplers, name) for name in ('ddim', 'dpmpp_2m', 'unipc_2', 'heun')}  # deterministic samplers


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """The parts that all measurements share: data, a sampler's λ [T], increasing, samples of each kind, the seed."""

    mixture: Mixture
    logsnrs: np.ndarray
    num_samples: int = 10_000
    seed: int = 0

    def labels(self, n, label=LABEL):
        return jnp.full(n, label, jnp.int32)


class Networks(NamedTuple):
    """A model(z, λ, labels) -> Prediction, with a null label, and a classifier's log_prob(z, λ, labels)."""

    model: Callable
    log_prob: Callable


class Grid(NamedTuple):
    """Points of a square around the origin, float32 [P P, 2], row by row, and the area of each."""

    points: np.ndarray
    line: np.ndarray
    area: float

    @classmethod
    def around(cls, mixture, *, num_points=240):
        """Return the grid that reaches 4.5 standard deviations beyond every mean."""
        reach = float(np.abs(mixture.means).max() + 4.5 * np.sqrt(mixture.variances.max()))
        line = ((np.arange(num_points) + 0.5) / num_points * 2.0 - 1.0) * reach
        points = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
        return cls(np.float32(points), line, float((line[1] - line[0]) ** 2))


# ---------------------------------------------------------------- sampling


def for_each(function, items):
    """Return [function(item)], on two threads: most of the time goes into compiling, which keeps one core busy."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(function, items))


def draw(bench, denoise, n, *, sampler='ddim', start=None, noise=None, copies=1):
    """Draw samples, float32 [copies, n, D], by a denoiser of copies · n values of z.

    sampler: one of `SOLVERS`, or 'ancestral' (v = 0.3). Sample i starts from the same noise in every copy.
    start: factor of that noise in each copy; noise: factor of the noise that ancestral steps add; None is 1.
    """
    logsnrs = jnp.asarray(bench.logsnrs, jnp.float32)
    start, noise = (None if each is None else jnp.repeat(jnp.float32(each), n)[:, None] for each in (start, noise))

    @jax.jit
    def drawn(keys, z):
        z = z if start is None else start * z
        if sampler != 'ancestral':
            return SOLVERS[sampler](denoise, z, logsnrs, clip_x=False)
        options = {} if noise is None else {'mean_shift': _less_noise(keys, logsnrs, noise)}
        return samplers.ancestral(denoise, z, logsnrs, keys, clip_x=False, **options)

    return np.asarray(drawn(*_start(bench.seed, n, copies, bench.mixture.dimensions))).reshape(copies, n, -1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _start(seed, n, copies, dimensions):
    """Return (keys [copies n], noise [copies n, D]), compiled once for all denoisers."""
    keys = samplers.image_keys(seed, jnp.tile(jnp.arange(n), copies))
    return keys, samplers.step_noise(keys, 0, (dimensions,))


def _less_noise(keys, logsnrs, factor):
    """Return the `mean_shift` that takes away 1 - factor of the noise that an ancestral step is about to add."""

    def mean_shift(z, logsnr, variance):
        step = jnp.argmin(jnp.abs(logsnrs - logsnr[0])) + 1
        return (factor - 1.0) * jnp.sqrt(variance) * samplers.step_noise(keys, step, z.shape[1:])

    return mean_shift


def draw_guided(bench, model, weights, *, n=None, sampler='ddim', label=LABEL):
    """Draw samples of classifier-free guidance at each of the weights, float32 [weights, n, D]."""
    n = n or bench.num_samples
    each = jnp.repeat(jnp.asarray(weights, jnp.float32), n)
    labels = bench.labels(len(each), label)
    denoise = guidance.classifier_free(model, labels, each, null_label=bench.mixture.null_label)
    return draw(bench, denoise, n, sampler=sampler, copies=len(weights))


def paths(bench, model, weight, z):
    """Return z at every λ of DDIM with guidance, and the x at its end: float32 [T + 1, n, D], from z [n, D]."""
    seen, labels = [], bench.labels(len(z))
    guided = guidance.classifier_free(model, labels, weight, null_label=bench.mixture.null_label)

    def denoise(z, logsnr):
        jax.debug.callback(lambda z: seen.append(np.asarray(z)), z, ordered=True)
        return guided(z, logsnr)

    logsnrs = jnp.asarray(bench.logsnrs, jnp.float32)
    x = jax.jit(lambda z: samplers.ddim(denoise, z, logsnrs, clip_x=False))(z)
    x.block_until_ready()
    jax.effects_barrier()
    return np.stack([*seen, np.asarray(x)])


# ---------------------------------------------------------------- densities on a grid (2-D)


def target_densities(bench, grid, weights, label=LABEL):
    """Return the density of p(x | c) p(c | x)^w on the grid, which sums to 1 over it, float64 [weights, P, P]."""
    log_density = jax.jit(bench.mixture.target_log_density, static_argnums=1)
    values = np.stack([np.exp(np.float64(log_density(grid.points, label, weight))) for weight in weights])
    values /= values.sum(axis=1, keepdims=True) * grid.area
    return values.reshape(len(weights), len(grid.line), -1)


def noisy_density(bench, grid, logsnr, label=LABEL):
    """Return the density of p(z_λ | c) on the grid, [P, P]."""
    found = jax.jit(bench.mixture.log_density, static_argnums=2)(grid.points, jnp.float32(logsnr), label)
    return np.exp(np.float64(found)).reshape(len(grid.line), -1)


def score_field(bench, model, points, logsnr, weight):
    """Return the guided score at points [n, D], float32 [n, D]."""
    z, at = jnp.asarray(points, jnp.float32), jnp.full(len(points), logsnr, jnp.float32)
    guided = guidance.classifier_free(model, bench.labels(len(z)), weight, null_label=bench.mixture.null_label)
    return np.asarray(jax.jit(lambda z: diffusion.score(guided(z, at).eps, at))(z))


# ---------------------------------------------------------------- numbers of samples


def axis(mixture, label=LABEL):
    """Return the unit vector that points away from the other classes: from the data's mean to the class's, [D]."""
    away = np.float64(mixture.moments(label)[0] - mixture.moments()[0])
    return away / np.linalg.norm(away)


def along(bench, x):
    """Return {'mean along the axis': (value, error), 'deviation along the axis': (value, error)} of x [n, D]."""
    values = np.float64(x) @ axis(bench.mixture)
    n, deviation = len(values), values.std(ddof=1)
    fourth = ((values - values.mean()) ** 4).mean()
    error = math.sqrt(max(fourth - deviation**4, 0.0) / n) / (2.0 * deviation)
    return {'mean along the axis': (values.mean(), deviation / math.sqrt(n)),
            'deviation along the axis': (deviation, error)}  # fmt: skip


def energy_distance(a, b, *, groups=10):
    """Return (2 E|a - b| - E|a - a'| - E|b - b'|, its standard error) of samples [n, D]; 0 for equal distributions.

    The estimate is unbiased, so it may be negative; the error is that of the mean over independent groups.
    """
    size = min(len(a), len(b)) // groups
    parts = [slice(g * size, (g + 1) * size) for g in range(groups)]
    values = np.array([_energy_distance(jnp.asarray(a[part]), jnp.asarray(b[part])) for part in parts], np.float64)
    return values.mean(), values.std(ddof=1) / math.sqrt(groups)


@jax.jit
def _energy_distance(a, b):
    """Return the estimate of one group, [n, D] each."""

    def total(a, b):
        return jnp.sqrt(jnp.maximum(((a[:, None] - b[None]) ** 2).sum(-1), 1e-12)).sum()

    n = len(a)
    return 2 * total(a, b) / n**2 - (total(a, a) + total(b, b)) / (n * (n - 1))


class Target(NamedTuple):
    """p(x | c) p(c | x)^w at the data: weighted samples of it, n that are resampled from them, and rows of numbers."""

    weighted: WeightedSamples
    samples: np.ndarray
    rows: list


def target_at(bench, weight, *, target_samples):
    """Return the `Target` of a weight w; `target_samples` is the number of the weighted ones."""
    key = jax.random.fold_in(jax.random.key(bench.seed + 1), np.float32(weight).view(np.uint32))
    keys = jax.random.split(key)
    samples_of = jax.jit(bench.mixture.target_samples, static_argnums=(1, 2))
    weighted = samples_of(keys[0], target_samples, LABEL, float(weight))
    values = weighted.x @ jnp.float32(axis(bench.mixture))
    mean, mean_error = map(float, weighted.mean(values))
    variance, variance_error = map(float, weighted.mean((values - mean) ** 2))
    deviation = math.sqrt(variance)
    found = {
        'effective samples': (weighted.effective_size,),
        'mean along the axis': (mean, mean_error),
        'deviation along the axis': (deviation, variance_error / (2 * deviation)),
    }
    rows = [row(quantity, 'target', *numbers, weight=weight) for quantity, numbers in found.items()]
    return Target(weighted, np.asarray(weighted.resample(keys[1], bench.num_samples)), rows)


def target_and_yield(bench, weights, *, target_samples=400_000):
    """Compare p(x | c) p(c | x)^w at the data with what sampling with the exact guided eps yields.

    Returns (rows, {'ancestral': x [weights, n, D], 'ddim': x [weights, n, D]}).
    """
    drawn = {name: draw_guided(bench, bench.mixture.model, weights, sampler=name) for name in ('ancestral', 'ddim')}
    rows = []
    for index, weight in enumerate(weights):
        target = target_at(bench, weight, target_samples=target_samples)
        rows += target.rows
        for name, x in drawn.items():
            rows += against(bench, target, x[index], name, weight)
    return rows, drawn


def against(bench, target, x, method, weight):
    """Return rows of the mean, deviation and distance to the `Target` of samples x [n, D] drawn by a method."""
    found = along(bench, x) | {'energy distance to the target': energy_distance(x, target.samples)}
    return [row(quantity, method, *numbers, weight=weight) for quantity, numbers in found.items()]


def row(quantity, method, value, error=None, **where):
    """Return one row: a number, its standard error if it has one, and where it was taken."""
    found = {'quantity': quantity, 'method': method, **{name: float(at) for name, at in where.items()}}
    return found | {'value': float(value)} | ({} if error is None else {'error': float(error)})


# ---------------------------------------------------------------- conditional with w, unconditional with w + 1


def from_either_side(bench, models, logsnrs, weight, *, n=2000):
    """Compare classifier guidance of the conditional model by w with that of the unconditional one by w + 1.

    models: {name: `Networks`}. Returns rows of |eps - eps'| / |eps|, root mean squares over z ~ q(z_λ | c).
    """
    rows, labels = [], bench.labels(n)
    x = bench.mixture.sample(jax.random.key(bench.seed + 2), n, LABEL)
    noise = jax.random.normal(jax.random.key(bench.seed + 3), x.shape)
    for name, networks in models.items():
        conditional, unconditional = sides(bench, networks, weight, labels)

        @jax.jit
        def difference(logsnr, conditional=conditional, unconditional=unconditional):
            z, at = diffusion.q_sample(x, noise, logsnr), jnp.full(n, logsnr)
            eps, other = conditional(z, at).eps, unconditional(z, at).eps
            return jnp.sqrt(jnp.mean((eps - other) ** 2) / jnp.mean(eps**2))

        for logsnr in logsnrs:
            value = difference(jnp.float32(logsnr))
            rows.append(row('relative difference of eps', name, value, weight=weight, logsnr=logsnr))
    return rows


def sides(bench, networks, weight, labels):
    """Return the denoisers of classifier guidance: the conditional with w, the unconditional with w + 1."""
    null = bench.mixture.null_label
    starts = (guidance.conditional, weight), (guidance.unconditional, weight + 1.0)
    return [
        guidance.classifier(start(networks.model, labels, 0.0, null_label=null), networks.log_prob, labels, factor)
        for start, factor in starts
    ]


# ---------------------------------------------------------------- section 1: scaled scores and less noise

BASELINES = {  # as many strengths of each, the first of which changes nothing
    'guidance, w': (0.0, 0.5, 1.0, 2.0, 4.0),
    'score scaled by': (1.0, 1.1, 1.25, 1.5, 2.0),
    'noise of the steps scaled by': (1.0, 0.9, 0.75, 0.5, 0.25),
    'noise at the start scaled by': (1.0, 0.75, 0.5, 0.25, 0.1),
}


def baselines(bench, *, n=None):
    """Measure what raises the class's probability, and at what spread.

    Returns (rows of 'class probability' p(c | x), 'spread' as a share of the data's, and 'log density' log p(x | c),
    {method: x [strengths, n, D]}). The strength of a row stands under 'strength'.
    """
    n = n or bench.num_samples
    mixture, (weights, factors, noises, starts) = bench.mixture, BASELINES.values()
    copies = len(weights)
    plain = guidance.conditional(mixture.model, bench.labels(copies * n), 0.0, null_label=mixture.null_label)
    each_factor = jnp.repeat(jnp.float32(factors), n)[:, None]

    def scaled(z, logsnr):
        return diffusion.Prediction(each_factor * plain(z, logsnr).eps)

    by_method = (
        draw_guided(bench, mixture.model, weights, n=n, sampler='ancestral'),
        draw(bench, scaled, n, sampler='ancestral', copies=copies),
        draw(bench, plain, n, sampler='ancestral', noise=noises, copies=copies),
        draw(bench, plain, n, start=starts, copies=copies),
    )
    drawn = dict(zip(BASELINES, by_method))
    data = float(jnp.sqrt(jnp.trace(mixture.moments(LABEL)[1])))
    measure = jax.jit(lambda x: (jnp.exp(mixture.log_posterior(x)[:, LABEL]), mixture.log_density(x, jnp.inf, LABEL)))
    rows = []
    for method, every in drawn.items():
        for strength, x in zip(BASELINES[method], every):
            probability, density = map(np.float64, measure(x))
            spread, spread_error = _spread(np.float64(x))
            for quantity, value, error in (
                ('class probability', probability.mean(), probability.std() / math.sqrt(n)),
                ('log density', density.mean(), density.std() / math.sqrt(n)),
                ('spread', spread / data, spread_error / data),
            ):
                rows.append(row(quantity, method, value, error, strength=strength))
    return rows, drawn


def _spread(x):
    """Return (the root of the summed variances of x [n, D], its standard error)."""
    squares = ((x - x.mean(axis=0)) ** 2).sum(axis=1)
    spread = math.sqrt(squares.mean())
    return spread, squares.std() / math.sqrt(len(x)) / (2.0 * spread)


# ---------------------------------------------------------------- how fast solvers converge

_FIT_FROM = 32  # steps; with fewer a slope is not yet an order


def solvers(bench, *, weight=1.0, steps=(8, 16, 32, 64, 128, 256), reference_steps=2048, n=500):
    """Measure each solver's error: the root mean square distance of its x from that of very many steps of UniPC.

    All start from the same noise; λ is uniform between the ends of the bench's grid. Returns rows of 'error of x' and
    'calls of the denoiser' for each number of steps; of 'error of x' of 'float32', which is Heun's at the reference's
    number of steps and stands for rounding; and of 'slope over steps' and 'slope over calls', of lines fitted to the
    logarithms from 32 steps on, where the error is more than three times that of float32.
    """
    mixture, labels = bench.mixture, bench.labels(n)
    guided = guidance.classifier_free(mixture.model, labels, weight, null_label=mixture.null_label)
    low, high = float(bench.logsnrs[0]), float(bench.logsnrs[-1])

    def solve(which):
        name, number = which
        grid = schedules.uniform_logsnr_grid(number, logsnr_min=low, logsnr_max=high)
        return np.float64(draw(dataclasses.replace(bench, logsnrs=np.asarray(grid)), guided, n, sampler=name)[0])

    def distance(x):
        squares = ((x - reference) ** 2).sum(axis=1)
        root = math.sqrt(squares.mean())
        return root, squares.std() / math.sqrt(n) / (2.0 * max(root, 1e-30))

    runs = [('unipc_2', reference_steps), ('heun', reference_steps), *itertools.product(SOLVERS, steps)]
    reference, *found = for_each(solve, runs)
    floor, *found = map(distance, found)
    rows = [row('error of x', 'float32', *floor, weight=weight, steps=reference_steps)]
    by_run = dict(zip(runs[2:], found))
    for name in SOLVERS:
        calls = {number: 2 * number - 1 if name == 'heun' else number for number in steps}
        errors = {number: by_run[name, number] for number in steps}
        for number in steps:
            rows.append(row('error of x', name, *errors[number], weight=weight, steps=number))
            rows.append(row('calls of the denoiser', name, calls[number], weight=weight, steps=number))
        fitted = [number for number in steps if number >= _FIT_FROM and errors[number][0] > 3.0 * floor[0]]
        if len(fitted) > 1:
            logs = np.log([errors[number][0] for number in fitted])
            for over, of in (('steps', fitted), ('calls', [calls[number] for number in fitted])):
                rows.append(row(f'slope over {over}', name, np.polyfit(np.log(of), logs, 1)[0], weight=weight))
    return rows


# ---------------------------------------------------------------- section 3.2: is the guided field a gradient?


def antisymmetry(bench, fields, logsnrs, *, n=1000):
    """Return rows of |J - Jᵀ| / |J + Jᵀ| of each field's Jacobian J, root mean squares over z ~ q(z_λ | c).

    fields: {name: (weight, field)}, field(z [B, D], λ [B]) -> [B, D]. It is 0 for the gradient of any function of z.
    The error is the delta method's.
    """
    x = bench.mixture.sample(jax.random.key(bench.seed + 4), n, LABEL)
    noise = jax.random.normal(jax.random.key(bench.seed + 5), x.shape)
    rows = []
    for name, (weight, field) in fields.items():

        @jax.jit
        def squares(logsnr, field=field):
            at_one = lambda z: field(z[None], logsnr[None])[0]  # noqa: E731
            jacobian = jax.vmap(jax.jacfwd(at_one))(diffusion.q_sample(x, noise, logsnr))
            transposed = jacobian.swapaxes(1, 2)
            return ((jacobian - transposed) ** 2).sum((1, 2)), ((jacobian + transposed) ** 2).sum((1, 2))

        for logsnr in logsnrs:
            odd, even = (np.float64(values) for values in squares(jnp.float32(logsnr)))
            ratio = math.sqrt(odd.mean() / even.mean())
            relative = (odd / max(odd.mean(), 1e-300) - even / even.mean()).std() / math.sqrt(n)
            rows.append(row('antisymmetric part', name, ratio, ratio * relative / 2, weight=weight, logsnr=logsnr))
    return rows


def guided_fields(bench, exact, trained, weights: Sequence[float]):
    """Return the fields that `antisymmetry` compares, {name: (weight, eps field)}; exact, trained: `Networks`."""
    null = bench.mixture.null_label

    def free(model, weight):
        return lambda z, at: guidance.classifier_free(model, bench.labels(len(z)), weight, null_label=null)(z, at).eps

    def by_classifier(z, at):
        return sides(bench, trained, weights[-1], bench.labels(len(z)))[1](z, at).eps

    def gradient(z, at):
        return jax.grad(lambda z: trained.log_prob(z, at, bench.labels(len(z))).sum())(z)

    return {
        f'exact, w = {weights[-1]:g}': (weights[-1], free(exact.model, weights[-1])),
        **{f'network, w = {weight:g}': (weight, free(trained.model, weight)) for weight in weights},
        f'unconditional network + classifier, w + 1 = {weights[-1] + 1:g}': (weights[-1], by_classifier),
        "classifier's gradient alone": (1.0, gradient),
    }
