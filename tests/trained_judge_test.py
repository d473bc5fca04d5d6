"""The judge of any labelled data set: trained on it, accurate on it, kept, and known by a hash of its weights."""

import numpy as np
import pytest

from cfg_jax.data import sources
from cfg_jax.errors import UserError
from cfg_jax.evaluation.judges import trained


def test_it_tells_digits_apart_and_is_known_by_its_weights(capsys):
    source = sources.digits()
    judge = trained.open_judge(source, 10, num_steps=150)
    assert 'judge  accuracy 0.' in capsys.readouterr().out
    outputs = judge.apply(source.images[:100])
    assert outputs.features.shape == (100, 64)
    assert outputs.features.dtype == outputs.logits.dtype == np.float32
    assert outputs.spatial is None
    assert judge.classes_are_labels
    assert np.mean(outputs.logits.argmax(axis=1) == source.labels[:100]) > 0.8
    np.testing.assert_allclose(judge.apply(source.images[7:8]).logits, outputs.logits[7:8], rtol=1e-4, atol=1e-4)
    assert trained.open_judge(source, 10, num_steps=150).identity == judge.identity
    other = sources.ArraySource(source.images[::-1], source.labels[::-1], source.class_names)
    assert trained.open_judge(other, 10, num_steps=150).identity != judge.identity


def test_too_few_images_to_train_on():
    source = sources.digits()
    few = {n: sources.ArraySource(source.images[:n], source.labels[:n], source.class_names) for n in (1, 4, 5)}
    for count in (1, 4):
        with pytest.raises(UserError, match=rf'needs 5 or more images, but there are {count} \(config\.eval\.judge\)'):
            trained.open_judge(few[count], 10, num_steps=2)
    assert trained.open_judge(few[5], 10, num_steps=2).apply(source.images[:1]).logits.shape == (1, 10)


def test_it_is_kept_under_a_hash_of_the_data(tmp_path, capsys):
    source = sources.digits()
    judge = trained.open_judge(source, 10, num_steps=20, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    capsys.readouterr()
    again = trained.open_judge(source, 10, num_steps=20, cache=tmp_path)
    assert again.identity == judge.identity and 'trained for' not in capsys.readouterr().out
    np.testing.assert_array_equal(again.apply(source.images[:9]).features, judge.apply(source.images[:9]).features)
    other = sources.ArraySource(source.images, source.labels[::-1], source.class_names)
    trained.open_judge(other, 10, num_steps=20, cache=tmp_path)
    trained.open_judge(source, 10, num_steps=21, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    path.write_bytes(path.read_bytes()[:-1])
    assert trained.open_judge(source, 10, num_steps=20, cache=tmp_path).identity == judge.identity
    assert trained._load(path)  # written again


def test_its_confusion_counts_the_held_out_images():
    source = sources.digits()
    judge = trained.open_judge(source, 10, num_steps=150)
    assert judge.confusion.sum() == len(source) // 5
    assert judge.confusion.trace() / judge.confusion.sum() > 0.8


@pytest.mark.parametrize('shape', [(28, 28, 1), (9, 20, 3)])
def test_images_of_any_size_and_channels(shape):
    """Classes that differ in brightness alone are told apart; one that has no images does no harm."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = (rng.integers(0, 100, (60, *shape)) + 100 * labels[:, None, None, None]).astype(np.uint8)
    judge = trained.open_judge(sources.ArraySource(images, labels, 'abc'), 3, num_steps=20)
    outputs = judge.apply(images)
    assert outputs.features.shape == (60, 64) and outputs.logits.shape == (60, 3)
    assert np.mean(outputs.logits.argmax(axis=1) == labels) > 0.9


def test_few_large_images_are_judged_at_once():
    assert [trained._judged_at_once((size, size, 3)) for size in (8, 64, 256, 4096)] == [512, 512, 64, 1]
