import hashlib
import json
import os
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

from cfg_jax import trained
from cfg_jax.jobs import sample, train
from cfg_jax.sampling import sample_sets
from cfg_jax.sampling.labels import make_labels
from cfg_jax.trained import Trained, Wanted
from tests import tiny
from tests.processes_test import start_together

LABELS = np.resize(np.arange(10, dtype=np.int32), 25)


def open_set(folder, labels=LABELS, identity=None):
    """A set of units of 4 images in shards of 8."""
    return sample_sets.SampleSet(folder, 'test', identity or {'a': 1}, labels, batch_size=4, shard_images=7)


def image(index):
    return np.full((2, 2, 1), 3 * index, np.uint8)


def drawer(drawn, labels=LABELS):
    """Stands in for the sampler: notes which units it was asked for."""

    def draw(units):
        for unit in units:
            drawn.append(unit)
            yield np.stack([image(index) for index in range(4 * unit, min(4 * unit + 4, len(labels)))])

    return draw


def all_images(images):
    return np.concatenate(list(images.shards()))


EVERY = np.stack([image(index) for index in range(25)])


def test_a_set_holds_every_image_in_order(tmp_path):
    images, drawn = open_set(tmp_path), []
    images.draw(drawer(drawn), 'test')
    assert drawn == [0, 1, 2, 3, 4, 5, 6]
    again = open_set(tmp_path)
    again.draw(drawer(drawn), 'test')
    assert len(drawn) == 7 and again.sha256 == images.sha256
    assert sorted(path.name for path in images.folder.iterdir()) == [
        'manifest.json', 'shard_00000.npz', 'shard_00001.npz', 'shard_00002.npz', 'shard_00003.npz',
    ]  # fmt: skip
    np.testing.assert_array_equal(all_images(images), EVERY)
    np.testing.assert_array_equal(images.first(11), EVERY[:11])
    np.testing.assert_array_equal(images.first(100), EVERY)
    np.testing.assert_array_equal(images.at(np.array([24, 3, 8, 3])), EVERY[[24, 3, 8, 3]])
    manifest = json.loads((images.folder / 'manifest.json').read_text())
    assert manifest['complete'] and manifest['num_images'] == 25 and manifest['identity'] == {'a': 1}
    assert manifest['sha256'] == images.sha256 == hashlib.sha256(EVERY).hexdigest()
    images.write_npz(tmp_path / 'all.npz')
    with np.load(tmp_path / 'all.npz') as arrays:
        np.testing.assert_array_equal(arrays['arr_0'], EVERY)
        np.testing.assert_array_equal(arrays['arr_1'], LABELS)
        assert arrays['arr_0'].dtype == np.uint8


@pytest.mark.parametrize('damage', ['missing', 'cut short', 'empty', 'garbage', 'other labels'])
def test_only_what_is_missing_or_damaged_is_drawn_again(tmp_path, damage):
    images, drawn = open_set(tmp_path), []
    images.draw(drawer([]), 'test')
    shard = images.folder / 'shard_00001.npz'
    content = shard.read_bytes()
    if damage == 'missing':
        shard.unlink()
    elif damage == 'other labels':
        np.savez(shard, arr_0=EVERY[8:16], arr_1=LABELS[:8], seconds=1.0)
    else:
        shard.write_bytes({'cut short': content[:-40], 'empty': b'', 'garbage': b'x' * len(content)}[damage])
    images.draw(drawer(drawn), 'test')
    assert drawn == [2, 3]
    np.testing.assert_array_equal(all_images(images), EVERY)


def test_more_images_keep_the_shards_that_are_whole(tmp_path):
    few = open_set(tmp_path, LABELS[:20])
    few.draw(drawer([], LABELS[:20]), 'test')
    many, drawn = open_set(tmp_path), []
    assert many.folder == few.folder
    many.draw(drawer(drawn), 'test')
    assert drawn == [4, 5, 6]
    np.testing.assert_array_equal(all_images(many), EVERY)
    open_set(tmp_path, LABELS[:20]).draw(drawer(drawn), 'test')
    assert drawn == [4, 5, 6]
    np.testing.assert_array_equal(all_images(few), EVERY[:20])
    assert json.loads((few.folder / 'manifest.json').read_text())['num_images'] == 20


def test_a_manifest_that_a_kill_left_behind_is_mended(tmp_path):
    """Killed between the last shard and the manifest."""
    images = open_set(tmp_path)
    images.draw(drawer([]), 'test')
    manifest = images.folder / 'manifest.json'
    whole = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(whole), 'complete': False}))
    open_set(tmp_path).draw(drawer([]), 'test')
    assert manifest.read_text() == whole


def test_other_settings_are_another_set_and_it_says_which(tmp_path, capsys):
    one, two = (open_set(tmp_path, identity={'a': number, 'widths': (1, 2)}) for number in (1, 2))
    assert one.folder != two.folder
    few = open_set(tmp_path, LABELS[:4], identity=one.identity)
    few.draw(drawer([], LABELS[:4]), 'w=1')
    one.draw(drawer([]), 'w=1')  # the same set, of more images
    assert 'drawing again' not in capsys.readouterr().out
    two.draw(drawer([]), 'w=1')
    assert f'w=1  drawing again: {one.folder.name} differs in a\n' in capsys.readouterr().out


def test_labels_of_an_image_do_not_depend_on_their_number():
    names = tuple('abcdefghij')
    for order in ('balanced', 'random'):
        few, many = (make_labels(range(10), number, order=order, seed=0) for number in (30, 1000))
        np.testing.assert_array_equal(few, many[:30])
        counts = np.bincount(many)
        if order == 'balanced':
            assert (counts == 100).all()
        else:
            assert counts.min() > 60 and counts.max() < 140 and not np.array_equal(many[:10], np.arange(10))
    config = tiny.config(sample__labels='b,7', sample__num_images=4)
    assert trained.wanted(config, names).ids == (1, 7)
    assert make_labels([1, 7], 4, order='balanced', seed=0).tolist() == [1, 7, 1, 7]
    assert trained.wanted(tiny.config(sample__num_images=4), names).ids == (0, 3, 6, 9)


def test_a_set_grows_in_its_own_folder_whatever_its_labels(tmp_path):
    """Of labels in random order, the first of few need not be the first of many."""
    config, folders = tiny.config(sample__label_order='random'), set()
    model = Trained(config, params=None, step=1, class_names=(), digest='a')
    for count in (20, 100):  # fewer than a batch are drawn as a smaller one, in a folder of their own
        images = trained.open_set(model, tmp_path, Wanted(tuple(range(10)), count, 1.0, 0.0))
        folders.add(images.folder)
    assert len(folders) == 1 and len(set(images.labels.tolist())) == 10


def test_parameters_are_told_apart():
    tree = {'a': jax.numpy.ones(3), 'b': {'c': jax.numpy.zeros((2, 2))}}
    changed = {**tree, 'a': tree['a'].at[1].set(2)}
    digests = [sample_sets.params_digest(each) for each in (tree, changed)]
    assert len(set(digests)) == 2
    assert sample_sets.params_digest(jax.tree.map(np.asarray, tree)) == digests[0]


def test_another_guidance_under_the_same_name_is_another_set(tmp_path, monkeypatch):
    """Who edits their own guidance and evaluates again must not be shown the images of before."""
    monkeypatch.syspath_prepend(tmp_path)
    config, digests = tiny.config(guidance__function='edited_guidance:guide'), []
    for factor in (1, 2):
        (tmp_path / 'edited_guidance.py').write_text(
            'from cfg_jax import guidance\n\n\n'
            'def guide(model, labels, weight, *, null_label):\n'
            f'    return guidance.classifier_free(model, labels, {factor} * weight, null_label=null_label)\n'
        )
        digests.append(trained.code_digest(config))
        sys.modules.pop('edited_guidance')
    assert len(set(digests)) == 2
    assert trained.code_digest(tiny.config()) == trained.code_digest(tiny.config(seed=1))


def test_a_killed_job_ends_with_the_images_of_an_undisturbed_one(tmp_path):
    """SIGKILL after a shard, then two processes of two devices each; the images of one process to the bit."""
    changes = {
        'train__num_steps': 2,
        'sample__num_images': 80,
        'sample__batch_size': 10,
        'sample__shard_images': 20,
        'sample__num_steps': 100,
        'sample__guidance_weight': 1.0,
    }
    flags = tiny.flags(**changes)
    config = tiny.config(**changes)
    train.run(config, tmp_path / 'alone')
    shutil.copytree(tmp_path / 'alone', tmp_path / 'disturbed')
    sample.run(config, tmp_path / 'alone')

    disturbed = tmp_path / 'disturbed'
    process = tiny.forked(*flags, '--mode=sample', f'--workdir={disturbed}', start_new_session=True)
    while not list(disturbed.rglob('shard_*.npz')):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(disturbed.rglob('shard_*.npz'))) < 4 and not list(disturbed.glob('*.npz'))
    outputs = start_together(2, *flags, '--mode=sample', workdir=disturbed)
    assert 'resuming: ' in outputs[0] and 'image' not in outputs[1]  # the first process alone prints

    manifests = [json.loads(next(tmp_path.glob(f'{name}/sample_sets/*/manifest.json')).read_text()) for name in
                 ('alone', 'disturbed')]  # fmt: skip
    assert manifests[0]['sha256'] == manifests[1]['sha256'] and manifests[1]['complete']
    npzs = [next((tmp_path / name).glob('sample_*.npz')) for name in ('alone', 'disturbed')]
    np.testing.assert_array_equal(*(np.load(npz)['arr_0'] for npz in npzs))


def test_names_tell_what_is_unusual():
    def name(**changes):
        return trained.describe(tiny.config(**changes), Wanted((), 1, 0.3, 2.0))

    assert name() == 'ancestral3_v1_w0.3_seed0'  # digits' v; the usual one is 0.3
    assert name(sample__v=0.3) == 'ancestral3_w0.3_seed0'
    assert name(sample__v=0.25, sample__eta=0.5, sample__seed=7) == 'ancestral3_v0.25_w0.3_seed7'
    assert name(sample__sampler='ddim', sample__eta=0.5) == 'ddim3_eta0.5_w0.3_seed0'
    assert name(guidance__function='mine.module:halved') == 'ancestral3_halved_v1_w0.3_seed0'
    weak = {'guidance__weak': 'checkpoint', 'guidance__weak_workdir': 'runs/small'}
    assert name(**weak) == 'ancestral3_v1_checkpoint_small_w0.3_seed0'
    assert name(**weak, guidance__weak_conditional=False) == 'ancestral3_v1_checkpoint_unlabelled_small_w0.3_seed0'
    assert (
        name(sample__sampler='dpmpp_2m', sample__lower_order_final=False) == 'dpmpp_2m3_lower_order_final0_w0.3_seed0'
    )
    assert name(guidance__classifier_workdir='there') == 'ancestral3_v1_w0.3_classifier2_seed0'
