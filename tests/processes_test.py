"""Several processes as one job, each with two virtual devices."""

import json
import socket
import subprocess

import numpy as np
import pytest

from tests import tfds_layout, tiny


def free_port():
    with socket.socket() as server:
        server.bind(('localhost', 0))
        return server.getsockname()[1]


def environments(count, devices=2):
    """Of `count` processes of one job, each with so many virtual devices."""
    address = {'JAX_COORDINATOR_ADDRESS': f'localhost:{free_port()}', 'JAX_NUM_PROCESSES': str(count)}
    return [{**tiny.environment(devices), **address, 'JAX_PROCESS_ID': str(index)} for index in range(count)]


def start_together(count, *arguments, workdir):
    """Runs main as `count` processes of one job; their outputs, once all have ended well."""
    processes = [
        tiny.main(*arguments, f'--workdir={workdir}', start=subprocess.Popen, env=environment)
        for environment in environments(count)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    for process, (out, err) in zip(processes, outputs):
        assert process.returncode == 0, out + err
    return [out for out, _ in outputs]


def losses(workdir):
    return [json.loads(line)['loss'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def cifar10(tmp_path_factory):
    """cifar10 in TFDS's layout, 61 images, and the flags of a tiny run on it."""
    data_dir = tmp_path_factory.mktemp('tensorflow_datasets')
    tfds_layout.write_cifar10(data_dir, 61)
    return tiny.flags(
        data__source='tfds',
        data__name='cifar10',
        data__data_dir=data_dir,
        data__image_size=32,
        data__image_channels=3,
        data__flip=True,
        train__batch_size=12,
        train__num_steps=6,
        train__log_every=1,
        train__checkpoint_every=3,
        optim__decay='constant',
        train__grid_images=20,
    )


def test_two_processes_train_as_one_does(cifar10, tmp_path):
    """The same losses from the same images; and their checkpoint goes on in one process, on another device count."""
    alone = tiny.main(*cifar10, f'--workdir={tmp_path / "alone"}', devices=4)
    assert alone.returncode == 0, alone.stderr
    half = [flag for flag in cifar10 if 'num_steps=6' not in flag]
    grid = '--config.train.grid_every=3'
    start_together(2, *half, '--config.train.num_steps=3', grid, workdir=tmp_path / 'together')
    assert (tmp_path / 'together' / 'samples' / 'step_00000003.png').exists()
    resumed = tiny.main(*cifar10, f'--workdir={tmp_path / "together"}')
    assert resumed.returncode == 0 and 'resuming from' in resumed.stdout, resumed.stderr
    assert len(losses(tmp_path / 'alone')) == 6
    np.testing.assert_allclose(losses(tmp_path / 'together'), losses(tmp_path / 'alone'), rtol=1e-5)


STREAM = """
import sys
import jax
import numpy as np
from cfg_jax import build, runtime, sharding
from tests import tfds_layout, tiny

pytestmark = pytest.mark.xdist_group('processes')  # long: begun before the many short ones

runtime.configure()
config = tiny.config(
    data__source='tfds', data__name='cifar10', data__data_dir=sys.argv[1], data__image_size=32, data__image_channels=3,
    train__batch_size=12,
)
mesh = sharding.make_mesh()
batches = sharding.prefetch(build.train_batches(config, build.source(config)), mesh)
for _ in range(61):
    batch, position = next(batches)
    for shard in batch['image'].addressable_shards:
        for row, image in zip(range(*shard.index[0].indices(12)), np.asarray(shard.data)):
            print(position, row, tfds_layout.number_of(image))
"""


def test_every_image_is_seen_once_an_epoch(cifar10, tmp_path):
    """12 epochs of 61 images in batches of 12, as they lie on the four devices of two processes."""
    (data_dir,) = [flag.split('=')[1] for flag in cifar10 if 'data_dir' in flag]
    script = tmp_path / 'stream.py'
    script.write_text(STREAM)
    seen = {}
    processes = [
        subprocess.Popen(
            [tiny.sys.executable, script, data_dir],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tiny.ROOT,
            env={**environment, 'PYTHONPATH': str(tiny.ROOT)},
        )
        for environment in environments(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        rows = [tuple(map(int, line.split())) for line in out.splitlines() if line[0].isdigit()]
        assert len(rows) == 61 * 6  # half of each batch
        assert not seen.keys() & {row[:2] for row in rows}
        seen |= {(position, row): number for position, row, number in rows}
    stream = [seen[key] for key in sorted(seen)]
    epochs = np.array(stream).reshape(12, 61)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(61), (12, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 12
