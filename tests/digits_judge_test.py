"""The judge of small data sets: it is trained on a source, accurate on it, and identified by a hash of its weights."""

import numpy as np
import pytest

from cfg_jax.data import sources
from cfg_jax.errors import UserError
from cfg_jax.evaluation.judges import digits


def test_it_tells_digits_apart_and_is_known_by_its_weights(capsys):
    source = sources.digits()
    judge = digits.open_judge(source, 10, num_steps=150)
    assert 'judge  accuracy 0.' in capsys.readouterr().out
    outputs = judge.apply(source.images[:100])
    assert outputs.features.shape == (100, 64)
    assert outputs.features.dtype == outputs.logits.dtype == np.float32
    assert outputs.spatial is None
    assert judge.classes_are_labels
    assert np.mean(outputs.logits.argmax(axis=1) == source.labels[:100]) > 0.8
    np.testing.assert_allclose(judge.apply(source.images[7:8]).logits, outputs.logits[7:8], rtol=1e-4, atol=1e-4)
    assert digits.open_judge(source, 10, num_steps=150).identity == judge.identity
    other = sources.ArraySource(source.images[::-1], source.labels[::-1], source.class_names)
    assert digits.open_judge(other, 10, num_steps=150).identity != judge.identity


def test_too_few_images_to_train_on():
    source = sources.digits()
    few = {n: sources.ArraySource(source.images[:n], source.labels[:n], source.class_names) for n in (1, 4, 5)}
    for count in (1, 4):
        with pytest.raises(UserError, match=rf'needs 5 or more images, but there are {count} \(config\.eval\.judge\)'):
            digits.open_judge(few[count], 10, num_steps=2)
    assert digits.open_judge(few[5], 10, num_steps=2).apply(source.images[:1]).logits.shape == (1, 10)
