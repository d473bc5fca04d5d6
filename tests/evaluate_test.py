"""The evaluation of images that lie there already; tests of evaluations of models are in main_test."""

import csv
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cfg_jax import build_sampling
from cfg_jax.checks import check_config, check_sweep
from cfg_jax.data import sources
from cfg_jax.errors import UserError
from cfg_jax.evaluation import references, scoring
from cfg_jax.evaluation.judges import Judge, Outputs
from cfg_jax.jobs import evaluate, sample, train
from cfg_jax.jobs.evaluate import curves, given, judging, pages
from tests import tiny


@pytest.fixture(scope='module')
def real():
    return sources.digits().batch(np.arange(0, 1797, 2))


def config(samples, **changes):
    return tiny.config(eval__samples=str(samples), eval__allow_few_samples=False, **changes)


def judge(workdir, arrays, **changes):
    """The row that an evaluation of these arrays gives."""
    np.savez(workdir / 'samples.npz', **arrays)
    (row,) = evaluate.run(config(workdir / 'samples.npz', **changes), workdir)
    return row


def test_real_images_score_well_and_noise_does_not(tmp_path, real):
    good = judge(tmp_path, {'arr_0': real['image'], 'arr_1': real['label']})
    assert good['fid'] < 0.5 and good['precision'] == 1 and good['recall'] > 0.8 and good['accuracy'] > 0.9
    assert good['num_samples'] == 899 and good['judge'].startswith('trained:sha256:')
    noise = np.random.default_rng(0).integers(0, 256, real['image'].shape, dtype=np.uint8)
    bad = judge(tmp_path, {'arr_0': noise})
    assert bad['fid'] > 20 * good['fid'] and bad['recall'] < 0.3 and 'accuracy' not in bad and 'spread' not in bad
    assert bad['kernel_distance'] > good['kernel_distance'] and bad['fid_error'] > 0
    rows = list(csv.DictReader((tmp_path / 'results.csv').open()))
    assert [float(row['fid']) for row in rows] == pytest.approx([good['fid'], bad['fid']], rel=1e-4)
    assert rows[1]['accuracy'] == '' and rows[0]['reference_sha256'] == rows[1]['reference_sha256']
    report = (tmp_path / 'samples_report.html').read_text()
    assert rows[0]['samples_sha256'] != rows[1]['samples_sha256'] == bad['samples_sha256']
    assert f'{bad["fid"]:.3f}' in report and 'samples.npz' in report and bad['reference_sha256'] in report


@pytest.mark.parametrize(
    ('folders', 'expected'),
    [
        (tuple(map(str, range(1, 11))), range(10)),  # '10' is no label id, so they are names
        (('0', '9'), (0, 9)),  # '0' is no name
        (('id:1', 'id:2'), (1, 2)),
        (('name:1', 'name:2'), (0, 1)),
        (('1', '2'), 'the folder \'1\' may be the class of that name or that label id.*"name:1" or "id:1"'),
        (('1', 'cat'), "has the class 'cat', which the data set does not have"),
        (('0', '10'), "has the class '0', which the data set does not have"),
    ],
)
def test_the_classes_of_samples_are_all_names_or_all_ids(folders, expected):
    """The data's classes are called 1 to 10, so that most of these are also label ids of other classes."""
    data = SimpleNamespace(class_names=tuple(map(str, range(1, 11))))
    found = references.Samples(None, np.arange(len(folders)), folders)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            given.match_classes('samples', found, data)
    else:
        assert given.match_classes('samples', found, data).tolist() == list(expected)


def test_both_unicode_spellings_of_a_class_are_one():
    found = references.Samples(None, np.array([0, 1, 1]), ('cafe\u0301', 'tea'))
    data = SimpleNamespace(class_names=('tea', 'caf\u00e9'))
    assert given.match_classes('samples', found, data).tolist() == [1, 0, 0]


def test_a_reference_file_gives_the_numbers_of_the_data(tmp_path, real):
    arrays = {'arr_0': real['image'], 'arr_1': real['label']}
    row = judge(tmp_path, arrays)
    (reference,) = (tmp_path / 'references').iterdir()
    again = judge(tmp_path, arrays, eval__reference=str(reference))
    for key in ('fid', 'precision', 'recall', 'kernel_distance', 'reference_sha256'):
        assert again[key] == row[key]
    # as ADM's: the statistics alone
    with np.load(reference) as both:
        np.savez(tmp_path / 'adm.npz', mu=both['mu'], sigma=both['sigma'])
    bare = judge(tmp_path, arrays, eval__reference=str(tmp_path / 'adm.npz'))
    assert bare['fid'] == row['fid'] and 'precision' not in bare
    # of images of another size
    np.savez(tmp_path / 'large.npz', mu=np.zeros(64), sigma=np.eye(64), arr_0=np.zeros((9, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match=r'images of \(16, 16, 1\), not \(8, 8, 1\) \(config\.eval\.reference\)'):
        judge(tmp_path, arrays, eval__reference=str(tmp_path / 'large.npz'))
    np.savez(tmp_path / 'wide.npz', mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(
        UserError, match=r'has 2048 features, but the judge .trained. has 64 \(config\.eval\.reference\)'
    ):
        judge(tmp_path, arrays, eval__reference=str(tmp_path / 'wide.npz'))


def test_a_folder_of_class_folders(tmp_path, real):
    for number in range(100):
        path = tmp_path / 'images' / str(real['label'][number]) / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(real['image'][number, ..., 0]).save(path)
    (row,) = evaluate.run(config(tmp_path / 'images'), tmp_path)
    assert row['num_samples'] == 100 and row['accuracy'] > 0.8
    (tmp_path / 'images' / '3').rename(tmp_path / 'images' / 'cat')
    with pytest.raises(UserError, match=r"class 'cat', which the data set does not have.*config\.eval\.samples"):
        evaluate.run(config(tmp_path / 'images'), tmp_path)


def test_other_images_under_the_same_name_are_another_reference(tmp_path, real):
    """As many, in the same folder as before: what was kept of those before must not be used."""
    rows = []
    for inverted in (False, True):
        for number in range(300):
            path = tmp_path / 'data' / str(real['label'][number]) / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image = real['image'][number, ..., 0]
            Image.fromarray(255 - image if inverted else image).save(path)
        data = {'data__source': 'folder', 'data__data_dir': str(tmp_path / 'data')}
        rows.append(judge(tmp_path, {'arr_0': real['image'][:300]}, **data))
    assert rows[0]['reference_sha256'] != rows[1]['reference_sha256']
    assert rows[1]['fid'] > 10 * rows[0]['fid'] and rows[1]['precision'] < rows[0]['precision'] == 1


def test_folders_called_by_numbers_are_the_classes_of_that_name(tmp_path, real):
    """Class folders '2' to '9' of the data are the labels 0 to 7; the same names of samples are the same classes."""
    for root in ('data', 'samples'):
        for number in np.flatnonzero(real['label'] >= 2)[:300]:
            path = tmp_path / root / str(real['label'][number]) / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(real['image'][number, ..., 0]).save(path)
    data = {'data__source': 'folder', 'data__data_dir': str(tmp_path / 'data'), 'data__num_classes': 8}
    (row,) = evaluate.run(config(tmp_path / 'samples', **data), tmp_path)
    assert row['accuracy'] > 0.8


def test_an_evaluation_again_replaces_its_row(tmp_path, real, capsys):
    arrays = {'arr_0': real['image']}
    first, second = (judge(tmp_path, arrays, eval__split_images=split) for split in (100, 300))
    assert first['split_images'] == 100 and 'results.csv: 1\n' in capsys.readouterr().out
    judge(tmp_path, arrays, eval__split_images=300)
    assert 'results.csv: 1, 1 in place of rows of the same settings\n' in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / 'results.csv').open()))
    assert [row['split_images'] for row in rows] == ['100', '300']
    assert float(rows[1]['inception_score']) == pytest.approx(second['inception_score'], rel=1e-4)


def test_equal_sets_are_at_a_distance_of_zero(tmp_path):
    row = judge(tmp_path, {'arr_0': sources.digits().images})
    assert 0 <= row['fid'] < 1e-6
    page = (tmp_path / 'samples_report.html').read_text()
    assert '<dt>FID</dt><dd><b>0.000</b>' in page and 'w = –' not in page


def test_names_of_any_bytes(tmp_path, real):
    """A data set in a folder with Latin-1 names: the tables and the page are UTF-8, and read again."""
    data = tmp_path / os.fsdecode(b'donn\xe9es')
    for number in range(60):
        path = data / os.fsdecode(b'caf\xe9%d' % (number % 2)) / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(real['image'][number, ..., 0]).save(path)
    changes = {'data__source': 'folder', 'data__data_dir': str(data), 'data__num_classes': 2, 'eval__judge_steps': 20}
    for _ in range(2):
        row = judge(tmp_path, {'arr_0': real['image'][:100]}, **changes)
    (read,) = csv.DictReader((tmp_path / 'results.csv').read_text('utf-8').splitlines())
    assert read['reference'].endswith('donn\\udce9es')
    assert 'donn\\udce9es' in (tmp_path / 'samples_report.html').read_text('utf-8')
    config = tiny.config(eval__folder='.')
    record = pages.Record(judging.Measuring(config, None, {}), tmp_path, ['caf\udce9'])
    record.add(curves.Curve(config), judging.Judged('w=0', row, np.array([[2]]), b'', None, None))
    assert (tmp_path / 'accuracy_by_class.csv').read_text('utf-8') == 'class,w=0\ncaf\\udce9,1\n'


def test_a_judge_that_is_not_finite_measures_nothing(real):
    def apply(images):
        features = np.ones((len(images), 4), np.float32)
        features[3, 2] = np.nan
        return Outputs(features, features)

    broken = Judge('broken', 'broken:1', apply, True, 'config.eval.broken_weights')
    message = r"^the judge 'broken' gives NaN or infinity for images of w=1: .*\(config\.eval\.broken_weights\)"
    with pytest.raises(UserError, match=message):
        scoring.judged([broken], [real['image'][:9]], 9, 'w=1')


def test_a_judge_without_logits_has_no_inception_score(tmp_path, real, monkeypatch):
    opened = scoring.open_judge

    def without_logits(*args, **kwargs):
        found = opened(*args, **kwargs)
        apply = lambda images: found.apply(images)._replace(logits=None)  # noqa: E731
        return found._replace(identity='features:1', apply=apply, classes_are_labels=False)

    monkeypatch.setattr(scoring, 'open_judge', without_logits)
    row = judge(tmp_path, {'arr_0': real['image'], 'arr_1': real['label']})
    assert row['fid'] < 0.5 and row['spread'] > 0
    assert not {'inception_score', 'inception_score_error', 'accuracy'} & row.keys()
    (written,) = csv.DictReader((tmp_path / 'results.csv').open())
    assert written['inception_score'] == written['inception_score_error'] == '' and float(written['precision']) == 1
    (kept,) = (tmp_path / 'references').iterdir()
    assert references.load(kept).inception_score is None
    report = (tmp_path / 'samples_report.html').read_text()
    assert f'{row["fid"]:.3f}' in report and 'Inception score' not in report
    again = judge(tmp_path, {'arr_0': real['image'], 'arr_1': real['label']}, eval__reference=str(kept))
    assert again['fid'] == row['fid']


@pytest.mark.parametrize('name', ['inception', 'dinov2'])
def test_a_judges_weights_are_those_of_its_own_field(tmp_path, real, name):
    weights = {f'eval__{each}_weights': str(tmp_path / f'{each}.pth') for each in ('inception', 'dinov2')}
    with pytest.raises(UserError, match=rf'/{name}\.pth: .*No such file.*\(config\.eval\.{name}_weights\)'):
        judge(tmp_path, {'arr_0': real['image']}, eval__judge=name, **weights)


def test_a_metric_that_is_not_finite_is_named():
    features = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    reference = references.Reference(np.full(4, 1e200), np.eye(4))
    scorer = scoring.Scorer(Judge('wide', 'wide:1', None, True), reference, 3, 50)
    with np.errstate(all='ignore'), pytest.raises(UserError, match=r'^FID of these 50 samples is inf, not a finite'):
        scorer.measure(Outputs(features, features), None)


@pytest.mark.parametrize(
    ('function', 'by_classifier', 'name'),
    [
        ('classifier_free', 0, 'classifier-free guidance'),
        (None, 0.0, 'classifier-free guidance'),
        ('', 32.0, 'classifier guidance'),
        ('classifier_free', 32.0, 'classifier-free and classifier guidance'),
        ('conditional', 32.0, 'classifier guidance'),
        ('conditional', 0, 'no guidance'),
        ('unconditional', 32.0, 'unconditional model, classifier guidance'),
        ('my.module:halved, sha256 ab', 0, 'halved guidance'),
    ],
)
def test_titles_tell_the_guidance(function, by_classifier, name):
    assert pages.guidance_name(function, by_classifier) == name
    row = {'step': 0, 'num_steps': 32, 'sampler': 'ddim', 'num_samples': 1000, 'judge': 'trained:sha256:ab'}
    row |= {'guidance': function, 'classifier_gradients': by_classifier}
    expected = f"digits: 1,000 samples per weight, 32 ddim steps, training step 0, {name}, judge 'trained'"
    assert pages.title_of(tiny.config(), [row]) == expected
    assert pages.title_of(tiny.config(), [{'step': None, 'num_samples': 9, 'judge': 'inception:sha256:ab'}]) == (
        "digits: 9 samples per weight, judge 'inception'"
    )


def test_the_owners_columns_of_results_stay(tmp_path, real):
    path = tmp_path / 'results.csv'
    path.write_text('date,fid,remark\n2020,3.5,"good, I think"\n')
    judge(tmp_path, {'arr_0': real['image']})
    first, second = csv.DictReader(path.open())
    assert (first['remark'], first['fid'], second['remark']) == ('good, I think', '3.5', '')
    assert float(second['fid']) < 0.5
    path.write_bytes(b'date,fid\n\xff\xfe,1\n')
    with pytest.raises(UserError, match=r'results\.csv cannot be read to add rows'):
        judge(tmp_path, {'arr_0': real['image']})
    assert path.read_bytes() == b'date,fid\n\xff\xfe,1\n'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'eval__reference_images': 3}, r'more than 3 real images, and there are 3 \(config\.eval\.reference_images'),
        (
            {'eval__nearest_k': 35, 'eval__reference_images': 30},
            '35 nearest neighbours need more than 35 real images, and there are 30',
        ),
        ({'eval__folder': 'samples.npz'}, r'samples\.npz is not a folder \(config\.eval\.folder\)'),
    ],
)
def test_settings_that_cannot_be(tmp_path, real, changes, message):
    with pytest.raises(UserError, match=message):
        judge(tmp_path, {'arr_0': real['image']}, **changes)


UNGUIDED = {'guidance__function': 'conditional'}


@pytest.mark.parametrize(
    ('job', 'changes', 'field'),
    [
        (evaluate.run, {}, 'config.eval.guidance_weights has 1'),
        (evaluate.run, {'eval__guidance_weights': (0.0, 0.1)}, 'config.eval.guidance_weights has 0.1'),
        (
            evaluate.run,
            {
                'guidance__classifier_workdir': 'x',
                'eval__classifier_weights': (0.0, 2.0),
                'sample__guidance_weight': 3.0,
            },
            'config.sample.guidance_weight has 3',
        ),
        (evaluate.run, {'eval__variants': 'variants.py'}, "variant 'plain': config.eval.guidance_weights has 1"),
        (sample.run, {'sample__guidance_scale': 3.0}, 'config.sample.guidance_weight has 2'),
        (train.run, {'sample__guidance_weight': -1.0}, 'config.sample.guidance_weight has -1'),
        (evaluate.check_to_come, {}, 'config.eval.guidance_weights has 1'),
    ],
)
def test_weights_by_which_nothing_guides_are_refused_where_they_are_used(tmp_path, monkeypatch, job, changes, field):
    monkeypatch.chdir(tmp_path)
    Path('variants.py').write_text("VARIANTS = {'plain': {'guidance.function': 'conditional'}}")
    unguided = {} if 'eval__variants' in changes else UNGUIDED
    changed = tiny.config(**unguided, **changes)
    check_config(changed)  # other jobs do not read them
    with pytest.raises(UserError, match=f'^{re.escape(field)}, but nothing guides by it: '):
        job(changed, tmp_path / 'run')


def test_weights_of_a_classifier_alone_need_no_guidance():
    check_sweep(tiny.config(**UNGUIDED, guidance__classifier_workdir='x', eval__classifier_weights=(0.0, 2.0)))
    check_sweep(tiny.config(**UNGUIDED, eval__guidance_weights=(0.0,)))
    with pytest.raises(UserError, match=r'^config\.eval\.bound_weights has 1, but nothing guides by it'):
        build_sampling.bits_per_dim(tiny.config(**UNGUIDED), 1.0)


def test_unlike_curves_are_not_drawn_together():
    here = {'num_samples': 40, 'judge': 'trained:1', 'reference_sha256': 'a'}
    judging.check_comparable('.', {**here, 'num_samples': 40.0}, here)
    judging.check_comparable('.', {'num_samples': 40.0}, here)
    for key, there in (('num_samples', 50.0), ('judge', 'inception:2'), ('reference_sha256', 'b')):
        with pytest.raises(UserError, match=rf"in '\.' was measured with {key} {there}, this one with {here[key]};"):
            judging.check_comparable('.', {**here, key: there}, here)


DIGITS = np.round(load_digits().images * 15.9375).astype(np.uint8)[..., None]


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        ({'arr_0': DIGITS[:64]}, r'64 samples of 64 features.*config\.eval\.allow_few_samples=True'),
        ({'arr_0': DIGITS.astype(np.float32)}, r'arr_0 float32.*needed is uint8'),
        ({'arr_0': np.zeros((99, 3, 8, 8), np.uint8)}, r'NCHW.*transpose'),
        ({'arr_0': np.zeros((99, 16, 16, 1), np.uint8)}, r'images of \(16, 16, 1\), not \(8, 8, 1\)'),
        ({'arr_0': DIGITS, 'arr_1': np.full(1797, 10)}, r'label 10; config\.data\.num_classes allows 0 to 9'),
        ({'images': DIGITS}, r'has no arr_0'),
    ],
)
def test_samples_that_cannot_be_judged(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        judge(tmp_path, arrays)
    assert not (tmp_path / 'results.csv').exists() and not list(tmp_path.glob('*.html'))
