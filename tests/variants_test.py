"""The comparison of variants in one evaluation: the file, the checks, and whole jobs on an untrained network."""

import csv
import re

import jax
import numpy as np
import pytest

from cfg_jax import build, build_sampling, guidance, trained
from cfg_jax.errors import UserError
from cfg_jax.jobs import evaluate
from cfg_jax.jobs.evaluate import curves, searching, variants
from cfg_jax.sampling.sample_sets import SampleSet
from tests import tiny

SHIPPED = tiny.ROOT / 'configs' / 'variants' / 'guidance.py'


def config_of(folder, text, **changes):
    """The tiny config with the variants of a file of this text."""
    path = folder / 'variants.py'
    path.write_text(text)
    return tiny.config(eval__variants=str(path), eval__judge_steps=20, **changes)


def test_the_shipped_variants_fit_the_digits():
    config = tiny.load_config('digits')
    config.eval.variants = str(SHIPPED)
    every = curves.curves(config)
    assert len(every) >= 12 and every[0].overrides == '' and every[0].suffix == '_CFG'
    guided = [curve.config.guidance for curve in every]
    assert {each.rule for each in guided} == set(guidance.RULES)
    assert {each.weak for each in guided} == set(build_sampling.WEAK) - {'null'}
    assert 'python -m cfg_jax.main' in SHIPPED.read_text() and 'Cost:' in SHIPPED.read_text()


def test_each_variant_is_swept_over_its_own_weights_or_the_configs(tmp_path):
    text = "VARIANTS = {'plain': {}, 'few': {'eval.guidance_weights': (2.0, 1), 'sample.eta': 1}}"
    plain, few = curves.curves(config_of(tmp_path, text))
    assert [point.name for point in curves.sweep(plain.config)[0]] == ['w=0', 'w=1']
    assert [point.name for point in curves.sweep(few.config)[0]] == ['w=1', 'w=2']
    assert few.config.sample.eta == 1.0 and few.config.eval.variants == ''
    assert few.overrides == 'eval.guidance_weights=(2.0, 1), sample.eta=1'


BAD = {
    'no dict': ('VARIANTS = [1]', r'VARIANTS is a list; it must be a dict'),
    'none': ('OTHERS = {}', r'VARIANTS is missing; it must be a dict'),
    'empty': ('VARIANTS = {}', r'VARIANTS is empty; give at least one variant'),
    'syntax': ('VARIANTS = {\n"a": }', r'variants\.py, line 2: SyntaxError: .*\(config\.eval\.variants\)'),
    'an error in it': ('import nowhere_at_all', r"ModuleNotFoundError: No module named 'nowhere_at_all'"),
    'a number for a name': ('VARIANTS = {3: {}}', r'the name of a variant is 3; it must be a text'),
    'a name with a slash': ('VARIANTS = {"a/b": {}}', r"the name of a variant is 'a/b'; .* without / and"),
    'a name of two lines': (r'VARIANTS = {"a\nb": {}}', r"the name of a variant is 'a\\nb'"),
    'no name': ('VARIANTS = {"": {}}', r"the name of a variant is ''"),
    'a name that is too long': ('VARIANTS = {"é" * 41: {}}', r'a text of up to 80 bytes'),
    'a space at its end': ('VARIANTS = {"a ": {}}', r"the name of a variant is 'a '"),
    'names of one file': ('VARIANTS = {"a b": {}, "A_b": {}}', r"variants 'a b' and 'A_b' would have the same file"),
    'no changes': ('VARIANTS = {"a": None}', r"variant 'a' is None; it must be a dict"),
    'an unknown field': (
        'VARIANTS = {"a": {"sample.num_step": 3}}',
        r"variant 'a': unknown config field 'sample\.num_step'; did you mean 'sample\.num_steps'\?",
    ),
    'a field that is a number': ('VARIANTS = {"a": {3: 3}}', r"variant 'a': unknown config field 3; did you mean"),
    'a section': ('VARIANTS = {"a": {"sample": 3}}', r"unknown config field 'sample'; did you mean"),
    'the data': ('VARIANTS = {"a": {"data.image_size": 16}}', r'data\.image_size may not vary; allowed: fields'),
    'the model': ('VARIANTS = {"a": {"model.channels": 16}}', r'config\.model\.channels may not vary'),
    'the seed': ('VARIANTS = {"a": {"sample.seed": 3}}', r'config\.sample\.seed may not vary'),
    'the judge': ('VARIANTS = {"a": {"eval.judge": "digits"}}', r'config\.eval\.judge may not vary'),
    'a float of steps': (
        'VARIANTS = {"a": {"sample.num_steps": 8.0}}',
        r"variant 'a': config\.sample\.num_steps is 8\.0; it must be a whole number",
    ),
    'a text of eta': ('VARIANTS = {"a": {"sample.eta": "1"}}', r"config\.sample\.eta is '1'; it must be a number"),
    'True steps': ('VARIANTS = {"a": {"sample.num_steps": True}}', r'num_steps is True; it must be a whole number'),
    'None steps': ('VARIANTS = {"a": {"sample.num_steps": None}}', r'num_steps is None; it must be a whole number'),
    'a text of a placeholder': ('VARIANTS = {"a": {"sample.guidance_weight": "1"}}', r"weight is '1'; .* a number"),
    'a number of weights': ('VARIANTS = {"a": {"eval.guidance_weights": 1.0}}', r'weights is 1\.0; .* a tuple'),
    'texts of weights': ('VARIANTS = {"a": {"eval.guidance_weights": ("x",)}}', r"variant 'a' .*weights=\('x',\)"),
    'no weights': ('VARIANTS = {"a": {"eval.guidance_weights": ()}}', r"variant 'a': config\.eval\.guidance"),
    'a value that is refused': (
        'VARIANTS = {"good": {}, "bad one": {"sample.eta": 2.0}}',
        r"^variant 'bad one': config\.sample\.eta is 2\.0; it must be between 0 and 1",
    ),
    'an unknown sampler': ('VARIANTS = {"a": {"sample.sampler": "euler"}}', r"variant 'a': config\.sample\.sampler is"),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
def test_bad_variants_are_one_line_before_anything_is_read(tmp_path, case):
    text, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        evaluate.run(config_of(tmp_path, text), tmp_path / 'run')
    assert '\n' not in str(caught.value) and not (tmp_path / 'run').exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r'there is no file /nowhere\.py; .*config\.eval\.variants'):
        variants.read_variants(tiny.config(eval__variants='/nowhere.py'))


@pytest.mark.parametrize(
    ('field', 'value'),
    [('samplers', ('ddim',)), ('num_steps', (3,)), ('samples', 'a.npz'), ('compare_with', '.'), ('bits_per_dim', True)],
)
def test_other_choices_of_curves_are_refused(tmp_path, field, value):
    config = config_of(tmp_path, 'VARIANTS = {"a": {}}', **{f'eval__{field}': value})
    message = rf'config\.eval\.variants and config\.eval\.{field} \({re.escape(repr(value))}\) are both set'
    with pytest.raises(UserError, match=message):
        evaluate.run(config, tmp_path / 'run')


@pytest.mark.parametrize('intervals', [3 * ((1.0, 0.0),), ((0.0,),), ((0.0, float('inf')),), (0.0, 1.0), (('a', 'b'),)])
def test_intervals_that_cannot_be(tmp_path, intervals):
    config = tiny.config(eval__search=True, eval__search_intervals=intervals)
    with pytest.raises(UserError, match=r'config\.eval\.search_intervals is .*; it must be a tuple of pairs'):
        evaluate.run(config, tmp_path / 'run')


def test_settings_of_a_search_that_cannot_be(tmp_path):
    for changes, message in (
        ({'eval__search_intervals': ((0.0, 1.0),)}, r'\(\) unless config\.eval\.search is set'),
        ({'eval__search': True, 'eval__search_samples': 3}, r'search_samples is 3; it must be above .*nearest_k, 3'),
        ({'eval__search_rounds': -1}, r'search_rounds is -1; it must be at least 0'),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.run(tiny.config(**changes), tmp_path / 'run')


def test_a_curve_that_refuses_all_intervals_keeps_its_own(monkeypatch):
    def refuse(config):
        interval, guided = config.guidance.interval, config.guidance.function != 'conditional'
        if (interval and not guided) or 9.0 in interval:
            raise UserError(f'config.guidance.interval is {interval}.')

    monkeypatch.setattr(searching, 'check_config', refuse)
    free, plain = (
        curves.Curve(tiny.config(guidance__function=name, eval__search=True), variant=name)
        for name in ('classifier_free', 'conditional')
    )
    for curve in (free, plain):
        curve.config.eval.search_intervals = ((), (-1.0, 1.0), (-2.0, 2.0))
    assert searching.intervals(free.config) == (((), (-1.0, 1.0), (-2.0, 2.0)), None)
    kept, refusal = searching.intervals(plain.config)
    assert kept == ((),) and 'interval is (-1.0, 1.0)' in str(refusal)
    searching.check_curves([free, plain])
    with pytest.raises(UserError, match=r'interval is \(-1\.0, 1\.0\)\. It is one of config\.eval\.search_intervals'):
        searching.check_curves([plain])
    free.config.eval.search_intervals = ((-1.0, 1.0), (-2.0, 9.0))
    with pytest.raises(UserError, match=r"variant 'classifier_free': .*interval is \(-2\.0, 9\.0\)\. It is one of"):
        searching.check_curves([free, plain])


def test_a_variant_brings_its_own_networks(monkeypatch):
    """A classifier that two variants name is loaded once, and the variant between them has none."""
    loaded, names = [], ('0', '1')

    def load_classifier(config, mesh=None):
        workdir = config.guidance.classifier_workdir
        if workdir:
            loaded.append(workdir)
        return trained.Trained(config, None, 1, names, workdir, workdir=workdir) if workdir else None

    monkeypatch.setattr(trained, 'load_classifier', load_classifier)
    base = trained.Trained(tiny.config(), None, 1, names, 'a')
    every = [curves.Curve(tiny.config(guidance__classifier_workdir=workdir)) for workdir in ('', 'c', '', 'c', 'd')]
    found = list(curves.models(every, base))
    assert [model.classifier and model.classifier.digest for model in found] == [None, 'c', None, 'c', 'd']
    assert loaded == ['c', 'd'] and all(model.config is curve.config for model, curve in zip(found, every))


# ---------------------------------------------------------------- whole jobs

TWO = "VARIANTS = {'plain': {}, 'ddim 2': {'sample.sampler': 'ddim', 'sample.num_steps': 2}}"


@pytest.fixture(scope='module')
def untrained():
    """A network of random parameters, as `trained.load_alone` would give it."""
    config, random = tiny.config(), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    params = jax.device_put(jax.tree.map(lambda leaf: np.float32(0.1 * random.standard_normal(leaf.shape)), shapes))
    return lambda config, workdir, **_: trained.Trained(config, params, 4, tuple('0123456789'), 'a')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp('variants')


@pytest.fixture
def loaded(untrained, monkeypatch):
    monkeypatch.setattr(trained, 'load_alone', untrained)
    monkeypatch.setattr(trained, 'check_there', lambda *_, **__: None)


def shards(workdir):
    return {path: path.stat().st_mtime_ns for path in (workdir / 'sample_sets').rglob('shard_*.npz')}


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_killed_comparison_resumes_and_ranks_two_variants(loaded, workdir, monkeypatch, capsys):
    draw, drawn = SampleSet.draw, []

    def dying(images, draw_units, name, missing=None):
        drawn.append(name)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        draw(images, draw_units, name, missing)

    monkeypatch.setattr(SampleSet, 'draw', dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config_of(workdir, TWO), workdir)
    monkeypatch.setattr(SampleSet, 'draw', draw)
    assert drawn == ['w=0', 'w=1'] * 2
    before = shards(workdir)
    assert len(before) == 3 and not (workdir / 'ranking.csv').exists()

    rows = evaluate.run(config_of(workdir, TWO), workdir)
    assert len(shards(workdir)) == 4 and before.items() <= shards(workdir).items()
    assert [(row['variant'], row['guidance_weight'], row['num_steps']) for row in rows] == [
        *(('plain', 0, 3), ('plain', 1, 3), ('ddim 2', 0, 2), ('ddim 2', 1, 2)),
    ]
    for name in ('tradeoff.csv', 'costs.csv', 'results.csv'):
        assert [row['variant'] for row in table(workdir / name)] == ['plain'] * 2 + ['ddim 2'] * 2, name
    assert table(workdir / 'results.csv')[3]['overrides'] == 'sample.sampler=ddim, sample.num_steps=2'
    pictures = {f'samples_{variant}_w{w}.png' for variant in ('plain', 'ddim_2') for w in (0, 1)}
    pictures |= {'tradeoff_plain.png', 'tradeoff_ddim_2.png', 'samples_ddim_2_over_w.png', 'variants.png'}
    assert pictures <= {path.name for path in workdir.iterdir()}

    ranked = table(workdir / 'ranking.csv')
    best = {name: min((row for row in rows if row['variant'] == name), key=lambda row: row['fid']) for name in
            ('plain', 'ddim 2')}  # fmt: skip
    order = sorted(best, key=lambda name: best[name]['fid'])
    assert [(row['rank'], row['variant']) for row in ranked] == [('1', order[0]), ('2', order[1])]
    for row in ranked:
        for key in ('fid', 'fid_error', 'guidance_weight', 'precision', 'recall', 'network_evaluations'):
            assert float(row[key]) == pytest.approx(best[row['variant']][key], rel=1e-5), key
    difference = np.hypot(*(float(row['fid_error']) for row in ranked))
    close = float(ranked[1]['fid']) - float(ranked[0]['fid']) <= 2 * difference
    assert [row['tie'] for row in ranked] == ['first', 'yes' if close else 'no']
    out = capsys.readouterr().out
    assert 'variant 2 of 2: ddim 2\n' in out and f'\n1  {order[0]}' in out
    page = (workdir / 'report.html').read_text()
    assert page.index('id="ranking"') < page.index('id="curves"') and page.count('<li data-curve=') == 2


def test_the_same_comparison_again_draws_nothing(loaded, workdir, capsys):
    before = shards(workdir)
    evaluate.run(config_of(workdir, TWO), workdir)
    assert shards(workdir) == before and 'images/s' not in capsys.readouterr().out
    assert len(table(workdir / 'results.csv')) == 4


def test_a_search_confirms_its_best_points_with_other_images(loaded, workdir, capsys):
    found = {'eval__search': True, 'eval__search_samples': 30, 'eval__search_rounds': 1, 'eval__folder': 'search'}
    rows = evaluate.run(config_of(workdir, TWO, **found), workdir)
    tried, ranked = table(workdir / 'search' / 'search.csv'), table(workdir / 'search' / 'ranking.csv')
    for name in ('plain', 'ddim 2'):
        of_name = [row for row in tried if row['variant'] == name]
        assert [float(row['guidance_weight']) for row in of_name] == [0, 1, 0.5]  # two weights, then between them
        assert [row['round'] for row in of_name] == ['0', '0', '1']
        assert {(row['seed'], row['num_samples']) for row in of_name} == {('0', '30')}
        best = min(of_name, key=lambda row: float(row['fid']))
        (row,) = (row for row in ranked if row['variant'] == name)
        assert (row['search_fid'], row['guidance_weight']) == (best['fid'], best['guidance_weight'])
        assert row['num_samples'] == '40' and row['fid'] != best['fid']
    assert [(row['seed'], row['num_samples']) for row in rows] == [(1, 40)] * 2
    hashes = {row['samples_sha256'] for row in rows}
    assert not hashes & {row['samples_sha256'] for row in tried}
    assert 'in the search\n' in capsys.readouterr().out
    assert 'other samples measured it again' in (workdir / 'search' / 'report.html').read_text()


def test_a_search_tries_intervals_where_there_is_guidance(loaded, workdir):
    found = {'eval__search': True, 'eval__search_samples': 30, 'eval__search_rounds': 0, 'eval__folder': 'interval'}
    text = "VARIANTS = {'plain': {}}"
    evaluate.run(config_of(workdir, text, **found, eval__search_intervals=((), (-5.0, 5.0))), workdir)
    tried = table(workdir / 'interval' / 'search.csv')
    assert [(row['guidance_weight'], row['interval']) for row in tried] == [('0', ''), ('1', ''), ('1', 'from -5 to 5')]
