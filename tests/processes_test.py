"""Several processes as one job, each with two virtual devices."""

import json
import resource
import signal
import socket
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from cfg_jax import build, trained
from cfg_jax.jobs import train
from tests import tfds_layout, tiny

CIFAR10 = {
    'data__source': 'tfds',
    'data__name': 'cifar10',
    'data__image_size': 32,
    'data__image_channels': 3,
    'train__batch_size': 12,
}


def free_port():
    with socket.socket() as server:
        server.bind(('localhost', 0))
        return server.getsockname()[1]


def environments(count, devices=2):
    """Return the environments of `count` processes of one job, each with this many virtual devices."""
    address = {'JAX_COORDINATOR_ADDRESS': f'localhost:{free_port()}', 'JAX_NUM_PROCESSES': str(count)}
    return [{**tiny.environment(devices), **address, 'JAX_PROCESS_ID': str(index)} for index in range(count)]


def run_script(text, count, *arguments, devices=2):
    """Run a script as `count` processes of one job: [(exit status, stdout, stderr)]."""
    processes = [
        tiny.forked(*arguments, env=environment, patch=f'{text}\nsys.exit()')
        for environment in environments(count, devices)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def start_together(count, *arguments, workdir):
    """Run main as `count` processes of one job, and return their outputs once all have ended well."""
    processes = [
        tiny.forked(*arguments, f'--workdir={workdir}', env=environment) for environment in environments(count)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    for process, (out, err) in zip(processes, outputs):
        assert process.returncode == 0, out + err
    return [out for out, _ in outputs]


def losses(workdir):
    return [json.loads(line)['loss'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def cifar10(tmp_path_factory):
    """cifar10 in TFDS's layout, 61 images, and the changes of a tiny run on it."""
    data_dir = tmp_path_factory.mktemp('tensorflow_datasets')
    tfds_layout.write_cifar10(data_dir, 61)
    return {
        **CIFAR10,
        'data__data_dir': str(data_dir),
        'data__flip': True,
        'train__num_steps': 6,
        'train__log_every': 1,
        'train__checkpoint_every': 3,
        'train__grid_images': 20,
    }


@pytest.mark.parametrize('fsdp', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(cifar10, tmp_path, capfd, fsdp):
    """They get the same losses from the same images, with the state split over them or not, and draw a grid of samples.

    One process resumes from their checkpoint, on one device, with the state whole; the other losses are its own. Their
    snapshots of averages make the same average.
    """
    averaged = {**cifar10, 'optim__ema_lengths': (0.1, 0.2), 'optim__ema_snapshot_every': 1}
    alone, together = tmp_path / 'alone', tmp_path / 'together'
    train.run(tiny.config(**averaged), alone)
    half = {**averaged, 'train__num_steps': 3, 'train__grid_every': 3, 'train__fsdp': fsdp}
    start_together(2, *tiny.flags(**half), workdir=together)
    assert (together / 'samples' / 'step_00000003.png').exists()
    train.run(tiny.config(**averaged), together)
    assert 'resuming from' in capfd.readouterr().out
    assert len(losses(alone)) == 6
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-5)
    found, wanted, other = (
        ravel_pytree(trained.load_alone(tiny.config(**averaged), each, ema=ema).params)[0]
        for each, ema in ((together, 0.15), (alone, 0.15), (alone, 0.16))
    )
    assert jnp.linalg.norm(found - wanted) < 0.1 * jnp.linalg.norm(other - wanted)


@pytest.mark.slow
def test_twenty_steps_are_the_same_wherever_they_are_computed(cifar10, tmp_path):
    """On 1, 4 and 2x2 devices, whole and split: another order of sums, losses that differ by less than 2e-6."""
    flags = tiny.flags(**{**cifar10, 'train__num_steps': 20})
    for fsdp in (False, True):
        for devices in (1, 4):
            workdir = tmp_path / f'{fsdp}_{devices}'
            done = tiny.main(*flags, f'--config.train.fsdp={fsdp}', f'--workdir={workdir}', devices=devices)
            assert done.returncode == 0, done.stderr
        start_together(2, *flags, f'--config.train.fsdp={fsdp}', workdir=tmp_path / f'{fsdp}_2x2')
    found = {path.name: losses(path) for path in tmp_path.iterdir()}
    assert len(found) == 6 and len(found['False_1']) == 20
    for name, values in found.items():
        np.testing.assert_allclose(values, found['False_1'], rtol=2e-6, err_msg=name)


STREAM = """
import sys
import jax
import numpy as np
from cfg_jax import build, runtime
from cfg_jax.distributed import join
from cfg_jax.training import sharding
from tests import processes_test, tfds_layout, tiny

runtime.configure()
join.join()
config = tiny.config(**processes_test.CIFAR10, data__data_dir=sys.argv[1])
# As on a TPU slice, where neighbours of the mesh need not be one process's.
mesh = sharding.make_mesh([jax.devices()[number] for number in (0, 2, 1, 3)])
batches = sharding.prefetch(build.train_batches(config, build.source(config), mesh), mesh)
for _ in range(61):
    batch, position = next(batches)
    for shard in batch['image'].addressable_shards:
        for row, image in zip(range(*shard.index[0].indices(12)), np.asarray(shard.data)):
            print(position, row, tfds_layout.number_of(image))
"""


def test_every_image_is_seen_once_an_epoch(cifar10):
    """12 epochs of 61 images in batches of 12, on the four devices of two processes: the same as for one process."""
    data_dir = cifar10['data__data_dir']
    seen = {}
    for status, out, err in run_script(STREAM, 2, data_dir):
        assert status == 0, err
        rows = [tuple(map(int, line.split())) for line in out.splitlines() if line[0].isdigit()]
        assert len(rows) == 61 * 6  # half of each batch
        assert not seen.keys() & {row[:2] for row in rows}
        seen |= {(position, row): number for position, row, number in rows}
    stream = [seen[key] for key in sorted(seen)]
    config = tiny.config(**CIFAR10, data__data_dir=data_dir)
    alone = build.train_batches(config, build.source(config))
    assert stream == [tfds_layout.number_of(image) for _ in range(61) for image in next(alone)['image']]
    epochs = np.array(stream).reshape(12, 61)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(61), (12, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 12


DAMAGE = """
import shutil, sys
from pathlib import Path
import jax
import numpy as np
from cfg_jax import runtime
from cfg_jax.distributed import join
from cfg_jax.training import checkpoints, sharding
from cfg_jax.training.train_state import TrainState

runtime.configure()
join.join()
mesh = sharding.make_mesh()
base = Path(sys.argv[1])

def state_of(value):
    params = {'w': jax.random.normal(jax.random.key(value), (64, 32))}
    return TrainState(jax.numpy.int32(value), params, params, (params,))

layouts = [sharding.replicated(mesh), sharding.batch_sharding(mesh)]
make = jax.jit(state_of, out_shardings=TrainState(layouts[0], *[{'w': layouts[1]}] * 2, ({'w': layouts[1]},)))
first = checkpoints.Checkpoints(base / 'whole', {})
for step in (1, 2):
    first.save(step, make(step), config={}, class_names=())
first.close()
abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), make(0))

def damage(kind, step):
    files = sorted(path for path in (step / 'state').rglob('*') if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    if kind == 'truncated':
        largest.write_bytes(content[: len(content) // 2])
    elif kind == 'flipped':
        middle = len(content) // 2
        largest.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif kind == 'deleted':
        largest.unlink()
    elif kind == 'empty':
        shutil.rmtree(step)
        step.mkdir()
    elif kind == 'temporary':
        step.rename(step.with_name('2.orbax-checkpoint-tmp'))

read = checkpoints.Checkpoints._read
for kind in ('truncated', 'flipped', 'deleted', 'empty', 'temporary', 'in one process'):
    run = base / kind.replace(' ', '_') / 'c'
    if jax.process_index() == 0:
        shutil.copytree(base / 'whole', run)
        damage(kind, run / '2')
    checkpoints._agreed('')  # waits

    def reading(self, step, restore_step):
        if kind == 'in one process' and jax.process_index() == 1 and step == 2:
            return None, None, 'stale'
        return read(self, step, restore_step)

    checkpoints.Checkpoints._read = reading
    again = checkpoints.Checkpoints(run, {})
    restored = again.restore(abstract)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(*[[s.data for s in x.addressable_shards] for x in (a, b)]),
                 restored.tree, make(1))
    again.save(2, make(2), config={}, class_names=())
    again.close()
    print('restored', restored.step, *sorted(path.name for path in run.parent.rglob('c/*')), flush=True)
jax.distributed.shutdown()
"""


def test_two_processes_skip_the_same_damaged_checkpoint(tmp_path):
    """Whatever the damage, and even if only one of them sees it; the leftovers of a kill are cleared away."""
    for status, out, err in run_script(DAMAGE, 2, tmp_path):
        assert status == 0, out + err
        assert [line for line in out.splitlines() if line.startswith('restored')] == ['restored 1 1 2'] * 6
        assert 'checkpoint 2 is damaged (stale, in process 1); using step 1' in out


def end_of(flags, tmp_path, own=()):
    """Run two processes with these flags, the second with `own` as well: [(exit status, stderr)], seconds."""
    started = time.monotonic()
    processes = [
        tiny.main(*flags, *more, f'--workdir={tmp_path}', start=subprocess.Popen, env=environment)
        for environment, more in zip(environments(2), ((), own))
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, err) for process, err in zip(processes, errors)], time.monotonic() - started


def test_an_error_of_one_process_ends_both(tmp_path):
    own = ('--config.data.source=folder', '--config.data.data_dir=/nowhere')
    (first, second), _ = end_of(tiny.flags(), tmp_path, own)
    assert (first[0], second[0]) == (2, 2), first[1] + second[1]
    line = second[1].splitlines()[-1]
    assert line.startswith('[1] error: ') and '/nowhere' in line
    assert first[1].splitlines()[-1] == line.replace('[1] error: ', 'error: process 1: ')


@pytest.mark.slow  # a minute and a half, for files that come late
def test_processes_have_to_share_the_workdir(tmp_path):
    """They end with one line instead of waiting for each other's files forever."""
    (tmp_path / 'b').mkdir()
    processes = [
        tiny.main(*tiny.flags(), f'--workdir={tmp_path / name}', start=subprocess.Popen, env=environment)
        for environment, name in zip(environments(2), 'ab')
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    line = errors[0].splitlines()[-1]
    assert line.startswith('error: process 1 does not see') and f'{tmp_path}/a' in line and '--workdir' in line
    assert not list((tmp_path / 'a').iterdir()) and not list((tmp_path / 'b').iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('full', [0, 1])
def test_a_full_disk_of_one_process_ends_both(tmp_path, full):
    """The checkpoint before the half-written one stays."""
    flags = tiny.flags(
        train__fsdp=True,
        model__channels=32,
        train__num_steps=100_000,
        train__checkpoint_every=10,
        train__batch_size=4,
    )
    processes = [
        tiny.main(*flags, f'--workdir={tmp_path}', start=subprocess.Popen, env=environment)
        for environment in environments(2, devices=1)
    ]
    saved = tmp_path / 'checkpoints'
    while not any(path.name.isdigit() for path in saved.glob('*')):
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.1)
    resource.prlimit(processes[full].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    (line,) = [line for line in errors[0].splitlines() if line.startswith('error: ')]
    assert f'a checkpoint cannot be written to {saved}: File too large; the last saved checkpoint is {saved}/' in line
    assert ('process 1: ' in line) == (full == 1)
    assert any(path.name.isdigit() for path in saved.glob('*'))


@pytest.mark.slow
def test_an_error_of_all_is_shown_once(tmp_path):
    (first, second), _ = end_of(tiny.flags(train__batch_size=6), tmp_path)
    assert (first[0], second[0]) == (2, 2), first[1] + second[1]
    assert first[1].splitlines()[-1].startswith('error: a batch of 6 images does not divide over 4 devices')
    assert 'error' not in second[1]


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['sample', 'evaluate'])
def test_drawing_ends_at_once(tmp_path, mode):
    """SIGTERM to one of two processes that draw: both end with 75, and the same command resumes."""
    assert tiny.main(*tiny.flags(), f'--workdir={tmp_path}').returncode == 0
    many = {'sample__shard_images': 20, 'sample__num_images': 20_000, 'eval__num_samples': 20_000}
    flags = [*tiny.flags(**many, eval__guidance_weights=(0.0,)), f'--mode={mode}', f'--workdir={tmp_path}']
    processes = [tiny.main(*flags, start=subprocess.Popen, env=environment) for environment in environments(2)]
    while len(list(tmp_path.rglob('shard_*.npz'))) < 4:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], errors
    assert errors[0].splitlines()[-1] == 'preempted: rerun the same command to resume from what was saved'
    shards = len(list(tmp_path.rglob('shard_*.npz')))
    few = [flag.replace('20000', str(20 * shards + 20)) for flag in flags]
    again = tiny.main(*few)
    assert again.returncode == 0 and 'resuming: ' in again.stdout, again.stderr


SILENCE = """
import os, signal, sys, time
from cfg_jax import runtime
from cfg_jax.distributed import join

runtime.configure()
join.join(heartbeat_seconds=10)
time.sleep(1)
if os.environ['JAX_PROCESS_ID'] == sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(('killed', 'limit'), [(0, 10), (1, 40)])
def test_a_silent_process_counts_as_dead(killed, limit):
    """Even if the other one does not wait for it: process 0's end shows at once, another's by its missing heartbeat."""
    started = time.monotonic()
    ended = run_script(SILENCE, 2, killed)
    assert ended[killed][0] == -signal.SIGKILL
    assert ended[1 - killed][0] == -signal.SIGABRT
    assert time.monotonic() - started < limit + 15  # of starting
