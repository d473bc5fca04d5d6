import time

import pytest

from cfg_jax.progress import Progress, duration


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
