import json

import pytest

from cfg_jax import writers


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0, '0s'), (59.9, '59s'), (60, '1m00s'), (754, '12m34s'), (3 * 3600 + 61, '3h01m'), (1e6, '11d13h')],
)
def test_durations(seconds, text):
    assert writers.duration(seconds) == text


def test_progress_counts_from_where_it_starts(monkeypatch):
    clock = iter([10.0, 12.0, 16.0])
    monkeypatch.setattr(writers.time, 'monotonic', lambda: next(clock))
    progress = writers.Progress(100, done=20)
    assert progress.rate(30) == (5.0, '14s')
    assert progress.rate(32) == (0.5, '2m16s')


def test_lines_come_every_ten_seconds_and_at_the_end(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(writers.time, 'monotonic', lambda: now[0])
    progress, quick = writers.Progress(100), writers.Progress(2)
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


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    writer = writers.MetricWriter(tmp_path)
    for step in (10, 20, 30):
        writer.scalars(step, {'loss': step / 10, 'nothing_counted': float('nan')})
    writer.close()
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    writer = writers.MetricWriter(tmp_path, step=20)
    writer.scalars(30, {'loss': 7.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert lines == [{'step': 10, 'loss': 1.0}, {'step': 20, 'loss': 2.0}, {'step': 30, 'loss': 7.0}]
