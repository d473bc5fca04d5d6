"""SIGTERM and Ctrl-C end a job soon, whatever it is doing: the exit status, one line, and what is saved."""

import os
import signal
import time

import pytest

from cfg_jax.distributed import job
from tests import tiny

# Before the program runs, a patch's lines; `say` writes what has been reached to a file.
SAY = """
def say(text):
    Path({said!r}).open('a').write(text + '\\n')

"""
STALLED = """
from cfg_jax.data import sources

digits, reads = sources.digits, []

def stalled():
    data = digits()
    batch = data.batch

    def read(indices):
        reads.append(0)
        if len(reads) > {reads}:
            say('stalled')
            time.sleep(1000)
        return batch(indices)

    data.batch = read
    return data

sources.digits = stalled
"""
COMPILING = """
import ctypes, signal, threading
import jax
from jax._src import compiler  # as long a compilation as one likes

jax.config.update('jax_enable_compilation_cache', False)

compile = compiler.backend_compile_and_load

def slowly(*arguments, **options):
    threading.Timer(0.2, say, ['compiling']).start()  # once the last line has begun
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a signal to this thread would end C's sleep
    ctypes.CDLL(None).sleep(1000)  # in C: Python's own handlers of signals do not run

compiler.backend_compile_and_load = slowly
"""
HANGING = """
from cfg_jax.training import checkpoints, writers

def hang(*arguments, **options):
    say('writing')
    time.sleep(1000)

{function} = hang
"""
SLOW = """
from cfg_jax.jobs import train

summarise = train.summarise

def slowly(collected):
    say('step')
    time.sleep(1)
    return summarise(collected)

train.summarise = slowly
"""


@pytest.fixture
def start(tmp_path):
    """Start the patched program in a session of its own, and return it with the file of what it said."""
    running = []

    def start(patch, *flags):
        said = tmp_path / 'said'
        patch = SAY.format(said=str(said)) + patch
        process = tiny.forked(*flags, f'--workdir={tmp_path / "run"}', patch=patch, start_new_session=True)
        running.append(process)
        return process, said

    yield start
    for process in running:
        process.kill()
        process.communicate()


def until(said, text, process, times=1):
    while not (said.exists() and said.read_text().split().count(text) >= times):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def ended(process, number, within):
    """Send the signal, and return (exit status, lines of stderr).

    The process must end within so many seconds, or within more on a machine that has more to do than cores.
    """
    within *= max(1, os.getloadavg()[0] / os.cpu_count())
    started = time.monotonic()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < within, out + err
    return process.returncode, err.splitlines()


@pytest.mark.parametrize(
    ('reads', 'number', 'code', 'word'),
    [
        (0, signal.SIGINT, 130, 'stopped'),
        (5, signal.SIGTERM, 75, 'preempted'),
        pytest.param(0, signal.SIGTERM, 75, 'preempted', marks=pytest.mark.slow),
        pytest.param(5, signal.SIGINT, 130, 'stopped', marks=pytest.mark.slow),
    ],
)
def test_while_no_batch_comes(start, tmp_path, reads, number, code, word):
    """At once at the first batch; later the state of the last step is saved, whose batch did come."""
    process, said = start(
        STALLED.replace('{reads}', str(reads)), *tiny.flags(train__num_steps=9, train__checkpoint_every=3)
    )
    until(said, 'stalled', process)
    status, lines = ended(process, number, 10)
    saved = 'step 4 is saved; rerun the same command to resume from it'  # the fifth batch was read ahead
    assert status == code, lines
    assert lines == [f'{word}: {saved if reads else "rerun the same command to resume from what was saved"}']
    assert (tmp_path / 'run' / 'checkpoints' / '4').exists() == bool(reads)


@pytest.mark.parametrize(
    ('function', 'what', 'number', 'code', 'word'),
    [
        ('checkpoints._Manager.save', 'a checkpoint', signal.SIGTERM, 75, 'preempted'),
        ('writers.MetricWriter.scalars', 'metrics', signal.SIGINT, 130, 'stopped'),
    ],
)
def test_while_a_disk_hangs_in_writing(start, function, what, number, code, word):
    process, said = start(HANGING.replace('{function}', function), *tiny.flags())
    until(said, 'writing', process)
    line = f'{word} while writing {what}: rerun the same command to resume from what was saved'
    assert ended(process, number, 10) == (code, [line])


def test_a_slow_disk_is_not_taken_for_one_that_hangs(monkeypatch):
    """What is written may take as long as it likes, if it grows."""
    monkeypatch.setattr(job, '_POLL_SECONDS', 0.01)
    monkeypatch.setattr(job, '_WRITE_STALL_SECONDS', 0.3)
    ends, written, slow = [], [], job.Job()
    monkeypatch.setattr(slow, 'end', lambda *end: ends.append(end))
    slow._requested = time.monotonic()
    with slow.waiting('writing a checkpoint', lambda: len(written)):
        for _ in range(40):
            written.append(0)
            time.sleep(0.02)
            slow._check_waits()
        assert not ends
        time.sleep(0.6)
        slow._check_waits()
    slow._check_waits()
    line = 'preempted while writing a checkpoint: rerun the same command to resume from what was saved'
    assert ends == [(75, line)]


def test_ctrl_c_while_compiling(start):
    process, said = start(COMPILING, *tiny.flags())
    until(said, 'compiling', process)
    assert ended(process, signal.SIGINT, 3) == (130, ['stopped: rerun the same command to resume from what was saved'])


def test_ctrl_c_in_training_saves(start, tmp_path):
    process, said = start(SLOW, *tiny.flags(train__num_steps=1000, train__log_every=1, train__checkpoint_every=1000))
    until(said, 'step', process, 2)
    status, lines = ended(process, signal.SIGINT, 10)
    (saved,) = (path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir())
    assert status == 130 and lines == [f'stopped: step {saved} is saved; rerun the same command to resume from it']


def test_a_second_ctrl_c_does_not_wait(start, tmp_path):
    slower = SLOW.replace('sleep(1)', 'sleep(60)')
    process, said = start(slower, *tiny.flags(train__num_steps=1000, train__log_every=1))
    until(said, 'step', process)
    for _ in range(2):  # as one Ctrl-C that comes twice
        process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    line = 'stopped without saving: rerun the same command to resume from what was saved'
    assert ended(process, signal.SIGINT, 3) == (130, [line])
    assert not list((tmp_path / 'run' / 'checkpoints').iterdir())
