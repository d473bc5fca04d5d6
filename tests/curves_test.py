"""Curves over checkpoints, averages and intervals, and several judges: whole jobs on a network of four steps."""

import csv

import numpy as np
import pytest
from PIL import Image

from cfg_jax import trained
from cfg_jax.errors import UserError
from cfg_jax.evaluation import figures, scoring
from cfg_jax.jobs import evaluate, train
from cfg_jax.jobs.evaluate import curves
from tests import tiny


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('curves')
    train.run(tiny.config(), workdir)
    return workdir


def config(**changes):
    return tiny.config(eval__judge_steps=20, **changes)


def table(path):
    return list(csv.DictReader(path.open()))


def test_checkpoints_with_and_without_average_are_curves_and_a_map(workdir, capsys):
    rows = evaluate.run(config(eval__folder='steps', eval__steps=(4, 2), eval__ema=(True, False)), workdir)
    names = ['step 4, EMA', 'step 4, parameters', 'step 2, EMA', 'step 2, parameters']
    assert [row['variant'] for row in rows[::2]] == names
    assert [(row['step'], row['parameters']) for row in rows[::2]] == [(4, 'ema'), (4, 'raw'), (2, 'ema'), (2, 'raw')]
    assert len({row['model_sha256'] for row in rows}) == 4 and len({row['samples_sha256'] for row in rows}) == 8
    out = capsys.readouterr().out
    assert 'variant 4 of 4: step 2, parameters' in out and 'checkpoints/2' in out
    assert not (workdir / 'steps' / 'fid_map.png').exists()  # two things differ
    assert {row['variant'] for row in table(workdir / 'steps' / 'ranking.csv')} == set(names)
    sets = {path.name for path in (workdir / 'sample_sets').iterdir()}
    capsys.readouterr()
    alone = evaluate.run(config(eval__folder='alone', eval__steps=(2, 4)), workdir)
    assert 'drawing again' not in capsys.readouterr().out
    assert {path.name for path in (workdir / 'sample_sets').iterdir()} == sets
    # the same images and numbers, in the order of the steps
    assert [row['fid'] for row in alone] == [row['fid'] for row in (*rows[4:6], *rows[:2])]
    assert Image.open(workdir / 'alone' / 'fid_map.png').width > 300


def test_intervals_are_curves(workdir):
    rows = evaluate.run(config(eval__folder='intervals', eval__intervals=((), (-1.0, 3.0))), workdir)
    assert [row['variant'] for row in rows[::2]] == ['no interval', 'interval -1 to 3']
    assert [row['interval'] for row in rows] == ['', '', 'from -1 to 3', 'from -1 to 3']
    free, within = rows[:2], rows[2:]
    assert free[0]['samples_sha256'] == within[0]['samples_sha256']  # w = 0
    assert free[1]['network_evaluations'] > within[1]['network_evaluations']
    assert (workdir / 'intervals' / 'fid_map.png').exists()


def test_a_step_that_there_is_not(workdir):
    with pytest.raises(UserError, match=r'^no checkpoint of step 3 in .*; there are 4, 2\.'):
        evaluate.run(config(eval__folder='none', eval__steps=(2, 3)), workdir)
    assert not (workdir / 'none').exists()


def test_a_weight_that_has_no_bound_is_an_error_before_the_others_are_measured(workdir, capsys):
    guided = {'guidance__rule': 'apg', 'guidance__momentum': -0.5, 'eval__bound_weights': (0.0, 1.0)}
    with pytest.raises(UserError, match=r'with a momentum or a weak checkpoint'):
        evaluate.run(config(eval__folder='bound', eval__bits_per_dim=True, **guided), workdir)
    assert 'bits per dim' not in capsys.readouterr().out and not (workdir / 'bound').exists()


def test_checkpoints_share_their_weak_model(workdir, capsys):
    weak = {'guidance__weak': 'checkpoint', 'guidance__weak_step': 2, 'eval__steps': (4, 2)}
    every = curves.curves(config(**weak, eval__ema=(True, False)))
    model = trained.load(config(**weak), workdir)
    capsys.readouterr()
    curves.check_models(every[:2], model)
    assert not capsys.readouterr().out
    found = list(curves.models(every[:2], model))
    assert [each.weak for each in found] == [model.weak] * 2 and capsys.readouterr().out.count('loaded') == 1
    for refused in (curves.check_models, lambda *arguments: list(curves.models(*arguments))):
        with pytest.raises(UserError, match='has the parameters of the model itself, step 2,'):
            refused(every, model)


def test_the_curves_whose_weak_model_is_the_model_are_left_out():
    def left(**changes):
        both = {'eval__ema': (0.05, 0.1), 'eval__weak_ema': (0.05, 0.1), 'guidance__weak': 'checkpoint'}
        found = curves.that_guide(curves.curves(config(**both | changes)), 80)
        return [(curve.step, curve.ema, curve.config.guidance.weak_ema) for curve in found]

    pairs = [(0.05, 0.1), (0.1, 0.05)]
    every = [(0.05, 0.05), (0.05, 0.1), (0.1, 0.05), (0.1, 0.1)]
    assert left() == left(guidance__weak_step=80) == [(None, *pair) for pair in pairs]
    assert left(guidance__weak_conditional=False) == left(guidance__weak_step=40) == [(None, *pair) for pair in every]
    assert left(eval__steps=(40, 80)) == [(40, *pair) for pair in every] + [(80, *pair) for pair in pairs]
    assert left(eval__weak_ema=(True,), eval__ema=(0.05, True)) == [(None, 0.05, True)]
    with pytest.raises(UserError, match=r'config\.eval\.weak_ema is \(0\.05,\), the parameters of the model itself'):
        left(eval__ema=(0.05,), eval__weak_ema=(0.05,))


@pytest.mark.parametrize(
    ('ema', 'weak_ema', 'wanted'),
    [
        ((0.05, 0.1), (), ('ema_length',)),
        ((True, 0.05, 0.1), (), ('ema_length',)),
        ((True, 0.05), (), ()),
        ((0.05,), (0.05, 0.1), ('weak_ema_length',)),
        ((0.05, 0.1), (0.05, 0.1, False), ('ema_length', 'weak_ema_length')),
        ((0.05, 0.1), (False, 0.2), ()),  # one line through both would join different curves
        ((True, False), (0.05, 0.1), ()),
    ],
)
def test_fid_is_drawn_over_lengths_where_they_alone_vary(ema, weak_ema, wanted):
    assert curves.over_ema(config(eval__ema=ema, eval__weak_ema=weak_ema)) == wanted


SNAPSHOTS = {'optim__ema_lengths': (0.05, 0.1), 'optim__ema_snapshot_every': 10}
RUN = {'train__num_steps': 80, 'train__checkpoint_every': 20, 'train__keep_every': 40, 'train__keep_checkpoints': 1}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'eval__steps': (40, 80)}, ''),
        ({'eval__steps': (20, 80)}, r'no checkpoint of step 20 \(config\.eval\.steps\) .* it keeps 40, 80 \('),
        ({'eval__ema': (0.07,), **SNAPSHOTS}, ''),
        ({'eval__ema': (0.07,)}, r'no snapshot of step 80 .* length 0\.07 of \(config\.eval\.ema\)'),
        ({'eval__ema': (0.07,), 'eval__steps': (40,), **SNAPSHOTS}, ''),
        ({'eval__ema': (0.001,), **SNAPSHOTS}, r'0\.001 cannot be made of the 8 snapshots up to step 80; usable'),
        ({'guidance__weak': 'checkpoint', 'guidance__weak_step': 40}, ''),
        ({'guidance__weak': 'checkpoint', 'guidance__weak_step': 60}, r'step 60 \(config\.guidance\.weak_step\)'),
        (
            {'guidance__weak': 'checkpoint', 'guidance__weak_ema': 0.1},
            r'guidance\.weak_ema\); set config\.optim',
        ),
        ({'guidance__weak': 'checkpoint', 'guidance__weak_workdir': '/nowhere'}, r'^no checkpoint in /nowhere/check'),
        ({'guidance__classifier_workdir': '/nowhere'}, r'^no checkpoint in /nowhere/checkpoints'),
        ({'eval__variants': 'nowhere.py'}, r'^there is no file nowhere\.py'),
    ],
)
def test_what_an_evaluation_at_the_end_needs_is_asked_before_training(tmp_path, changes, message):
    every = config(**RUN | changes)
    if message:
        with pytest.raises(UserError, match=message):
            evaluate.check_to_come(every, tmp_path)
    else:
        evaluate.check_to_come(every, tmp_path)
    (tmp_path / 'checkpoints' / '20').mkdir(parents=True)  # of an earlier run with other settings
    evaluate.check_to_come(config(**RUN, eval__steps=(20,)), tmp_path)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'eval__steps': (2.5,)}, r'eval\.steps is \(2\.5,\); it must be a tuple of training steps'),
        ({'eval__ema': ()}, r'eval\.ema is \(\); it must be a tuple of different values, each True, False or'),
        ({'eval__intervals': ((3.0, 1.0),)}, r'eval\.intervals is .*; it must be a tuple of pairs'),
        ({'eval__intervals': ((-99.0, 1.0),)}, r'guidance\.interval is .*It is one of config\.eval\.intervals\.$'),
        ({'eval__steps': (2,), 'eval__samplers': ('ddim',)}, r'eval\.samplers is .*; it must be \(\) because'),
        ({'eval__steps': (2,), 'eval__samples': 'a.npz'}, r"eval\.samples is 'a\.npz'; it must be '' because"),
        ({'eval__ema': (False,), 'eval__bits_per_dim': True}, r'eval\.bits_per_dim is True; it must be False because'),
        ({'eval__intervals': ((),), 'eval__compare_with': 'b'}, r"eval\.compare_with is 'b'; it must be '' because"),
        (
            {'eval__intervals': ((),), 'eval__search': True, 'eval__search_intervals': ((),)},
            r'eval\.search_intervals is .*; it must be \(\) because',
        ),
        ({'eval__judge': 'digits'}, r"eval\.judge is 'digits'; the judge 'digits' is called 'trained' now"),
        ({'eval__judge': 'trained,nobody'}, r"eval\.judge is 'trained,nobody'; allowed: 'dinov2', .* or several"),
        (
            {'eval__judge': 'trained,trained'},
            r"eval\.judge is 'trained,trained'; it must be a text that names each judge once",
        ),
        ({'eval__judge': 'trained,lite0', 'eval__reference': 'a.npz'}, r"eval\.reference is 'a\.npz'; it must be ''"),
    ],
)
def test_choices_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf'^config\.{message}'):
        evaluate.run(config(**changes), tmp_path)


# the weights file has to exist
TWO_JUDGES = {'eval__judge': 'trained,inception', 'eval__inception_weights': __file__}


@pytest.fixture
def two_judges(monkeypatch):
    """The name 'inception' stands for the trained judge with features twice as large; 'read' counts images."""
    opened, seen = scoring.open_judge, []

    def open_judge(name, data, num_classes, **settings):
        judge = opened('trained', data, num_classes, **settings)
        if name == 'trained':
            return judge

        def apply(images):
            seen.append(len(images))
            outputs = judge.apply(images)
            return outputs._replace(features=2 * outputs.features)

        return judge._replace(name=name, identity=f'{name}:1', apply=apply, classes_are_labels=False, confusion=None)

    monkeypatch.setattr(scoring, 'open_judge', open_judge)
    return seen


def test_two_judges_look_at_the_same_images(workdir, two_judges, capsys):
    rows = evaluate.run(config(eval__folder='two', **TWO_JUDGES), workdir)
    trained, inception = rows[:2], rows[2:]
    assert [row['judge'].partition(':')[0] for row in rows] == 2 * ['trained'] + 2 * ['inception']
    np.testing.assert_allclose([row['fid'] for row in inception], [4 * row['fid'] for row in trained], rtol=1e-4)
    assert [row['samples_sha256'] for row in inception] == [row['samples_sha256'] for row in trained]
    assert trained[0]['folder'] == 'two' and inception[0]['folder'] == 'two/inception'
    assert 'w=0    inception  FID' in capsys.readouterr().out
    for folder in ('two', 'two/inception'):
        assert len(table(workdir / folder / 'tradeoff.csv')) == 2 and (workdir / folder / 'report.html').exists()
    assert (workdir / 'two' / 'confusion.png').exists() and (workdir / 'two' / 'accuracy_by_class.csv').exists()
    assert not (workdir / 'two' / 'inception' / 'confusion.png').exists()


def test_two_judges_of_given_images(workdir, two_judges, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), np.uint8)
    np.savez(tmp_path / 'given.npz', arr_0=images)
    given = config(**TWO_JUDGES, eval__samples=str(tmp_path / 'given.npz'))
    rows = evaluate.run(given, tmp_path)
    assert len(rows) == 2 and rows[1]['fid'] == pytest.approx(4 * rows[0]['fid'], rel=1e-4)
    assert (tmp_path / 'inception' / 'samples_report.html').exists()
    assert len(table(tmp_path / 'results.csv')) == 2


def test_a_second_evaluation_reads_the_judge(workdir, capsys):
    evaluate.run(config(eval__folder='again'), workdir)
    capsys.readouterr()
    evaluate.run(config(eval__folder='again'), workdir)
    assert 'judge  trained for' not in capsys.readouterr().out
    assert list((workdir / 'judges').glob('trained_judge_*.msgpack'))


def test_the_confusion_of_classes_without_images_is_drawn():
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 5]])
    drawn = figures.confusion({'w = 0': counts, 'w = 1': counts}, ['a', 'b', 'caf\udce9'], title='Both')
    assert drawn.png[:4] == b'\x89PNG'
    assert scoring.accuracy_by_class(counts)[0::2] == [0.75, 1.0] and np.isnan(scoring.accuracy_by_class(counts)[1])


def test_a_map_of_fid_leaves_cells_that_no_row_has_empty():
    rows = [{'guidance_weight': w, 'step': s, 'fid': 1.0 + w + s} for w in (0.0, 1.0) for s in (10, 20)][:3]
    assert figures.fid_map(rows, 'guidance_weight', 'step', title='A map').png[:4] == b'\x89PNG'


def test_names_of_curves():
    assert curves.curves(config(eval__ema=(False,)))[0].variant == 'parameters'
    (curve,) = curves.curves(config())
    assert (curve.variant, curve.step, curve.ema) == ('', None, True)
    assert [each.suffix for each in curves.curves(config(eval__steps=(2, 4)))] == ['_step_2', '_step_4']
