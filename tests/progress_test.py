import time

import pytest

from cfg_jax import progress as module
from cfg_jax.progress import Progress, duration, rounded, shown


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0, '0s'), (59.9, '59s'), (60, '1m00s'), (754, '12m34s'), (3 * 3600 + 61, '3h01m'), (1e6, '11d13h')],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_progress_counts_from_where_it_starts(monkeypatch):
    clock = iter([10.0, 12.0, 16.0])
    monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
    progress = Progress(100, done=20)
    assert progress.rate(30) == (5.0, '14s')
    assert progress.rate(32) == (0.5, '2m16s')


def test_lines_come_every_ten_seconds_and_at_the_end(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    progress, quick = Progress(100), Progress(2)
    quick.show(2, 'quick')
    for done in range(10, 101, 10):
        now[0] += 4.0
        progress.show(done, 'w=1')
    assert capsys.readouterr().out.splitlines() == [
        'w=1  30/100 images  2.5 images/s  28s left',
        'w=1  60/100 images  2.5 images/s  16s left',
        'w=1  90/100 images  2.5 images/s  4s left',
        'w=1  100/100 images  2.5 images/s  0s left',
    ]


def test_slow_work_has_a_rate():
    texts = {1234.5: '1234', 56.7: '57', 7.84: '7.8', 0.96: '0.96', 0.123: '0.12', 0.0045: '0.0045', 0.0: '0'}
    assert {rate: rounded(rate) for rate in texts} == texts


def test_compiling_is_not_counted(monkeypatch, capsys):
    """The first batch compiles for 90 s, and the later ones take 5 s each; a single batch shows its seconds."""
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    progress, single = Progress(40, compiles=True), Progress(10, compiles=True)
    now[0] += 95.0
    single.show(10, 'w=0')
    for done in range(10, 41, 10):
        progress.show(done, 'w=1')
        now[0] += 5.0
    training = Progress(40)
    now[0] += 95.0
    training.restart(0)
    now[0] += 10.0
    training.show(1, 'step', unit='steps')
    assert capsys.readouterr().out.splitlines() == [
        'w=0  10/10 images  in 1m35s',
        'w=1  30/40 images  2.0 images/s  5s left',
        'w=1  40/40 images  2.0 images/s  0s left',
        'step  1/40 steps  0.1 steps/s  6m30s left',
    ]


def test_long_silence_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(module, '_FIRST_SECONDS', 0.1)
    monkeypatch.setattr(module, '_SHOWN_SECONDS', 0.2)
    with shown('compiling'):
        time.sleep(0.15)
    progress = Progress(20, compiles=True)
    with progress.watched('w=1'):
        time.sleep(0.15)
        progress.show(10, 'w=1')
        time.sleep(0.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ['compiling for 0s', 'w=1  0/20 images after 0s, the first of them with compiling']
    assert set(lines[2:]) == {'w=1  10/20 images after 0s'}
