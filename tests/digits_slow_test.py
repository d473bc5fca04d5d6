"""The main job, whole: what the README promises of it. Minutes long: pytest -m slow."""

import csv

import pytest

from tests import tiny


@pytest.mark.slow
def test_the_curve_has_the_papers_shape(tmp_path):
    done = tiny.main(f'--config={tiny.ROOT}/configs/digits.py', f'--workdir={tmp_path}', env=tiny.optimised())
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / 'tradeoff.csv').read_text().splitlines()))
    by_weight = {float(row['guidance_weight']): {key: float(row[key]) for key in
                 ('fid', 'inception_score', 'accuracy', 'spread', 'num_samples')} for row in rows}  # fmt: skip
    assert list(by_weight) == [0, 0.1, 0.3, 0.5, 1, 2, 4]
    assert all(row['num_samples'] >= 1000 for row in by_weight.values())
    best = min(by_weight, key=lambda weight: by_weight[weight]['fid'])
    assert best <= 0.5
    assert by_weight[4]['fid'] >= 2 * by_weight[best]['fid']
    assert by_weight[1]['inception_score'] > by_weight[0]['inception_score']
    assert by_weight[1]['spread'] < by_weight[0]['spread']
    assert all(row['accuracy'] >= 0.97 for weight, row in by_weight.items() if weight >= 0.3)
