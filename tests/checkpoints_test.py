import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax.checkpoints import Checkpoints, config_differences
from cfg_jax.data import pipeline, sources
from cfg_jax.errors import UserError
from cfg_jax.train_state import TrainState


def state_of(value):
    params = {'w': jnp.full((4, 3), value, jnp.float32), 'b': jnp.full(3, -value)}
    return TrainState(jnp.int32(value), params, jax.tree.map(lambda p: p / 2, params), (params,))


def batches(seed=0):
    return pipeline.train_batches(sources.digits(), batch_size=8, seed=seed, flip=False)


ABSTRACT = jax.eval_shape(lambda: state_of(0))


@pytest.fixture
def saved(tmp_path):
    """Steps 1 to 4 saved, two of them kept; the data stands behind batch 4."""
    checkpoints, data = (
        Checkpoints(tmp_path / 'c', {'a': 1, 'b': {'c': (1, 2)}}, class_names=('x', 'y'), keep=2),
        batches(),
    )
    for step in range(1, 5):
        next(data)
        checkpoints.save(step, state_of(step), data)
    yield tmp_path / 'c', checkpoints, data
    checkpoints.close()


def test_round_trip(saved):
    path, checkpoints, data = saved
    expected = next(data)
    assert checkpoints.latest_step() == 4 and not checkpoints.path(2).exists() and checkpoints.path(3).exists()
    other = batches()
    restored = Checkpoints(path, {'a': 1, 'b': {'c': (1, 2)}}).restore(ABSTRACT, other)
    assert restored.step == 4 and restored.class_names == ('x', 'y')
    jax.tree.map(np.testing.assert_array_equal, restored.tree, state_of(4))
    jax.tree.map(np.testing.assert_array_equal, next(other), expected)


def test_the_ema_alone(saved):
    saved[1].latest_step()
    reader = Checkpoints(saved[0], {'a': 1}, read_only=True)
    jax.tree.map(np.testing.assert_array_equal, reader.restore_ema(ABSTRACT.params).tree, state_of(4).ema_params)


def test_nothing_there(tmp_path):
    assert Checkpoints(tmp_path / 'c', {}).restore(ABSTRACT, batches()) is None


def test_a_saved_state_is_the_one_at_its_step(tmp_path):
    """The next step donates the buffers that are being saved; what is written must be the state before it."""
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state, data = jax.tree.map(lambda a: jnp.zeros((512, 512)), state_of(0)), batches()
    checkpoints = Checkpoints(tmp_path / 'c', {}, keep=20)
    for number in range(1, 9):
        state = step(state)
        checkpoints.save(number, state, data)
    checkpoints.close()
    for number in range(8, 0, -1):
        checkpoints = Checkpoints(tmp_path / 'c', {}, keep=20)
        restored = checkpoints.restore(jax.eval_shape(lambda: state), data)
        assert restored.step == number
        assert {float(leaf.min()) for leaf in jax.tree.leaves(restored.tree)} == {number}
        assert {float(leaf.max()) for leaf in jax.tree.leaves(restored.tree)} == {number}
        checkpoints._manager.delete(number)
        checkpoints.close()


def test_another_config_is_refused_by_field(saved):
    saved[1].latest_step()
    with pytest.raises(UserError, match=r'config\.b\.c is \[1, 3\] here and \[1, 2\] there'):
        Checkpoints(saved[0], {'a': 1, 'b': {'c': (1, 3)}}).restore(ABSTRACT, batches())
    assert config_differences({'a': 1, 'b': {'c': 2}}, {'a': 1, 'b': {'c': 2, 'd': 3}, 'e': 4}) == []
    assert config_differences({'a': None}, {'a': 2}) == ['config.a is None here and 2 there']
