"""The table of columns, and the files and lines that are derived from it."""

import pytest

from cfg_jax.evaluation import columns, figures, results, values

TRADEOFF = (
    *('guidance_weight', 'fid', 'inception_score', 'precision', 'recall', 'accuracy', 'spread', 'num_samples'),
    *('num_steps', 'sampler', 'seed'),
)
COSTS = (
    *('guidance_weight', 'classifier_weight', 'network_evaluations', 'classifier_gradients', 'seconds_per_image'),
    *('judge', 'reference_sha256'),
)
RESULTS = (
    *('date', 'samples', 'step', 'sampler', 'num_steps', 'guidance_weight', 'classifier_weight'),
    *('fid', 'fid_error', 'fid_infinity', 'sfid', 'inception_score', 'inception_score_error', 'precision'),
    *('precision_error', 'recall', 'recall_error', 'kernel_distance', 'kernel_distance_error', 'accuracy', 'spread'),
    *('num_samples', 'seed', 'network_evaluations', 'classifier_gradients', 'seconds_per_image'),
    *('judge', 'reference', 'reference_sha256', 'samples_sha256'),
)


def test_files_keep_their_columns_and_their_order():
    """Spreadsheets and scripts of users read them by place."""
    assert (results.COLUMNS, results.COSTS, results.RESULTS) == (TRADEOFF, COSTS, RESULTS)


def test_the_report_has_what_varies_and_what_is_measured():
    about = ('date', 'samples', 'step', 'seed', 'judge', 'reference', 'reference_sha256', 'samples_sha256')
    expected = tuple(name for name in results.RESULTS if not name.endswith('_error') and name not in about)
    assert expected == columns.IN_REPORT


def test_the_summary_line():
    row = {'fid': 1.0421, 'inception_score': 9.775, 'precision': 0.937, 'recall': 0.828, 'num_samples': 9}
    assert columns.summary_line(row) == 'FID 1.042  IS 9.775  precision 0.937  recall 0.828'
    row |= {'accuracy': 0.999, 'spread': 6.382, 'sfid': 2.0}
    expected = 'FID 1.042  sFID 2.000  IS 9.775  precision 0.937  recall 0.828  accuracy 0.9990  spread 6.382'
    assert columns.summary_line(row) == expected


def test_curves_are_drawn_over_columns_with_a_symbol():
    assert figures.SYMBOLS == {'guidance_weight': 'w', 'classifier_weight': 'c', 'num_steps': 'T'}
    assert columns.column('guidance_weight').axis == 'guidance weight w'
    assert columns.column('fid').axis == 'FID (Fréchet distance) ↓'


def test_a_column_that_is_not_in_the_table_is_shown_as_it_is():
    assert columns.column('my_number').label == 'my number'
    assert values.show({'my_number': 1 / 3}, 'my_number') == ('0.333333', '')


def test_tables_are_read_as_they_were_written(tmp_path):
    rows = [{'guidance_weight': 0.3, 'fid': 1.5, 'sampler': 'ddim', 'judge': 'digits:1', 'classifier_weight': 0.0}]
    (tmp_path / 'tradeoff.csv').write_text(results.as_csv(rows, results.COLUMNS))
    (tmp_path / 'costs.csv').write_text(results.as_csv(rows, results.COSTS))
    (row,) = results.read_curve(tmp_path)
    assert {key: row[key] for key in rows[0]} == rows[0]
    assert row['recall'] == pytest.approx(float('nan'), nan_ok=True) and row['reference_sha256'] == ''
