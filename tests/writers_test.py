import json

from cfg_jax.training import writers


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
