"""The forms of guidance on a mixture: what each draws with exact predictions, against the exact target.

A form is a choice of rule, schedule, interval, weak prediction and momentum (`guidance`). `FORMS` are named after the
fields of config.guidance that choose them. `laboratory` draws what is found here.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import denoisers, guidance, samplers
from cfg_jax.evaluation.experiments import LABEL, against, draw, for_each, row, target_at


class Form(NamedTuple):
    """One form of guidance.

    multiplier: m(u) of w(λ) = w m(u(λ)); None is 1. interval: (least λ, greatest λ) that is guided; None is everywhere.
    weak: 'null' or 'random_label'. own_weight: taken in place of every other w.
    """

    rule: Callable = guidance.RULES['linear']
    multiplier: Callable | None = None
    interval: tuple[float, float] | None = None
    weak: str = 'null'
    momentum: float = 0.0
    own_weight: float | None = None


FORMS = {
    'no guidance': Form(own_weight=0.0),
    **{f'rule={name}': Form(rule) for name, rule in guidance.RULES.items() if name != 'cfgpp'},
    # its λ is 1 + w, in [0, 1]; at every step x moves by all of it, so that many steps need a small one
    'rule=cfgpp, w=-0.9': Form(guidance.RULES['cfgpp'], own_weight=-0.9),
    **{f'schedule={name}': Form(multiplier=m) for name, m in guidance.SCHEDULES.items() if name != 'constant'},
    'interval=(-inf, 0)': Form(interval=(-math.inf, 0.0)),
    'interval=(0, inf)': Form(interval=(0.0, math.inf)),
    'interval=(1, 3)': Form(interval=(1.0, 3.0)),
    'weak=random_label': Form(weak='random_label'),
    'momentum=-0.5': Form(momentum=-0.5),
}


def denoiser(form, bench, labels, weight, keys, *, model=None):
    """Return the denoiser of a form. labels, keys: [B]; weight: scalar or [B]; model: the mixture's own by default."""
    model, null = model or bench.mixture.model, bench.mixture.null_label
    alone = guidance.conditional(model, labels, 0.0, null_label=null)
    if form.own_weight == 0.0:
        return alone
    if form.own_weight is not None:
        weight = form.own_weight
    if form.multiplier is not None:
        grid, u = jnp.asarray(bench.logsnrs, jnp.float32), jnp.linspace(1.0, 0.0, len(bench.logsnrs))
        weight = guidance.scheduled(weight, lambda logsnr: form.multiplier(jnp.interp(logsnr, grid, u)))
    if form.weak == 'random_label':
        pair = guidance.with_random_label(model, labels, keys, num_classes=null)
    else:
        pair = guidance.with_null(model, labels, null_label=null)
    guided = guidance.extrapolate_pair(pair, weight, rule=form.rule, momentum=form.momentum)
    return guidance.interval(guided, alone, *form.interval) if form.interval else guided


def draw_form(bench, form, weights, *, n=None):
    """Draw DDIM samples of a form at each of the weights, float32 [weights, n, D], from the noise of `draw`."""
    n = n or bench.num_samples
    each = jnp.repeat(jnp.asarray(weights, jnp.float32), n)
    keys = samplers.image_keys(bench.seed, jnp.tile(jnp.arange(n), len(weights)))
    return draw(bench, denoiser(form, bench, bench.labels(len(each)), each, keys), n, copies=len(weights))


def evaluations(bench, form):
    """Return how often one sample of a form evaluates the network: for a pair, two at a λ."""
    keys = samplers.image_keys(bench.seed, jnp.arange(1))

    def guided(model):
        return denoiser(form, bench, bench.labels(1), jnp.ones(1), keys, model=model)

    return denoisers.count_evaluations(guided, bench.logsnrs, (bench.mixture.dimensions,))


def compare(bench, weights, forms: Mapping[str, Form] = FORMS, *, target_samples=400_000):
    """Compare what DDIM draws by each form, with exact predictions, with p(x | c) p(c | x)^w.

    Returns (rows, {name: x [weights, n, D]}). Rows are those of `experiments.target_and_yield` with the form as the
    method, and 'share of the class', of the samples whose likeliest class is c, and 'network evaluations' per sample.
    """
    drawn = dict(zip(forms, for_each(lambda form: draw_form(bench, form, weights), forms.values())))
    likeliest = jax.jit(lambda x: jnp.argmax(bench.mixture.log_posterior(x), axis=1) == LABEL)
    costs = {name: evaluations(bench, form) for name, form in forms.items()}
    rows, n = [], bench.num_samples
    for index, weight in enumerate(weights):
        target = target_at(bench, weight, target_samples=target_samples)
        share = target.weighted.mean(jnp.float32(likeliest(target.weighted.x)))
        rows += [*target.rows, row('share of the class', 'target', *share, weight=weight)]
        for name, cost in costs.items():
            x = drawn[name][index]
            share = float(np.mean(likeliest(x)))
            rows += against(bench, target, x, name, weight)
            rows += [
                row('share of the class', name, share, math.sqrt(share * (1.0 - share) / n), weight=weight),
                row('network evaluations', name, cost, weight=weight),
            ]
    return rows, drawn
