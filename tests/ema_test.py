"""Averages of other lengths, from training to evaluation: whole jobs on a network of some steps."""

import csv
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image

import cfg_jax
from cfg_jax import build, phema, trained
from cfg_jax.errors import UserError
from cfg_jax.jobs import evaluate, plan, train
from cfg_jax.jobs.evaluate import curves
from cfg_jax.training import checkpoints
from tests import tiny

LENGTHS = {'optim__ema_lengths': (0.05, 0.1), 'optim__ema_snapshot_every': 10}
RUN = {'train__num_steps': 80, 'train__checkpoint_every': 20, 'train__keep_every': 40, **LENGTHS}


def config(**changes):
    return tiny.config(eval__judge_steps=20, **{**RUN, **changes})


def snapshot_steps(workdir):
    return sorted(int(path.name) for path in (workdir / 'ema_snapshots').glob('*') if path.name.isdigit())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run that nothing stops: (workdir, its last state, its parameters after each step)."""
    workdir, of_steps = tmp_path_factory.mktemp('ema'), []
    sharded = build.sharded_training

    def watched(config, mesh):
        init, abstract, step = sharded(config, mesh)
        lower = step.lower

        def watched_step(*arguments):
            state, metrics = step(*arguments)
            of_steps.append(jax.device_get(state.params))
            return state, metrics

        watched_step.lower = lower
        return init, abstract, watched_step

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, 'sharded_training', watched)
        state = train.run(config(), workdir)
    return workdir, jax.device_get(state), of_steps


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def direct(of_steps, length, step):
    """The average of the profile, of all parameters after each step."""
    return phema.weights_of_steps(length, step) @ np.stack([vector(each) for each in of_steps[:step]])


def test_the_averages_are_those_of_their_profiles(run):
    _, state, of_steps = run
    assert set(state.averages) == {'0.05', '0.1'} and len(of_steps) == 80
    for name, average in state.averages.items():
        np.testing.assert_allclose(vector(average), direct(of_steps, float(name), 80), atol=1e-6)


def test_they_change_nothing_else(run, tmp_path):
    plain = train.run(config(optim__ema_lengths=(), optim__ema_snapshot_every=0), tmp_path)
    assert plain.averages is None and not (tmp_path / 'ema_snapshots').exists()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(plain), run[1].replace(averages=None))


def test_a_length_that_was_not_kept(run):
    workdir, _, of_steps = run
    assert snapshot_steps(workdir) == list(range(10, 81, 10))
    scale = np.abs(vector(of_steps[-1])).max()
    models = [cfg_jax.load(workdir, ema=length, step=step) for step, length in ((80, 0.05), (80, 0.14), (40, 0.07))]
    for model, (step, length) in zip(models, ((80, 0.05), (80, 0.14), (40, 0.07))):
        assert model.step == step
        error = np.abs(vector(model.params) - direct(of_steps, length, step)).max() / scale
        assert error < (1e-6 if length == 0.05 else 2e-3), (step, length, error)
    assert len({each.digest for each in (*models, cfg_jax.load(workdir), cfg_jax.load(workdir, ema=False))}) == 5


def test_a_killed_run_resumes_to_the_same_bits(run, tmp_path):
    """SIGKILL right after a checkpoint, then SIGTERM between two snapshots; snapshots of later steps are removed."""
    undisturbed, state, _ = run
    workdir, resumed_at = tmp_path / 'killed', 0
    flags = tiny.flags(eval__judge_steps=20, **RUN)
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = tiny.forked(*flags, f'--workdir={workdir}')
        for _ in process.stdout:
            if max(saved_steps(workdir), default=0) > resumed_at:
                break
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == (75 if number == signal.SIGTERM else -number), err
        resumed_at = max(saved_steps(workdir))
        assert resumed_at < 80
    last = train.run(config(), workdir)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(last), state)
    assert snapshot_steps(workdir) == snapshot_steps(undisturbed)
    assert sums_of(workdir) == sums_of(undisturbed)


def saved_steps(workdir):
    return [int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()]


def sums_of(workdir):
    """The checksums of all snapshots, each compared with what can be read."""
    found = {}
    with checkpoints.Checkpoints(workdir / 'ema_snapshots', {}, read_only=True) as saved:
        params = jax.eval_shape(lambda: build.init_params(config(), jax.random.key(0)))
        for step in saved.steps():
            tree = saved.restore_parts({'0.05': params, '0.1': params}, step=step).tree
            found[step] = checkpoints.checksums(tree)
    return found


def test_a_snapshot_that_was_not_written_and_one_too_many(run, tmp_path):
    """Killed between the checkpoint of a step and its snapshot, or after snapshots of later steps."""
    undisturbed, _, _ = run
    workdir = tmp_path / 'copy'
    shutil.copytree(undisturbed, workdir)
    shutil.rmtree(workdir / 'checkpoints' / '80')
    shutil.rmtree(workdir / 'ema_snapshots' / '60')
    shutil.copytree(workdir / 'ema_snapshots' / '70', workdir / 'ema_snapshots' / '77')
    assert max(saved_steps(workdir)) == 60
    train.run(config(), workdir)
    assert snapshot_steps(workdir) == snapshot_steps(undisturbed)
    assert sums_of(workdir) == sums_of(undisturbed)


# ---------------------------------------------------------------- evaluation


def table(path):
    return list(csv.DictReader(path.open()))


def test_lengths_are_curves_and_a_picture(run, capsys):
    workdir, _, _ = run
    rows = evaluate.run(config(eval__folder='ema', eval__ema=(True, 0.05, 0.1), eval__guidance_weights=(0.0,)), workdir)
    assert [row['variant'] for row in rows] == ['EMA', 'EMA 0.05', 'EMA 0.1']
    assert [row['parameters'] for row in rows] == ['ema', 'post-hoc', 'post-hoc']
    assert [row['ema_length'] for row in rows] == [None, 0.05, 0.1]
    assert len({row['model_sha256'] for row in rows}) == len({row['samples_sha256'] for row in rows}) == 3
    assert f'loaded the EMA of length 0.1 at {workdir}/ema_snapshots/80' in capsys.readouterr().out
    assert Image.open(workdir / 'ema' / 'fid_over_ema.png').width > 600
    assert [row['ema_length'] for row in table(workdir / 'results.csv')] == ['', '0.05', '0.1']


def test_a_weak_model_of_another_length(run, capsys):
    """Every combination but those in which the model would be guided by itself; w = 0 is drawn once for each model."""
    workdir, _, _ = run
    both = {'eval__ema': (0.05, 0.1), 'eval__weak_ema': (0.05, 0.1, False), 'guidance__weak': 'checkpoint'}
    rows = evaluate.run(config(eval__folder='weak', **both), workdir)
    assert [row['variant'] for row in rows[::2]] == [
        *('EMA 0.05, weak EMA 0.1', 'EMA 0.05, weak parameters'),
        *('EMA 0.1, weak EMA 0.05', 'EMA 0.1, weak parameters'),
    ]
    assert [row['weak_ema_length'] for row in rows[::2]] == [0.1, None, 0.05, None]
    assert len({row['samples_sha256'] for row in rows}) == 6
    assert Image.open(workdir / 'weak' / 'fid_over_ema.png').width > 600
    names = {path.name for path in (workdir / 'sample_sets').iterdir()}
    assert any(name.startswith('ancestral3_v1_checkpoint_ema_0.05_w1_seed0_ema0.1_') for name in names)


def test_parameters_are_read_curve_by_curve(run, monkeypatch):
    workdir, _, _ = run
    every = curves.curves(config(eval__ema=(True, 0.05, False, 0.1)))
    model, read, load = trained.load_alone(config(), workdir), [], trained.load_alone

    def watched(*arguments, **options):
        read.append(options['ema'])
        return load(*arguments, **options)

    monkeypatch.setattr(trained, 'load_alone', watched)
    curves.check_models(every, model)
    assert not read
    for number, found in enumerate(curves.models(every, model)):
        assert len(read) == number  # the first is `model` itself
        assert found.tag == ('', 'ema0.05', 'raw', 'ema0.1')[number]
    assert read == [0.05, False, 0.1]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'eval__ema': (True, 0.01)},
            r'^an EMA of length 0\.01 cannot be made of the 8 snapshots up to step 80',
        ),
        (
            {'eval__ema': (0.05,), 'eval__steps': (60, 55)},
            r'^no checkpoint of step 55 in .*/ema_snapshots; there are',
        ),
        (
            {'guidance__weak': 'checkpoint', 'guidance__weak_ema': 0.28},
            r'^an EMA of length 0\.28 cannot be made of the 8 snapshots',
        ),
        (
            {'guidance__weak': 'checkpoint', 'eval__ema': (0.05,), 'eval__weak_ema': (0.05,)},
            r'^config\.eval\.weak_ema is \(0\.05,\), the parameters of the model itself',
        ),
        (
            {'eval__ema': (True, 'x')},
            r"^config\.eval\.ema is \(True, 'x'\); it must be a tuple of different values",
        ),
        (
            {'eval__ema': (0.05, 0.05)},
            r'^config\.eval\.ema is \(0\.05, 0\.05\); it must be a tuple of different',
        ),
        (
            {'eval__ema': (0.4,)},
            r'^config\.eval\.ema is \(0\.4,\); .* a number from 0\.001 to 0\.289 \(sigma_rel\)\.$',
        ),
        (
            {'eval__weak_ema': (0.1,)},
            r'^config\.eval\.weak_ema is \(0\.1,\); it must be \(\) unless config\.guidance\.weak',
        ),
        (
            {'guidance__weak_ema': 0.1},
            r'^config\.guidance\.weak_ema is 0\.1; it must be True unless config\.guidance\.weak',
        ),
        (
            {'eval__ema': (1e-160,)},
            r'^config\.eval\.ema is \(1e-160,\); .* a number from 0\.001 to 0\.289 ',
        ),
        (
            {'optim__ema_lengths': (0.05, 0.05)},
            r'^config\.optim\.ema_lengths is .*; it must be a tuple of different',
        ),
        (
            {'optim__ema_lengths': (0.5,)},
            r'^config\.optim\.ema_lengths is .*; it must be a tuple of different',
        ),
        (
            {'optim__ema_snapshot_every': 0},
            r'^config\.optim\.ema_snapshot_every is 0; it must be a divisor of config',
        ),
        (
            {'optim__ema_snapshot_every': 7},
            r'^config\.optim\.ema_snapshot_every is 7; it must be a divisor of config',
        ),
        (
            {'optim__ema_lengths': ()},
            r'^config\.optim\.ema_snapshot_every is 10; it must be 0 unless config\.optim',
        ),
    ],
)
def test_choices_that_cannot_be(run, changes, message):
    workdir, _, _ = run
    with pytest.raises(UserError, match=message):
        evaluate.run(config(eval__folder='refused', **changes), workdir)
    assert not (workdir / 'refused').exists()


def test_a_workdir_without_snapshots(tmp_path):
    plain = tiny.config(train__num_steps=2)
    train.run(plain, tmp_path)
    message = r'^no snapshots in .*/ema_snapshots, of which an EMA of a given length is made; train with config'
    with pytest.raises(UserError, match=message):
        cfg_jax.load(tmp_path, ema=0.1)
    with pytest.raises(UserError, match=message):
        evaluate.run(tiny.config(eval__ema=(True, 0.1)), tmp_path)
    kept = tiny.config(optim__ema_lengths=(0.1,), optim__ema_snapshot_every=1)
    with pytest.raises(UserError, match=r'config\.optim\.ema_lengths is \[0\.1\] now and was \[\] when saved'):
        train.run(kept, tmp_path)


def test_the_identity_of_a_run():
    """Snapshots may come more often after a restart; the averages may not change."""
    identity = build.run_identity(config())
    assert build.run_identity(config(optim__ema_snapshot_every=5)) == identity
    assert build.run_identity(config(optim__ema_lengths=(0.1,))) != identity


@pytest.mark.parametrize('fsdp', [False, True])
def test_the_plan_counts_the_averages(fsdp):
    parts = plan.state_bytes(config(train__fsdp=fsdp, model__channels=32), 2)
    assert parts['averages'] == 2 * parts['EMA'] and 'averages' not in plan.state_bytes(tiny.config(), 2)
