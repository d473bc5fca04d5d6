"""Memorisation: samples beside their nearest training images, and both beside images that training has not seen."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from cfg_jax import build
from cfg_jax.checks import check_config
from cfg_jax.data import sources
from cfg_jax.errors import UserError
from cfg_jax.evaluation import memorisation, scoring
from cfg_jax.evaluation.judges import Judge, Outputs
from cfg_jax.jobs import evaluate, train
from tests import tfds_layout, tiny

DIGITS = sources.digits()
ORDER = np.random.default_rng(0).permutation(1797)
TRAINING, HELD_OUT, FRESH = np.split(ORDER, [900, 1350])


def write_folder(root, indices):
    for index in indices:
        path = root / str(DIGITS.labels[index]) / f'{index:04}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(DIGITS.images[index, ..., 0]).save(path)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_folder(root / 'training', TRAINING)
    write_folder(root / 'unseen', HELD_OUT[DIGITS.labels[HELD_OUT] != 3])  # a class fewer
    return root


def config(data, **changes):
    folder = {'data__source': 'folder', 'data__data_dir': str(data / 'training'), 'eval__allow_few_samples': False}
    return tiny.config(**{**folder, 'eval__held_out': str(data / 'unseen'), **changes})


def judge(data, workdir, images, **changes):
    np.savez(workdir / 'samples.npz', arr_0=images)
    (row,) = evaluate.run(config(data, eval__samples=str(workdir / 'samples.npz'), **changes), workdir)
    return row


def test_copies_are_told_from_new_images(tmp_path, data, capsys):
    fresh = judge(data, tmp_path, DIGITS.images[FRESH])
    assert abs(fresh['memorised'] - 0.01) < 3 * fresh['memorised_error'] < 0.05
    assert fresh['training_distance'] == pytest.approx(1.0, abs=3 * fresh['training_distance_error'])
    assert 'memorisation  against 900 of 900 training images, with ' in capsys.readouterr().out
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'references').iterdir()}
    assert len(kept) == 2

    half = np.concatenate([DIGITS.images[FRESH[:200]], DIGITS.images[TRAINING[:200]]])
    row = judge(data, tmp_path, half)
    assert row['memorised'] == pytest.approx(0.5, abs=0.02) and row['training_distance'] < 0.5
    assert kept == {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'references').iterdir()}
    assert 'memorised <i>↓</i></th>' in (tmp_path / 'samples_report.html').read_text()
    picture = np.asarray(Image.open(tmp_path / 'nearest.png'))
    assert picture.shape[0] > 8 * 64 and picture.shape[1] > 2 * 5 * 64 and picture.ndim == 3

    (tmp_path / 'references' / next(name for name in kept if 'training' in name)).write_bytes(b'PK damaged')
    again = judge(data, tmp_path, half)
    assert (again['memorised'], again['memorised_error']) == (row['memorised'], row['memorised_error'])

    few = judge(data, tmp_path, half, eval__reference_images=450)
    assert few['memorised'] < 0.4
    said = 'against 450 of 900 training images; copies of the others are missed (config.eval.reference_images)'
    assert said in capsys.readouterr().out


def test_it_is_left_out_where_nothing_is_held_out(tmp_path, data):
    row = judge(data, tmp_path, DIGITS.images[FRESH], eval__held_out='')
    assert not {'memorised', 'training_distance'} & row.keys() and row['held_out'] == ''
    assert not (tmp_path / 'nearest.png').exists() and len(list((tmp_path / 'references').iterdir())) == 1


def test_settings_that_cannot_be(tmp_path, data):
    with pytest.raises(UserError, match=r"held_out is 'test'; it must be '' unless config\.data\.source is 'tfds' or"):
        check_config(tiny.config(eval__held_out='test'))
    with pytest.raises(UserError, match=r'held_out is .*; it must be other images than those of training'):
        check_config(config(data, eval__held_out=str(data / 'training')))
    with pytest.raises(UserError, match=r'^the held-out images \(config\.eval\.held_out\): .*nowhere'):
        build.held_out_source(config(data, eval__held_out=str(data / 'nowhere')))
    with pytest.raises(UserError, match=r'^the held-out images \(config\.eval\.held_out\): .*nowhere'):
        train.run(config(data, eval__held_out=str(data / 'nowhere'), eval__at_end=True), tmp_path / 'none')
    assert not (tmp_path / 'none').exists()  # told before training
    write_folder(tmp_path / 'seen', TRAINING[:60])
    with pytest.raises(UserError, match=r'half of the images of .*, or more, are training images too.*eval\.held_out'):
        judge(data, tmp_path, DIGITS.images[FRESH], eval__held_out=str(tmp_path / 'seen'))


def test_held_out_images_may_be_a_split(tmp_path):
    tfds_layout.write_cifar10(tmp_path, 20)
    images = {'data__image_size': 32, 'data__image_channels': 3, 'data__split': 'train[:15]'}
    of_tfds = {'data__source': 'tfds', 'data__name': 'cifar10', 'data__data_dir': str(tmp_path), **images}
    both = tiny.config(**of_tfds, eval__held_out='train[15:]')
    parts = build.source(both).batch(np.arange(15)), build.held_out_source(both).batch(np.arange(5))
    assert sorted(tfds_layout.number_of(image) for part in parts for image in part['image']) == list(range(20))
    assert build.held_out_source(tiny.config(**of_tfds)) is None
    with pytest.raises(UserError, match=r"^the held-out images \(config\.eval\.held_out\): .*no split 'test'"):
        build.held_out_source(tiny.config(**of_tfds, eval__held_out='test'))


def seen_judge(counts):
    """A judge whose features are the pixels, which counts the images that it is given."""

    def apply(images):
        counts.append(len(images))
        pixels = images.reshape(len(images), -1).astype(np.float32)
        return Outputs(pixels, pixels[:, :10])

    return Judge('pixels', 'pixels:1', apply, False)


def test_each_image_is_judged_once(tmp_path):
    counts = []
    judge = seen_judge(counts)
    training, held_out = (
        sources.ArraySource(DIGITS.images[part], DIGITS.labels[part], DIGITS.class_names)
        for part in (TRAINING, HELD_OUT)
    )

    def opened():
        images = scoring.RealImages(judge, training, 0)
        unseen = scoring.RealImages(judge, held_out, 300, 'held-out images')
        real = scoring.reference_of_data(images, tmp_path, nearest_k=3, split_images=100)
        return real, scoring.training_of_data(images, unseen, tmp_path, name='unseen')

    real, kept = opened()
    assert sum(counts) == 900 + 300 and real.num_images == 900
    again, found = opened()
    assert sum(counts) == 1200 and again.hash == real.hash
    np.testing.assert_array_equal(found.features, DIGITS.images[TRAINING].reshape(900, -1))
    for first, second in zip(kept.held_out[:2], found.held_out[:2]):
        np.testing.assert_array_equal(first, second)
    near = found.near(found.features[[7, 3]])
    assert near.places[:, 0].tolist() == [7, 3] and not near.distances.any() and not near.ratios.any()


def test_a_picture_shows_the_closest_first_and_some_of_chance():
    ratios = np.random.default_rng(0).permutation(40) / 40
    closest, by_chance = memorisation.chosen(ratios)
    assert ratios[closest].tolist() == sorted(ratios)[:8]
    assert len(by_chance) == 8 and not set(closest) & set(by_chance)
    assert [len(part) for part in memorisation.chosen(ratios[:5])] == [5]


def test_the_picture_of_few_samples(tmp_path, data):
    row = judge(data, tmp_path, DIGITS.images[FRESH[:6]], eval__allow_few_samples=True)
    assert row['num_samples'] == 6
    image = Image.open(io.BytesIO((tmp_path / 'nearest.png').read_bytes()))
    assert image.width > 5 * 64


def test_an_evaluation_of_a_model_has_a_picture_for_each_weight(tmp_path, data):
    flags = {'data__source': 'folder', 'data__data_dir': str(data / 'training'), 'data__num_classes': 10}
    flags |= {'eval__held_out': str(data / 'unseen'), 'train__num_steps': 2, 'eval__at_end': True}
    done = tiny.forked_main(*tiny.flags(**flags), f'--workdir={tmp_path}')
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob('nearest*')} == {'nearest_w0.png', 'nearest_w1.png'}
    rows = list(csv.DictReader((tmp_path / 'results.csv').open()))
    assert all(float(row['training_distance']) > 1 and row['held_out'] == str(data / 'unseen') for row in rows)
    with (tmp_path / 'tradeoff.csv').open() as file:
        assert next(csv.reader(file))[-2:] == ['memorised', 'training_distance']
