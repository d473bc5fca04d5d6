"""The laboratory: its measurements against known answers, and its job, shrunk."""

import csv
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cfg_jax import mixtures, schedules
from cfg_jax.errors import UserError
from cfg_jax.evaluation import experiments, forms
from cfg_jax.evaluation import laboratory as figures
from cfg_jax.evaluation.experiments import Bench, Networks
from cfg_jax.jobs import laboratory
from tests import tiny

STAR = mixtures.star(3, std=0.5)
WEIGHTS = (0.0, 1.0, 4.0)


def bench(mixture=STAR, *, steps=200, n=2000):
    logsnrs = schedules.logsnr_grid(lambda u: schedules.cosine_logsnr(u, logsnr_min=-12.0, logsnr_max=12.0), steps)
    return Bench(mixture, np.asarray(logsnrs), n)


@pytest.fixture(scope='module')
def measured():
    return experiments.target_and_yield(bench(), WEIGHTS, target_samples=100_000)


def value(rows, quantity, method, weight):
    (row,) = [row for row in rows if (row['quantity'], row['method'], row['weight']) == (quantity, method, weight)]
    return row['value'], row.get('error')


@pytest.mark.parametrize('sampler', ['ancestral', 'ddim'])
def test_without_guidance_the_conditional_distribution_is_drawn(measured, sampler):
    """Mean and deviation within 4 standard errors of closed forms, energy distance within 4 of 0."""
    rows, drawn = measured
    mean, covariance = map(np.float64, STAR.moments(experiments.LABEL))
    x = np.float64(drawn[sampler][0])
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 4 * np.sqrt(np.diag(covariance) / len(x)) + 0.002)
    np.testing.assert_allclose(x.std(0), np.sqrt(np.diag(covariance)), rtol=4 / math.sqrt(2 * len(x)) + 0.01)
    distance, error = value(rows, 'energy distance to the target', sampler, 0.0)
    assert abs(distance) < 4 * error


@pytest.mark.parametrize('sampler', ['ancestral', 'ddim'])
@pytest.mark.parametrize('weight', [1.0, 4.0])
def test_guidance_does_not_draw_its_target(measured, sampler, weight):
    """Its samples lie farther from the other classes, and closer together, by far more than the errors."""
    rows, _ = measured
    distance, error = value(rows, 'energy distance to the target', sampler, weight)
    assert distance > 4 * error > 0
    for quantity, sign in (('mean along the axis', 1), ('deviation along the axis', -1)):
        (target, target_error), (found, found_error) = (
            value(rows, quantity, method, weight) for method in ('target', sampler)
        )
        if (sampler, weight, sign) != ('ancestral', 4.0, -1):  # there the deviations are close to each other
            assert sign * (found - target) > 4 * math.hypot(target_error, found_error)


def test_the_targets_numbers_are_an_integrals(measured):
    rows, _ = measured
    grid = experiments.Grid.around(STAR)
    for weight, density in zip(WEIGHTS, experiments.target_densities(bench(), grid, WEIGHTS)):
        marginal = density.sum(axis=1) * (grid.line[1] - grid.line[0]) ** 2
        mean = marginal @ grid.line
        deviation = math.sqrt(marginal @ (grid.line - mean) ** 2)
        for quantity, expected in (('mean along the axis', mean), ('deviation along the axis', deviation)):
            found, error = value(rows, quantity, 'target', weight)
            assert abs(found - expected) < 4 * error + 1e-4


def test_the_energy_distance():
    random = np.random.default_rng(0)
    a, b = np.zeros((1000, 2)), np.stack([np.ones(1000), np.zeros(1000)], axis=1)
    assert experiments.energy_distance(a, b)[0] == pytest.approx(2.0, abs=1e-4)
    one, other = random.standard_normal((2, 3000, 3))
    distance, error = experiments.energy_distance(one, other)
    assert abs(distance) < 4 * error
    # of N(0, 1) and N(1, 1) on a line: 2 E|N(1, 2)| - 2 E|N(0, 2)|
    expected = 2 * (2 / math.sqrt(math.pi) * math.exp(-0.25) + math.erf(0.5)) - 4 / math.sqrt(math.pi)
    distance, error = experiments.energy_distance(one[:, :1], other[:, :1] + 1)
    assert abs(distance - expected) < 4 * error < 0.2


def test_less_noise_scales_the_noise_of_every_step():
    """On eps = 0 a step is linear in its noise: half of the noise goes half of the way."""
    small = bench(steps=6, n=50)
    nothing = lambda z, logsnr: experiments.diffusion.Prediction(0.0 * z)  # noqa: E731
    options = {'sampler': 'ancestral', 'start': (0.0,)}
    full, half, none = (
        experiments.draw(small, nothing, 50, noise=factor, **options) for factor in (None, (0.5,), (0.0,))
    )
    assert np.abs(none).max() < 1e-6 and np.abs(full).max() > 0.1
    np.testing.assert_allclose(half, full / 2, rtol=1e-4, atol=1e-5)


def test_guidance_raises_the_class_with_more_spread_than_the_baselines():
    """At the spread of guidance with w = 1, no baseline is as sure of the class; their log density rises instead."""
    rows, _ = experiments.baselines(bench(mixtures.star(3, radii=(0.35, 0.95, 1.55), std=0.22), steps=64, n=1500))
    curves = {}
    for method, strengths in experiments.BASELINES.items():
        found = {(row['quantity'], row['strength']): row['value'] for row in rows if row['method'] == method}
        curves[method] = [[found[name, strength] for strength in strengths] for name in ('spread', 'class probability')]
    (spread, probability), *others = curves.values()
    for other_spread, other_probability in others:
        assert probability[2] > np.interp(spread[2], other_spread[::-1], other_probability[::-1]) + 0.01


def test_both_sides_of_classifier_guidance_are_the_same_where_all_is_exact():
    exact = Networks(STAR.model, STAR.log_prob)
    crooked = Networks(STAR.model, lambda z, logsnr, labels: 1.5 * STAR.log_prob(z, logsnr, labels))
    models = {'exact': exact, 'crooked': crooked}
    rows = experiments.from_either_side(bench(), models, [-6.0, 0.0, 4.0], 1.0, n=200)
    by_name = {name: [row['value'] for row in rows if row['method'] == name] for name in models}
    assert max(by_name['exact']) < 2e-6 < 1e-3 < max(by_name['crooked'])


def test_the_antisymmetric_part_of_known_fields():
    turn = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
    fields = {'turned': (0.0, lambda z, at: z @ turn.T), 'a gradient': (0.0, lambda z, at: jnp.sin(z))}
    exact = Networks(STAR.model, STAR.log_prob)
    fields |= experiments.guided_fields(bench(), exact, exact, (0.0, 4.0))
    rows = experiments.antisymmetry(bench(), fields, [-3.0, 2.0], n=50)
    for row in rows:
        if row['method'] == 'turned':
            assert row['value'] == pytest.approx(1.0, rel=1e-5) and row['error'] == pytest.approx(0.0, abs=1e-5)
        else:
            assert row['value'] < 2e-6, row['method']


def test_paths_begin_at_the_noise_and_end_at_the_sample():
    z = jax.random.normal(jax.random.key(0), (5, 2))
    small = bench(steps=8)
    seen = experiments.paths(small, STAR.model, 1.0, z)
    assert seen.shape == (9, 5, 2) and np.array_equal(seen[0], z)
    assert np.abs(np.diff(seen, axis=0)).max() > 0.01


# ---------------------------------------------------------------- the forms of guidance


def test_at_no_weight_all_forms_draw_the_same():
    """To the bit, but where the samplers' parts are compiled apart."""
    small = bench(steps=8, n=50)
    plain = forms.draw_form(small, forms.FORMS['no guidance'], (0.0,))
    for name, form in forms.FORMS.items():
        if form.own_weight is None:
            np.testing.assert_allclose(forms.draw_form(small, form, (0.0,)), plain, atol=2e-6, err_msg=name)


def test_the_linear_form_is_classifier_free_guidance():
    small = bench(steps=8, n=50)
    expected = experiments.draw_guided(small, STAR.model, (1.0, 4.0))
    assert np.array_equal(forms.draw_form(small, forms.Form(), (1.0, 4.0)), expected)


def test_the_interval_of_everything_is_no_interval():
    small = bench(steps=8, n=50)
    linear, everywhere = (
        forms.draw_form(small, forms.Form(interval=ends), (2.0,)) for ends in (None, (-math.inf, math.inf))
    )
    assert np.array_equal(linear, everywhere)


def test_a_random_label_changes_nothing_where_there_is_one_class():
    alone = bench(mixtures.star(1, std=0.5), steps=8, n=50)
    drawn = [forms.draw_form(alone, forms.FORMS[name], (2.0,)) for name in ('weak=random_label', 'no guidance')]
    np.testing.assert_allclose(*drawn, atol=3e-5)


def test_a_random_label_shifts_a_round_class():
    """E[x | z, c] of alike round classes differ by as much as their means, at every z: DDIM adds w times that."""
    small = bench(n=300)
    for_both = [forms.draw_form(small, forms.FORMS['weak=random_label'], (w,))[0] for w in (0.0, 1.0)]
    np.testing.assert_allclose(np.mean(for_both[1] - for_both[0], axis=0), [0.0, 1.0], atol=0.05)


def test_the_evaluations_of_a_form():
    small = bench(steps=9)  # λ = 0 is the fifth
    expected = {'no guidance': 9, 'rule=linear': 18, 'momentum=-0.5': 18, 'interval=(0, inf)': 14}
    assert {name: forms.evaluations(small, forms.FORMS[name]) for name in expected} == expected


def test_forms_are_compared_with_the_target():
    chosen = {name: forms.FORMS[name] for name in ('no guidance', 'rule=linear', 'interval=(1, 3)')}
    rows, drawn = forms.compare(bench(steps=64), (0.0, 4.0), chosen, target_samples=50_000)
    assert drawn['rule=linear'].shape == (2, 2000, 2)
    for name in chosen:
        distance, error = value(rows, 'energy distance to the target', name, 0.0)
        assert abs(distance) < 4 * error
    distances = {name: value(rows, 'energy distance to the target', name, 4.0)[0] for name in chosen}
    assert distances['interval=(1, 3)'] < distances['no guidance'] < 0.1 < distances['rule=linear']
    (share, error), (expected, _) = (value(rows, 'share of the class', name, 0.0) for name in ('no guidance', 'target'))
    assert abs(share - expected) < 4 * error < 0.05
    assert value(rows, 'network evaluations', 'rule=linear', 4.0)[0] == 128


# ---------------------------------------------------------------- how fast solvers converge


def test_solvers_converge_at_their_order():
    rows = experiments.solvers(bench(), steps=(32, 64), reference_steps=512, n=100)
    slopes = {(row['quantity'], row['method']): row['value'] for row in rows if 'steps' not in row}
    assert -1.3 < slopes['slope over steps', 'ddim'] < -0.8
    assert -2.4 < slopes['slope over steps', 'dpmpp_2m'] < -1.7
    assert -2.4 < slopes['slope over steps', 'heun'] < -1.7
    assert slopes['slope over calls', 'heun'] == pytest.approx(slopes['slope over steps', 'heun'], abs=0.05)
    assert slopes['slope over steps', 'unipc_2'] < -2.0
    calls = {(row['method'], row['steps']): row['value'] for row in rows if row['quantity'] == 'calls of the denoiser'}
    assert calls['ddim', 64] == 64 and calls['heun', 64] == 127


# ---------------------------------------------------------------- the job and its figures

CHANGES = {
    'laboratory__num_samples': 200,
    'laboratory__target_samples': 2000,
    'laboratory__train_steps': 20,
    'laboratory__batch_size': 32,
    'laboratory__width': 8,
    'laboratory__weights': (0.0, 1.0),
    'sample__num_steps': 4,
}


def config(**changes):
    found = tiny.load_config('mixture2d')
    with found.unlocked():
        found.update_from_flattened_dict({key.replace('__', '.'): v for key, v in {**CHANGES, **changes}.items()})
    return found


def test_every_figure_is_drawn():
    """Of numbers drawn at random, as many as a figure needs."""
    random, grid = np.random.default_rng(0), experiments.Grid.around(STAR, num_points=40)
    density = np.exp(-((grid.points.reshape(40, 40, 2) - [0, 1]) ** 2).sum(-1))
    few, x = np.stack([density] * 2), random.standard_normal((2, 50, 2))
    rows = [
        {'quantity': quantity, 'method': method, 'weight': at, 'logsnr': at, 'value': value, 'error': 0.1}
        for quantity in ('mean along the axis', 'deviation along the axis', 'energy distance to the target',
                         'relative difference of eps', 'antisymmetric part')
        for method in ('target', 'ddim') for at, value in ((0.0, 0.0), (1.0, 1e-3))
    ]  # fmt: skip
    strengths = {name: values[:2] for name, values in experiments.BASELINES.items()}
    by_strength = [
        {'quantity': quantity, 'method': method, 'strength': strength, 'value': 0.5 + 0.1 * number, 'error': 0.01}
        for quantity in ('spread', 'class probability')
        for method, values in strengths.items() for number, strength in enumerate(values)
    ]  # fmt: skip
    distance = {'quantity': 'energy distance to the target', 'error': 0.01}
    by_form = [
        distance | {'method': name, 'weight': weight, 'value': 10.0**-n}
        for n, name in enumerate(forms.FORMS) for weight in (1.0, 4.0)
    ]  # fmt: skip
    by_steps = [
        {'quantity': quantity, 'method': method, 'steps': steps, 'value': 1 / steps, 'error': 0.0}
        for quantity in ('error of x', 'calls of the denoiser')
        for method in (*experiments.SOLVERS, 'float32') for steps in (8, 16)
    ] + [{'quantity': 'slope over steps', 'method': 'ddim', 'value': -1.0}]  # fmt: skip
    by_method = dict.fromkeys(strengths, x)
    path = random.standard_normal((6, 5, 2))
    drawn = {
        'densities': figures.densities_and_clouds(grid, few[:, None], x[:, None], (0.0, 1.0)),
        'fields': figures.fields_and_paths(
            grid, (-1.0, 0.0, 1.0), few[[0, 1, 0]], x[0], x[[0, 1, 0]], dict.fromkeys((0, 1, 2), path), weight=1.0
        ),
        'target': figures.target_and_yield(grid, few, {'ancestral': x, 'ddim': x}, (0.0, 1.0)),
        'difference': figures.difference(rows),
        'forms': figures.forms(grid, density, by_form, dict.fromkeys(forms.FORMS, x)),
        'solvers': figures.solvers(by_steps),
        'either_side': figures.either_side(rows[12:16], x, weight=1.0),
        'baselines': figures.baselines(grid, density, by_strength, by_method, strengths, shown=1),
        'antisymmetry': figures.antisymmetry(rows[16:]),
    }
    for name, picture in drawn.items():
        assert Image.open(io.BytesIO(picture.png)).width == 680 * 130 // 72, name
        assert 'nan' not in picture.svg.lower().split('<defs>')[0] and picture.svg.endswith('</svg>\n'), name


@pytest.mark.slow
def test_the_job_writes_every_figure_and_number(tmp_path, capsys):
    rows = laboratory.run(config(), tmp_path)
    names = {
        'densities',
        'fields',
        'target',
        'difference',
        'forms',
        'solvers',
        'baselines',
        'either_side',
        'antisymmetry',
    }
    expected = {f'{name}.{suffix}' for name in names for suffix in ('png', 'svg')}
    assert {path.name for path in tmp_path.iterdir()} == expected | {'laboratory.csv', 'laboratory.json'}
    saved = json.loads((tmp_path / 'laboratory.json').read_text())
    assert saved['laboratory']['num_samples'] == 200 and len(saved['rows']) == len(rows) > 50
    table = list(csv.DictReader((tmp_path / 'laboratory.csv').open()))
    assert len(table) == len(rows) and all(math.isfinite(float(row['value'])) for row in table)
    assert 'wrote 9 figures' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('field', 'wrong'),
    [('std', 0.0), ('radius', math.inf), ('weights', ()), ('weights', (1.0, 0.5)), ('weights', (-1.0,)),
     ('weights', (0.0, math.inf)), ('num_samples', 10)],
)  # fmt: skip
def test_a_wrong_setting_is_named(field, wrong, tmp_path):
    with pytest.raises(UserError, match=rf'config\.laboratory\.{field} is .*; it must be'):
        laboratory.run(config(**{f'laboratory__{field}': wrong}), tmp_path)
