import errno
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax.errors import UserError
from cfg_jax.training.checkpoints import Checkpoints, checksums, config_differences, merged
from cfg_jax.training.meta import newest_config
from cfg_jax.training.train_state import TrainState


def state_of(value):
    params = {'w': jnp.full((4, 3), value, jnp.float32), 'b': jnp.full(3, -value)}
    return TrainState(jnp.int32(value), params, jax.tree.map(lambda p: p / 2, params), (params,))


ABSTRACT = jax.eval_shape(lambda: state_of(0))
CONFIG = {'a': 1, 'b': {'c': (1, 2), 'free': 3}}
IDENTITY = {'a': 1, 'b': {'c': (1, 2)}}


@pytest.fixture
def saved(tmp_path):
    """Steps 1 to 4 saved, two of them kept."""
    checkpoints = Checkpoints(tmp_path / 'c', IDENTITY, keep=2)
    for step in range(1, 5):
        checkpoints.save(step, state_of(step), config=CONFIG, class_names=('x', 'y'), batches=step + 10)
    assert checkpoints.latest_step() == 4  # waits
    yield tmp_path / 'c', checkpoints
    checkpoints.close()


def test_round_trip(saved):
    path, checkpoints = saved
    assert not checkpoints.path(2).exists() and checkpoints.path(3).exists()
    restored = Checkpoints(path, IDENTITY).restore(ABSTRACT)
    assert (restored.step, restored.batches, restored.class_names) == (4, 14, ('x', 'y'))
    assert restored.config == {'a': 1, 'b': {'c': [1, 2], 'free': 3}}
    jax.tree.map(np.testing.assert_array_equal, restored.tree, state_of(4))


def test_the_ema_alone(saved):
    reader = Checkpoints(saved[0], {'a': 1}, read_only=True)
    jax.tree.map(np.testing.assert_array_equal, reader.restore_params(ABSTRACT.ema_params).tree, state_of(4).ema_params)
    assert reader.saved_config()['b']['free'] == 3


@pytest.mark.parametrize('name', ['[a]', '[!x]y', 'a]', "o'n & (2) {3} #4 %s ~ é $HOME !", 'a\\b'])
def test_what_a_path_may_hold(tmp_path, name):
    """Without * ? [ and backslash a checkpoint is read as it was written; with them it is refused, in a parent too."""
    path = tmp_path / name / 'c'
    if '[' in name or '\\' in name:
        for options in ({}, {'read_only': True}):
            with pytest.raises(UserError, match=r"misreads '(\[|\\)' in a path"):
                Checkpoints(path, IDENTITY, **options)
        (tmp_path / name).mkdir()
        (tmp_path / 'link').symlink_to(tmp_path / name)
        path = tmp_path / 'link' / 'c'
    checkpoints = Checkpoints(path, IDENTITY)
    checkpoints.save(1, state_of(1), config=CONFIG, class_names=('x', 'y'))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, Checkpoints(path, IDENTITY).restore(ABSTRACT).tree, state_of(1))


def test_nothing_there(tmp_path):
    checkpoints = Checkpoints(tmp_path / 'c', {})
    assert checkpoints.restore(ABSTRACT) is None and checkpoints.saved_config() is None


def test_a_condemned_checkpoint_is_kept_aside(saved):
    path, checkpoints = saved
    checkpoints.condemn(4)
    assert checkpoints.latest_step() == 3 and (path.parent / 'damaged_checkpoints' / '4' / 'state').is_dir()
    checkpoints.save(4, state_of(5), config=CONFIG, class_names=())
    assert checkpoints.restore(ABSTRACT).step == 4


def test_a_saved_state_is_the_one_at_its_step(tmp_path):
    """The next step donates the buffers that are being saved; what is written must be the state before it."""
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state = jax.tree.map(lambda a: jnp.zeros((512, 512)), state_of(0))
    checkpoints = Checkpoints(tmp_path / 'c', {}, keep=20)
    for number in range(1, 9):
        state = step(state)
        checkpoints.save(number, state, config={}, class_names=())
    checkpoints.close()
    abstract = jax.eval_shape(lambda: state)
    for number in range(8, 0, -1):
        checkpoints = Checkpoints(tmp_path / 'c', {}, keep=20)
        restored = checkpoints.restore(abstract)
        assert restored.step == number
        assert {float(leaf.min()) for leaf in jax.tree.leaves(restored.tree)} == {number}
        assert {float(leaf.max()) for leaf in jax.tree.leaves(restored.tree)} == {number}
        checkpoints.condemn(number)
        checkpoints.close()


def test_another_config_is_refused_by_field(saved):
    with pytest.raises(UserError, match=r'config\.b\.c is \[1, 3\] now and was \[1, 2\] when saved'):
        Checkpoints(saved[0], {'a': 1, 'b': {'c': (1, 3)}}).restore(ABSTRACT)
    all_of_them = r'config\.a is 2 now and was 1 when saved; config\.b\.c is 3 now .* when saved\. Use'
    with pytest.raises(UserError, match=all_of_them):
        Checkpoints(saved[0], {'a': 2, 'b': {'c': 3}}).restore(ABSTRACT)
    assert config_differences({'a': 1, 'b': {'c': 2}}, {'a': 1, 'b': {'c': 2, 'd': 3}, 'e': 4}) == []
    assert config_differences({'a': None}, {'a': 2}) == ['config.a is None now and was 2 when saved']


def test_a_field_that_is_younger_than_a_checkpoint_stood_at_its_default(saved):
    identity = {'a': 1, 'b': {'c': (1, 2), 'young': False}}
    assert Checkpoints(saved[0], identity, defaults={'b': {'young': False}}).restore(ABSTRACT).step == 4
    with pytest.raises(UserError, match=r'config\.b\.young is False now and was True when saved'):
        Checkpoints(saved[0], identity, defaults={'b': {'young': True}}).restore(ABSTRACT)
    assert merged({'a': {'b': 1, 'c': 2}, 'd': 3}, {'a': {'b': 4}, 'e': 5}) == {'a': {'b': 4, 'c': 2}, 'd': 3, 'e': 5}


@pytest.mark.parametrize('error', [
    OSError(errno.ESTALE, 'Stale file handle'),
    PermissionError(errno.EACCES, 'Permission denied'),
    ValueError("PERMISSION_DENIED: Error opening: \"state/d/1\": Permission denied [os_error_code='13'] [spec='{}']"),
    ValueError('Failed to open: "c/4/state/d/1": Too many open files'),
])  # fmt: skip
def test_an_error_of_the_system_is_no_damage(saved, monkeypatch, error):
    """It ends the job; the newest checkpoint stays, and no older one is read in its place."""
    path, checkpoints = saved
    monkeypatch.setattr(Checkpoints, '_reader', lambda *_: (_ for _ in ()).throw(error))
    reason = 'Stale file handle|Permission denied|Too many open files'
    with pytest.raises(UserError, match=rf'c/4 cannot be read: ({reason}) \(--workdir\)'):
        checkpoints.restore(ABSTRACT)
    assert checkpoints.path(4).exists() and not (path.parent / 'damaged_checkpoints').exists()


def test_files_that_are_not_there_are_damage(saved, monkeypatch):
    path, _ = saved
    assert newest_config(path.parent) is None  # they stand in a folder of another name
    path.rename(path.parent / 'checkpoints')
    (path.parent / 'checkpoints' / '4' / 'meta' / 'metadata').unlink()
    assert newest_config(path.parent) == {'a': 1, 'b': {'c': [1, 2], 'free': 3}}
    with Checkpoints(path.parent / 'checkpoints', IDENTITY, read_only=True) as reader:
        assert reader.restore(ABSTRACT).step == 3

    def refuse(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, 'read_text', refuse)
    with pytest.raises(UserError, match=r'checkpoints/4 cannot be read: Permission denied \(--workdir\)'):
        newest_config(path.parent)


def test_a_flipped_byte_never_goes_unnoticed(saved, tmp_path):
    """In any file of a step: either it is damaged, or all that it holds is as it was."""
    newest = saved[0] / '4'
    files = sorted(path for path in newest.rglob('*') if path.is_file())
    noticed = 0
    for number, path in enumerate(files):
        content = path.read_bytes()
        for place in (len(content) // 4, 3 * len(content) // 4):
            copy = tmp_path / f'{number}_{place}' / 'c'
            shutil.copytree(saved[0], copy)
            flipped = content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]
            (copy / path.relative_to(saved[0])).write_bytes(flipped)
            restored = Checkpoints(copy, {}).restore(ABSTRACT)
            noticed += restored.step == 3
            jax.tree.map(np.testing.assert_array_equal, restored.tree, state_of(restored.step))
    assert noticed > 3


def test_checksums_see_every_change_and_no_layout():
    w = jnp.array([[0.5, -0.5, 1.0], [3.0, 4.0, 5.0]])
    tree = {'w': w, 'n': jnp.int32(7), 'h': jnp.ones(3, jnp.bfloat16), 'v': w[0]}
    changes = [
        {'w': w.at[1, 2].set(jnp.nextafter(5.0, 6.0))},
        {'n': jnp.int32(6)},
        {'h': -tree['h']},
        {'w': w[::-1]},
        {'w': -w},
        {'w': w.at[1, :2].multiply(-1)},
        {'w': w.at[0, :2].multiply(-1)},  # two that change places
        {'w': w.at[1, 1].multiply(-1), 'v': w[0].at[2].multiply(-1)},
        {'w': w.at[1, 1].multiply(2), 'v': w[0].at[2].multiply(2)},
    ]
    numbers = [checksums({'all': tree | change})['all'] for change in ({}, *changes)]
    assert len(set(numbers)) == len(numbers)
    assert checksums({'all': jax.tree.map(np.asarray, tree)})['all'] == numbers[0]
