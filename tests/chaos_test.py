"""A training job of two processes that is killed in many ways at many moments ends like an undisturbed one."""

import json
import random
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from cfg_jax.jobs import train
from tests import processes_test, tiny

# XLA's sums on the CPU are reproducible if each process has one device.
CHANGES = {
    'model__channels': 4,
    'train__batch_size': 4,
    'train__log_every': 3,  # does not divide the steps between checkpoints
    'train__keep_checkpoints': 3,
}
KINDS = ('SIGKILL of all', 'SIGKILL of one', 'SIGTERM of all', 'SIGTERM of one', 'SIGKILL of all, saving')
SECONDS_TO_END = 100  # after one process is killed or all are asked to stop, on a busy machine


class Job:
    """Two processes that train in `workdir`. The output of process 0 is read as it comes."""

    def __init__(self, changes, workdir):
        self.workdir, self.lines = workdir, []
        self.processes = [
            tiny.main(*tiny.flags(**changes), f'--workdir={workdir}', start=subprocess.Popen, env=environment)
            for environment in processes_test.environments(2, devices=1)
        ]

    def until(self, condition):
        """Read on until condition() holds, and return True; return False if the job ends before."""
        for line in self.processes[0].stdout:
            self.lines.append(line)
            if condition():
                return True
        return False

    def steps(self):
        """Return the steps in the lines read so far."""
        return [int(line.split()[1].split('/')[0]) for line in self.lines if line.startswith('step ')]

    def end(self, limit=SECONDS_TO_END):
        """Return (exit statuses, texts of stderr, seconds) once all have ended."""
        started, errors = time.monotonic(), []
        for process in self.processes:
            errors.append(process.communicate(timeout=limit)[1])
        return [process.returncode for process in self.processes], errors, time.monotonic() - started


def saving(workdir):
    return any('tmp' in path.name for path in (workdir / 'checkpoints').glob('*'))


def disturb(job, kind, chance):
    """Kill the job, or a part of it, at a moment that `chance` chooses, and check how it ends; False if it was done."""
    step = chance.randrange(1, 12)
    if not job.until(lambda: len(job.steps()) * 3 > step):
        return False
    if kind.endswith('saving'):
        give_up = time.monotonic() + 20
        while not saving(job.workdir) and time.monotonic() < give_up:
            time.sleep(0.001)
    else:
        time.sleep(chance.random() * 0.2)
    number = signal.SIGTERM if 'SIGTERM' in kind else signal.SIGKILL
    hit = job.processes if 'all' in kind else [chance.choice(job.processes)]
    for process in hit:
        process.send_signal(number)
    statuses, errors, seconds = job.end()
    if set(statuses) == {0}:  # it was done before
        return False
    if number == signal.SIGTERM:
        assert statuses == [75, 75], errors
        assert 'preempted: ' in errors[0] and 'preempted' not in errors[1]
    else:
        assert all(process.returncode == -signal.SIGKILL for process in hit)
        # the other one ends by itself, with our own line or aborted by JAX; both statuses ask for a restart
        assert {process.returncode for process in job.processes if process not in hit} <= {1, -signal.SIGABRT}, errors
    print(f'{kind} after step {max(job.steps())}: {statuses} in {seconds:.1f} s', flush=True)
    return True


def lines_of(workdir):
    """Return the lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    for line in lines:
        del line['images_per_second']
    return lines


def chaos(tmp_path, kinds, num_steps, seed):
    changes = {**CHANGES, 'train__num_steps': num_steps, 'train__checkpoint_every': 10}
    undisturbed = Job(changes, tmp_path / 'undisturbed')
    statuses, errors, _ = undisturbed.end(limit=1200)
    assert statuses == [0, 0], errors
    chance, disturbed = random.Random(seed), 0
    for kind in kinds:
        disturbed += disturb(Job(changes, tmp_path / 'run'), kind, chance)
    assert disturbed == len(kinds), 'the run was done too soon'
    statuses, errors, _ = Job(changes, tmp_path / 'run').end(limit=1200)
    assert statuses == [0, 0], errors
    assert lines_of(tmp_path / 'run') == lines_of(tmp_path / 'undisturbed')
    assert [line['step'] for line in lines_of(tmp_path / 'run')] == [*range(3, num_steps, 3), num_steps]
    config = tiny.config(**changes)
    states = [jax.device_get(train.run(config, tmp_path / name)) for name in ('run', 'undisturbed')]
    assert int(states[0].step) == num_steps
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_a_job_that_is_disturbed_once(tmp_path):
    chaos(tmp_path, ['SIGTERM of one'], 31, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2])
def test_a_job_that_is_disturbed_20_times(tmp_path, seed):
    kinds = [*KINDS] * 4
    random.Random(seed).shuffle(kinds)
    chaos(tmp_path, kinds, 241, seed)
