"""The table of columns, and the files and lines that are derived from it."""

import pytest

from cfg_jax.errors import UserError
from cfg_jax.evaluation import columns, results, values
from cfg_jax.jobs.evaluate import judging
from tests import tiny

TRADEOFF = (
    *('guidance_weight', 'fid', 'inception_score', 'precision', 'recall', 'accuracy', 'spread', 'num_samples'),
    *('num_steps', 'sampler', 'seed', 'variant', 'density', 'coverage', 'vendi', 'memorised', 'training_distance'),
)
COSTS = (
    *('guidance_weight', 'classifier_weight', 'network_evaluations', 'classifier_gradients', 'seconds_per_image'),
    *('judge', 'reference_sha256', 'guidance', 'variant'),
)
RESULTS = (
    *('date', 'samples', 'step', 'sampler', 'num_steps', 'guidance_weight', 'classifier_weight'),
    *('fid', 'fid_error', 'fid_infinity', 'sfid', 'inception_score', 'inception_score_error', 'precision'),
    *('precision_error', 'recall', 'recall_error', 'kernel_distance', 'kernel_distance_error', 'accuracy', 'spread'),
    *('num_samples', 'seed', 'network_evaluations', 'classifier_gradients', 'seconds_per_image'),
    *('judge', 'reference', 'reference_sha256', 'samples_sha256'),
    *('guidance', 'folder', 'classifier', 'classifier_form', 'clip_first', 'spacing', 'v', 'eta', 'clip_x'),
    *('label_order', 'dtype', 'ema_decay', 'model_sha256', 'nearest_k', 'split_images'),
    *('interval', 'variant', 'overrides', 'grid', 'churn', 'weak'),
    *('density', 'density_error', 'coverage', 'coverage_error', 'vendi', 'vendi_error', 'memorised', 'memorised_error'),
    *('training_distance', 'training_distance_error', 'coverage_k', 'held_out', 'parameters'),
    *('ema_length', 'weak_ema_length', 'lower_order_final'),
)


def test_files_keep_their_columns_and_their_order():
    """Spreadsheets and scripts of users read them by place."""
    assert (columns.TRADEOFF, columns.COSTS, columns.RESULTS) == (TRADEOFF, COSTS, RESULTS)


def test_the_report_has_what_varies_and_what_is_measured():
    settings = RESULTS[RESULTS.index('samples_sha256') : RESULTS.index('interval')]
    about = ('date', 'samples', 'step', 'seed', 'judge', 'reference', 'reference_sha256', *settings)
    about += ('variant', 'overrides', 'grid', 'churn', 'weak', 'coverage_k', 'held_out', 'parameters')
    about += ('lower_order_final',)
    expected = {name for name in columns.RESULTS if not name.endswith('_error') and name not in about}
    assert columns.IN_REPORT[0] == 'variant' and set(columns.IN_REPORT[1:]) == expected
    assert len(columns.IN_REPORT) == 1 + len(expected)


def test_the_report_has_each_measure_beside_those_of_its_kind():
    first = columns.IN_REPORT.index('precision')
    assert columns.IN_REPORT[first : first + 10] == (
        *('precision', 'recall', 'density', 'coverage', 'vendi', 'kernel_distance', 'accuracy', 'spread'),
        *('memorised', 'training_distance'),
    )


def test_the_summary_line():
    row = {'fid': 1.0421, 'inception_score': 9.775, 'precision': 0.937, 'recall': 0.828, 'num_samples': 9}
    assert columns.summary_line(row) == 'FID 1.042  IS 9.775  precision 0.937  recall 0.828'
    row |= {'accuracy': 0.999, 'spread': 6.382, 'sfid': 2.0}
    expected = 'FID 1.042  sFID 2.000  IS 9.775  precision 0.937  recall 0.828  accuracy 0.9990  spread 6.382'
    assert columns.summary_line(row) == expected


def test_curves_are_drawn_over_columns_with_a_symbol():
    assert columns.SYMBOLS == {'guidance_weight': 'w', 'classifier_weight': 'c', 'num_steps': 'T'}
    assert columns.column('guidance_weight').axis == 'guidance weight w'
    assert columns.column('fid').axis == 'FID ↓'


def test_a_column_that_is_not_in_the_table_is_shown_as_it_is():
    assert columns.column('my_number').label == 'my number'
    assert values.show({'my_number': 1 / 3}, 'my_number') == ('0.333333', '')


def test_tables_are_read_as_they_were_written(tmp_path):
    rows = [{'guidance_weight': 0.3, 'fid': 1.5, 'sampler': 'ddim', 'judge': 'digits:1', 'classifier_weight': 0.0}]
    (tmp_path / 'tradeoff.csv').write_text(results.as_csv(rows, columns.TRADEOFF))
    (tmp_path / 'costs.csv').write_text(results.as_csv(rows, columns.COSTS))
    (row,) = results.read_curve(tmp_path)
    assert {key: row[key] for key in rows[0]} == rows[0]
    assert row['recall'] == pytest.approx(float('nan'), nan_ok=True) and row['reference_sha256'] == ''


# ---------------------------------------------------------------- results.csv: a row is an experiment

ROW = {
    **{'step': 2500, 'sampler': 'ancestral', 'num_steps': 32, 'guidance_weight': 0.1 + 0.2, 'classifier_weight': 0.0},
    **{'fid': 1.5, 'num_samples': 1000, 'seed': 4294967295, 'judge': 'digits:1', 'reference_sha256': 'a'},
    **{'samples': '', 'samples_sha256': 'b', 'guidance': 'classifier_free', 'folder': '', 'v': 0.3, 'clip_x': True},
    **{'dtype': 'float32', 'label_order': 'balanced', 'ema_decay': 0.995, 'model_sha256': 'c', 'nearest_k': 3},
}


def added(path, rows):
    names, former = results.read_all(path)
    every, replaced = results.merged(former, rows)
    path.write_text(results.as_csv(every, names))
    return results.read_all(path)[1], replaced


@pytest.mark.parametrize(
    'change',
    [
        {'guidance': 'mine:halved, sha256 1'}, {'guidance': 'mine:halved, sha256 2'}, {'folder': 'ddim'}, {'v': 0.31},
        {'eta': 0.5}, {'dtype': 'bfloat16'}, {'ema_decay': 0.9}, {'step': 2000}, {'label_order': 'random'},
        {'clip_x': False}, {'classifier': 'runs/c, step 1, sha256 1'}, {'classifier_form': 'mean'},
        {'clip_first': True}, {'spacing': 'ddim25'}, {'seed': 4294967294}, {'model_sha256': 'd'}, {'nearest_k': 5},
        {'split_images': 100}, {'guidance_weight': 0.31}, {'samples': 'x.npz'}, {'num_samples': 999},
        {'variant': 'mine'}, {'interval': 'from -3 to 2'}, {'overrides': 'sample.eta=1.0'},
    ],
    ids=lambda change: '-'.join(change),
)  # fmt: skip
def test_the_same_experiment_replaces_its_row_and_another_is_added(tmp_path, change):
    path = tmp_path / 'results.csv'
    assert added(path, [ROW])[1] == 0
    measured = {'fid': 1.25, 'date': 'later', 'samples_sha256': 'e', 'seconds_per_image': 2.0}
    again, replaced = added(path, [{**ROW, **measured}])
    assert replaced == len(again) == 1 and again[0]['fid'] == '1.25' and again[0]['guidance_weight'] == '0.3'
    both, replaced = added(path, [{**ROW, **change}])
    assert replaced == 0 and len(both) == 2
    assert added(path, [ROW, {**ROW, **change}]) == ([*results.read_all(path)[1]], 2)


def test_rows_of_before_coverage_k_are_those_of_its_default(tmp_path):
    path = tmp_path / 'results.csv'
    path.write_text('step,fid\n2500,1.5\n')  # with no other column
    new = {'step': 2500, 'fid': 1.25, 'coverage': 0.9, 'coverage_k': 5, 'held_out': ''}
    (row,), replaced = added(path, [new])
    assert replaced == 1 and (row['fid'], row['coverage']) == ('1.25', '0.9')
    assert added(path, [{**new, 'coverage_k': 3}])[1] == 0
    assert added(path, [{**new, 'held_out': 'test'}])[1] == 0  # its memorisation stays when it is evaluated without


def test_given_samples_are_told_apart_by_their_images(tmp_path):
    given = {'samples': '/caf\udce9.npz', 'samples_sha256': 'a', 'judge': 'digits:1', 'fid': 2.0}
    assert added(tmp_path / 'results.csv', [given, {**given, 'samples_sha256': 'b'}])[1] == 0
    rows, replaced = added(tmp_path / 'results.csv', [given])
    assert replaced == 1 and [row['samples'] for row in rows] == ['/caf\\udce9.npz'] * 2


def test_a_spreadsheet_may_have_saved_the_file(tmp_path):
    path = tmp_path / 'results.csv'
    added(path, [{**ROW, 'date': '2020'}])
    first, values_line = path.read_text().splitlines()
    text = f'{first},remark\r\n{values_line.replace("True", "TRUE").replace(",0.3,", ",0.30,")},good\r\n'
    path.write_bytes(b'\xef\xbb\xbf' + text.encode())
    rows, replaced = added(path, [{**ROW, 'date': '2021'}])
    assert replaced == len(rows) == 1 and rows[0]['remark'] == 'good' and rows[0]['date'] == '2021'
    header = path.read_text().splitlines()[0].split(',')
    assert header.count('date') == 1 and not header[0].startswith('\ufeff')
    # two columns of dates, as were written before the mark was known
    path.write_bytes('\ufeffdate,fid,date\n2020,1,\n,2,2021\n'.encode())
    assert [row['date'] for row in added(path, [])[0]] == ['2020', '2021']
    path.write_text('date;fid\n2020;1\n')
    with pytest.raises(
        UserError,
        match=r'results\.csv cannot be read .* semicolons, not commas; repair or rename it',
    ):
        results.read_all(path)


def test_no_table_holds_a_number_that_is_not_finite():
    for number in (float('nan'), float('inf')):
        with pytest.raises(UserError, match=f'^FID is {number}, not a finite number, and is not written'):
            results.as_csv([{'fid': number}], columns.TRADEOFF)
    assert results.as_csv([{'fid': -0.0}], ('fid', 'seed')) == 'fid,seed\n0,\n'
    table = results.accuracy_table(('a', 'caf\udce9'), [('w=0', [0.5, float('nan')])])
    assert table == 'class,w=0\na,0.5\ncaf\\udce9,\n'


def test_the_least_fid_has_no_sign():
    assert columns.summary_line({'fid': -1e-9, 'sfid': -0.0}) == 'FID 0.000  sFID 0.000'


def test_what_is_drawn_otherwise_is_another_row():
    weak = {'guidance__weak': 'checkpoint', 'guidance__weak_step': 2}
    of_order = {'sample__sampler': 'dpmpp_2m'}
    for settings, change in (
        (weak, {'guidance__weak_conditional': False}),
        (of_order, {'sample__lower_order_final': False}),
    ):
        one, other = (judging.settings_of(tiny.config(**each)) for each in (settings, settings | change))
        assert one != other and set(one) == set(other) <= set(columns.IDENTITY)
