import json
import resource
import shutil
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cfg_jax import build, diffusion, files, trained
from cfg_jax.errors import UserError
from cfg_jax.jobs import train
from cfg_jax.training import checkpoints, checks, sharding, step
from cfg_jax.training.checkpoints import Restored
from cfg_jax.training.train_state import TrainState
from tests import tiny


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# 80 steps: long enough to be killed twice on the way. Lines are written at other steps than checkpoints.
RUN = {'train__num_steps': 80, 'train__checkpoint_every': 10, 'train__log_every': 7, 'train__grid_every': 40}
LOGGED = [*range(7, 80, 7), 80]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """A run of 80 steps that nothing stops: (workdir, its final state)."""
    workdir = tmp_path_factory.mktemp('undisturbed')
    state = train.run(tiny.config(**RUN), workdir)
    return workdir, jax.device_get(state)


def lines_of(workdir):
    """The lines of metrics.jsonl, as dicts."""
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_what_a_run_leaves_behind(undisturbed):
    workdir, state = undisturbed
    assert int(state.step) == 80
    lines = lines_of(workdir)
    assert [line['step'] for line in lines] == LOGGED
    assert {'loss', 'grad_norm', 'loss_conditional', 'images_per_second', 'learning_rate'} <= lines[0].keys()
    assert all(f'loss_logsnr_q{q}' in lines[0] for q in (1, 2, 3, 4))
    assert sorted(path.name for path in (workdir / 'samples').iterdir()) == ['step_00000040.png', 'step_00000080.png']
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['70', '80']
    board = EventAccumulator(str(workdir / 'tensorboard'))
    board.Reload()
    assert [event.step for event in board.Scalars('loss')] == LOGGED
    assert [event.step for event in board.Images('samples')] == [40, 80]


def saved_steps(workdir):
    """Steps of the checkpoints that are whole: a half-written one has another name."""
    return [int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()]


def test_a_killed_run_resumes_to_the_same_bits(undisturbed, tmp_path, capfd):
    """SIGKILL on the way, once a new checkpoint is there, and then SIGTERM; the third start of the same command ends
    where an undisturbed run does, and so do its lines."""
    workdir, resumed_at = tmp_path / 'killed', 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = tiny.forked(*tiny.flags(**RUN), f'--workdir={workdir}')
        lines = []
        for line in process.stdout:
            lines.append(line)
            if max(saved_steps(workdir), default=0) > resumed_at:
                break
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == (75 if number == signal.SIGTERM else -number), err
        if resumed_at:  # it did go on, and did not start anew
            assert f'resuming from {workdir}/checkpoints/{resumed_at}\n' in lines
            assert not any(line.startswith('step 7/') for line in lines)
        resumed_at = max(saved_steps(workdir))
        assert resumed_at < 80
    capfd.readouterr()
    state = train.run(tiny.config(**RUN), workdir)
    assert f'resuming from {workdir}/checkpoints/{resumed_at}\n' in capfd.readouterr().out
    assert f'preempted: step {resumed_at} is saved' in err
    assert_same_bits(jax.device_get(state), undisturbed[1])
    logs = [[line | {'images_per_second': 0} for line in lines_of(folder)] for folder in (workdir, undisturbed[0])]
    assert logs[0] == logs[1] and [line['step'] for line in logs[0]] == LOGGED


def test_one_job_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(train, '_LOCK_SECONDS', 0)
    with (
        files.locked(tmp_path / '.lock', ''),
        pytest.raises(UserError, match=r'another job is training in .*workdir'),
    ):
        train.run(tiny.config(), tmp_path)
    assert not (tmp_path / 'checkpoints').exists()


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """A checkpoint for which there is no room is one line of error; the one before it stays."""
    train.run(tiny.config(train__num_steps=2), tmp_path)
    flags = tiny.flags()
    process = tiny.main(*flags, f'--workdir={tmp_path}', start=subprocess.Popen)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    _, err = process.communicate()
    assert process.returncode == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith('error: ')]
    assert line.startswith(f'error: a checkpoint cannot be written to {tmp_path}/checkpoints: File too large')
    assert f'the last saved checkpoint is {tmp_path}/checkpoints/2' in line
    assert saved_steps(tmp_path) == [2]
    assert int(train.run(tiny.config(), tmp_path).step) == 4


def test_the_grid_of_a_step_at_which_it_was_stopped(undisturbed, tmp_path):
    """Drawn when the run goes on; the same picture."""
    workdir = tmp_path / 'run'
    shutil.copytree(undisturbed[0], workdir)
    grid = workdir / 'samples' / 'step_00000080.png'
    expected = grid.read_bytes()
    grid.unlink()
    train.run(tiny.config(**RUN), workdir)
    assert grid.read_bytes() == expected


def test_a_longer_run_goes_on(undisturbed, tmp_path, capfd):
    """With a constant learning rate, 20 steps and then 80 are the same as 80; a finished run does nothing more."""
    train.run(tiny.config(train__num_steps=20, train__checkpoint_every=20), tmp_path)
    longer = tiny.config(train__num_steps=80, train__checkpoint_every=80)
    parts = train.run(longer, tmp_path)
    assert f'resuming from {tmp_path}/checkpoints/20\n' in capfd.readouterr().out
    assert_same_bits(jax.device_get(parts), undisturbed[1])
    assert_same_bits(jax.device_get(train.run(longer, tmp_path)), undisturbed[1])


def test_a_resumed_run_says_that_its_decay_moves_and_may_accumulate_otherwise(capfd):
    """A finished cosine decay (rate 0) goes back to half of the peak where the run is made twice as long."""
    cosine = {'optim__decay': 'cosine', 'optim__warmup_steps': 0}
    before, data = tiny.config(**cosine, train__num_steps=6), range(100)
    after = tiny.config(**cosine, train__num_steps=12, train__accumulation_steps=2)
    assert build.run_identity(before) == build.run_identity(after)
    assert build.run_identity(before) != build.run_identity(tiny.config(**cosine, train__batch_size=32))
    saved = Restored(None, 6, 6, (), json.loads(json.dumps(before.to_dict())))
    train.print_changes(before, data, saved)
    assert not capfd.readouterr().out
    train.print_changes(after, data, saved)
    assert capfd.readouterr().out.splitlines() == [
        'changed since: config.train.accumulation_steps is 2 now and was 1 when saved',
        "changed since: config.train.num_steps is 12 now and was 6 when saved: config.optim.decay='cosine' now means "
        'the curve that ends at step 12, so the learning rate is 0.01 after step 6, where it was 0',
    ]


def test_a_decay_that_does_not_move_is_not_mentioned():
    def moved(step, old, new, **changes):
        changes = {'optim__decay': 'cosine', **changes}
        return build.moved_learning_rate(tiny.config(train__num_steps=new, **changes), old.to_dict(), step)

    cosine, constant = tiny.config(train__num_steps=6, optim__decay='cosine'), tiny.config(train__num_steps=6)
    assert moved(3, cosine, 12) and moved(2, cosine, 3)  # longer and shorter
    assert not moved(3, cosine, 6) and not moved(6, cosine, 6)
    assert not moved(6, constant, 12, optim__decay='constant')
    assert not moved(6, cosine, 4)  # nothing is trained


# The slow ones are also read by two processes, in processes_test.
SLOW_DAMAGE = [pytest.param(kind, marks=pytest.mark.slow) for kind in ('truncated', 'deleted file', 'empty folder')]


@pytest.mark.parametrize('damage', ['flipped', 'flipped metadata', *SLOW_DAMAGE])
def test_a_damaged_newest_checkpoint(undisturbed, tmp_path, capfd, damage):
    """Falls back to the one before, says so, keeps the damaged one aside, and ends with the same bits."""
    workdir = tmp_path / 'run'
    shutil.copytree(undisturbed[0], workdir)
    newest = workdir / 'checkpoints' / '80'
    largest = max((path for path in newest.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == 'truncated':
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == 'flipped':
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == 'deleted file':
        largest.unlink()
    elif damage == 'empty folder':
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        (newest / 'meta' / 'metadata').write_text('{"config": ')
    state = train.run(tiny.config(**RUN), workdir)
    assert_same_bits(jax.device_get(state), undisturbed[1])
    out = capfd.readouterr().out
    assert 'checkpoint 80 is damaged' in out and 'using step 70 instead' in out
    assert (workdir / 'damaged_checkpoints' / '80').is_dir()
    assert (workdir / 'checkpoints' / '80').is_dir()  # saved again


def test_all_checkpoints_damaged(undisturbed, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(undisturbed[0], workdir)
    for number in ('70', '80'):
        shutil.rmtree(workdir / 'checkpoints' / number / 'state')
    with pytest.raises(UserError, match='none of the 2 checkpoints'):
        train.run(tiny.config(), workdir)
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['70', '80']


def test_the_loss_falls_and_ema_follows(undisturbed):
    workdir, state = undisturbed
    losses = [line['loss'] for line in lines_of(workdir)]
    assert losses[-1] < 0.7 * losses[0]
    config = tiny.config(**RUN)
    start = jax.jit(lambda: build.init_params(config, build.training_keys(config)[0]))()

    def distance(a, b):
        return float(sum(jnp.square(x - y).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))))

    assert distance(state.ema_params, state.params) < 0.05 * distance(start, state.params)


@pytest.mark.parametrize('seed', [0, 7, 2**31, 2**32 - 1])
def test_the_keys_of_training_are_those_of_older_runs(seed):
    """A run that is resumed goes on with them."""
    before = jax.random.split(jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1)))
    assert (jnp.stack(build.training_keys(tiny.config(seed=seed))) == before).all()


def initial(config):
    return jax.jit(lambda: build.init_params(config, jax.random.key(0)))()


def test_one_step_by_hand():
    """Adam's first update is lr · sign(g); the EMA moves by 1 - decay of it; the counts add up."""
    config = tiny.config()
    mesh = sharding.make_mesh()
    init, _, train_step = build.sharded_training(config, mesh)  # the program of every run here
    state = init()
    before = jax.device_get(state.params)
    batches = build.train_batches(config, build.source(config))
    state, metrics = train_step(state, sharding.to_devices(next(batches), mesh), jax.random.key(1))
    batches.close()
    steps = np.concatenate([np.ravel(a - b) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before))])
    moved = steps[np.abs(steps) > 1e-5]
    assert len(moved) > 50
    np.testing.assert_allclose(np.abs(moved), config.optim.learning_rate, rtol=0.02)
    decay = config.optim.ema_decay
    jax.tree.map(
        lambda e, b, p: np.testing.assert_allclose(e, decay * b + (1 - decay) * p, atol=1e-6),
        state.ema_params,
        before,
        state.params,
    )
    assert int(state.step) == 1
    assert float(metrics['quarter_counts'].sum()) == float(metrics['kind_counts'].sum()) == 16
    np.testing.assert_allclose(metrics['quarter_sums'].sum() / 16, metrics['loss'], rtol=1e-5)
    # low-discrepancy u: a quarter of the images in each quarter of λ
    np.testing.assert_array_equal(metrics['quarter_counts'], 4)


def test_accumulation_averages_the_parts_gradients():
    config = tiny.config(train__accumulation_steps=4, optim__clip_norm=0.0)
    params = initial(config)
    # the zero-initialised last layer would hide all gradients but its own
    params = jax.tree.map(lambda p: p + 0.1, params)
    images, labels = np.arange(16 * 64, dtype=np.uint8).reshape(16, 8, 8, 1), np.arange(16) % 10
    loss_fn, key = build.loss(config), jax.random.fold_in(jax.random.key(1), 0)

    @jax.jit
    def part_gradient(images, labels, part):
        def loss(p):
            return loss_fn(p, diffusion.to_unit_range(images), labels, jax.random.fold_in(key, part)).loss.mean()

        return jax.grad(loss)(params)

    gradients = [part_gradient(images[part::4], labels[part::4], part) for part in range(4)]
    expected = jax.tree.map(lambda *g: sum(g) / 4, *gradients)
    state = TrainState.create(params, build.optimizer(config))
    _, metrics = jax.jit(build.train_step(config))(state, {'image': images, 'label': labels}, jax.random.key(1))
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(expected)))
    np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-4)
    assert float(metrics['quarter_counts'].sum()) == 16


def ruined_by(update, learning_rate):
    """In place of `build.learning_rate`: one that ruins the parameters with the given update, counted from 1."""
    return lambda config: lambda done: jnp.where(done >= update - 1, learning_rate, 0.02)


@pytest.mark.parametrize(
    ('learning_rate', 'every', 'message', 'condemned'),
    [
        (1e17, 4, 'step 83: the loss is not finite at λ in', False),
        # finite but huge parameters are saved before their loss is seen: that checkpoint is not the last good one
        (1e17, 2, 'step 83: the loss is not finite at λ in', True),
        pytest.param(1e38, 2, 'step 82: the gradient or the update is not finite', False, marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    undisturbed, tmp_path, monkeypatch, learning_rate, every, message, condemned
):
    """It names the step and the last good checkpoint, which stays; without the cause, the run goes on from there."""
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    longer = tiny.config(train__num_steps=86, train__checkpoint_every=every)
    with monkeypatch.context() as patch:
        patch.setattr(build, 'learning_rate', ruined_by(82, learning_rate))
        with pytest.raises(UserError) as caught:
            train.run(longer, tmp_path)
    assert message in str(caught.value)
    assert f'the last good checkpoint is {tmp_path}/checkpoints/80.' in str(caught.value)
    assert sorted(saved_steps(tmp_path)) == ([80] if condemned else [70, 80])
    assert (tmp_path / 'damaged_checkpoints' / '82').exists() == condemned
    assert int(train.run(longer, tmp_path).step) == 86


def test_the_quarter_of_the_nan_is_named():
    config = tiny.config()
    metrics = {'loss': np.nan, 'grad_norm': 1.0, 'param_norm': 1.0, 'quarter_sums': np.array([1.0, 2.0, np.nan, 4.0])}

    edges = build.quarter_edges(config).tolist()

    class NoCheckpoints:
        def latest_step(self):
            return None

    with pytest.raises(UserError, match=r'step 7: the loss is not finite at λ in .* to 1\.76; there is no checkpoint'):
        checks.check_finite(7, metrics, NoCheckpoints(), quarter_edges=edges)


def test_one_nan_stays_in_its_quarter():
    membership = jax.nn.one_hot(jnp.array([0, 1, 2, 3]), 4)
    sums = step._sums(membership, jnp.array([1.0, jnp.nan, 3.0, 4.0]))
    np.testing.assert_array_equal(sums, [1, np.nan, 3, 4])


@pytest.mark.parametrize('function', ['check_same_classes', 'print_changes', '_print_start', '_Metrics'])
def test_an_error_before_the_first_step_closes_the_checkpoints(undisturbed, monkeypatch, function):
    """Orbax's threads, left alone, print a traceback at the end of a program on Python 3.13."""
    closed, close = [], checkpoints._Manager.close
    monkeypatch.setattr(checkpoints._Manager, 'close', lambda self: closed.append(close(self)))

    def fail(*_):
        raise UserError('refused')

    monkeypatch.setattr(train, function, fail)
    with pytest.raises(UserError, match='refused'):
        train.run(tiny.config(**RUN), undisturbed[0])
    assert closed


def test_another_configs_workdir(undisturbed):
    with pytest.raises(UserError, match=r"another config's .*config.model.channels is 4 now and was 8 when saved"):
        train.run(tiny.config(model__channels=4), undisturbed[0])


@pytest.mark.parametrize('name', ['x [a]', 'a*b', '**', 'what?', 'ru[n]s/x'])
def test_a_workdir_that_is_a_pattern_is_refused_before_the_first_step(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'misreads .* in a path; .*\(--workdir\)'):
        train.run(tiny.config(), name)
    with pytest.raises(UserError, match=r'misreads .* in a path; .*\(config\.guidance\.classifier_workdir\)'):
        trained.load_classifier(tiny.config(guidance__classifier_workdir=name))


def test_data_whose_classes_stand_in_another_order_is_refused():
    checks.check_same_classes(('cat', 'dog'), ('cat', 'dog'), 'runs/pets')
    checks.check_same_classes(('cat', 'dog'), ('0', '1'), 'runs/pets')  # an imported checkpoint has no names
    with pytest.raises(UserError, match=r"label 0 is 'cat' in the data but 'dog' in the checkpoints of runs/pets"):
        checks.check_same_classes(('cat', 'dog'), ('dog', 'cat'), 'runs/pets')


def test_an_average_that_still_holds_the_first_parameters_is_told(tmp_path, capsys):
    train.run(tiny.config(train__num_steps=2, optim__ema_decay=0.5), tmp_path / 'quick')
    assert '25% of the average will still be the first parameters' in capsys.readouterr().out
    train.run(tiny.config(train__num_steps=2, optim__ema_decay=0.2), tmp_path / 'quicker')
    assert 'first parameters' not in capsys.readouterr().out
