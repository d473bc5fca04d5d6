"""The ranking of curves: order, ties, and what is missing."""

import numpy as np
import pytest

from cfg_jax.evaluation import columns, ranking, results
from cfg_jax.evaluation.report.sweep import Sweep


def row(variant, weight, fid, error=0.1, **changes):
    return {
        **{'variant': variant, 'guidance_weight': weight, 'classifier_weight': 0.0, 'fid': fid, 'fid_error': error},
        **{'precision': 0.9, 'recall': 0.5, 'network_evaluations': 64, 'seconds_per_image': 0.01},
        **{'sampler': 'ddim', 'num_steps': 32, 'num_samples': 1000, **changes},
    }


ROWS = [
    *(row('a', 0.0, 3.0), row('a', 1.0, 1.5), row('a', 2.0, 2.0)),
    *(row('b', 0.0, 1.7, 0.12), row('b', 1.0, 1.8)),
    *(row('c', 0.0, 4.0), row('c', 1.0, 1.9)),
    row('d', 0.5, 1.4, sampler='ancestral'),
]


def test_each_curve_has_its_least_fid_and_ties_are_within_two_errors():
    ranked = ranking.rank(ROWS)
    assert [(each['rank'], each['variant'], each['guidance_weight'], each['tie']) for each in ranked] == [
        *((1, 'd', 0.5, 'first'), (2, 'a', 1.0, 'yes'), (3, 'b', 0.0, 'yes'), (4, 'c', 1.0, 'no')),
    ]  # sqrt(0.1² + 0.12²) is 0.156: b is 1.9 of them above d, c is 3.5


def test_sets_of_the_same_noise_are_paired():
    """Each image changes both FIDs by almost the same: the difference is surer than either."""
    shared = np.random.default_rng(0).standard_normal(1000)
    other = shared + 0.1 * np.random.default_rng(1).standard_normal(1000)
    rows = [row('a', 1.0, 1.50), row('b', 1.0, 1.55), row('c', 1.0, 1.6, 0.001)]
    ranked = ranking.rank(rows, [3.0 * shared, 3.0 * other, None])
    assert [each['tie'] for each in ranked] == ['first', 'no', 'yes']
    assert ranked[1]['fid_above'] == pytest.approx(0.05)
    assert ranked[1]['fid_above_error'] == pytest.approx(0.3 / np.sqrt(1000), rel=0.1)
    assert ranking.rank(rows)[1]['tie'] == 'yes'  # taken for independent


def test_without_errors_nothing_is_said_about_ties_and_without_fid_a_curve_comes_last():
    rows = [row('a', 0.0, None, None), row('b', 0.0, 2.0, None), row('c', 0.0, 1.0, 0.1)]
    ranked = ranking.rank(rows)
    assert [(each['rank'], each['variant'], each['tie']) for each in ranked] == [
        *((1, 'c', 'first'), (2, 'b', ''), (None, 'a', '')),
    ]
    assert len(ranking.lines(ranked)) == 5


def test_curves_without_names_are_ranked_too():
    rows = [{**each, 'variant': ''} for each in ROWS]
    assert [each['variant'] for each in ranking.rank(rows)] == ['ancestral, 32 steps', 'ddim, 32 steps']


def test_the_table_as_csv_and_as_lines():
    rows = [*ROWS, row('e', 1.0, 9.0, interval='from -3 to 2', overrides='guidance.interval=(-3, 2)', search_fid=8.0)]
    ranked = ranking.rank(rows)
    names = ranking.columns_of(ranked)
    head, first, *_, last = results.as_csv(ranked, names).splitlines()
    assert head == (
        'rank,variant,fid,fid_error,tie,fid_above,fid_above_error,guidance_weight,interval,search_fid,precision,recall,network_evaluations,'
        'seconds_per_image,num_samples,sampler,num_steps,overrides'
    )
    assert first == '1,d,1.4,0.1,first,,,0.5,,,0.9,0.5,64,0.01,1000,ancestral,32,'
    assert last.startswith('5,e,9,0.1,no,7.6,0.141421,1,from -3 to 2,8,')
    assert 'interval' not in ranking.columns_of(ranking.rank(ROWS))
    explanation, _, *lines = ranking.lines(ranked)
    assert '2 standard errors' in explanation and lines[1].startswith('2  a')
    assert ['tie' in line for line in lines] == [False, True, True, False, False]
    assert 'w = 1, λ from -3 to 2' in lines[-1]
    assert all(columns.column(name).label for name in names)


def test_the_note_tells_of_ties_and_of_the_bias_of_the_least():
    ranked = ranking.rank(ROWS)
    assert '2 of 3' in ranking.note(ranked) and 'too low' in ranking.note(ranked)
    assert 'too low' not in ranking.note(ranked, searched=True)
    assert ranking.note(ranked[:1]) == ''


@pytest.mark.parametrize(
    ('changes', 'over', 'names', 'full'),
    [
        ([{'variant': v, 'guidance_weight': w, 'num_steps': s} for v, s in (('a', 8), ('b', 9)) for w in (0, 1)],
         'guidance_weight', ['a', 'b'], 'w = 1, b'),
        ([{'variant': v, 'guidance_weight': 1, 'num_steps': s} for v, s in (('a', 8), ('b', 9))],
         'guidance_weight', ['a', 'b'], 'w = 1, b'),
        ([{'variant': 'a', 'guidance_weight': w, 'classifier_weight': 0} for w in (0, 1)]
         + [{'variant': 'b', 'guidance_weight': 0, 'classifier_weight': c} for c in (0, 2)],
         'guidance_weight', ['a', 'b'], 'w = 0, c = 2, b'),
    ],
)  # fmt: skip
def test_a_variant_is_one_curve_whatever_it_varies(changes, over, names, full):
    rows = [{'sampler': 'ddim', 'classifier_weight': 0, **change} for change in changes]
    sweep = Sweep(rows)
    assert (sweep.over, list(sweep.curves), sweep.full_name(rows[-1])) == (over, names, full)


def test_samplers_are_drawn_over_their_steps_where_no_weight_varies():
    """Then FID is also drawn over evaluations, a line for each sampler; a classifier's weight is a weight too."""
    rows = [
        {'sampler': s, 'num_steps': t, 'guidance_weight': 0.3, 'classifier_weight': 0.0} for s in 'ab' for t in (8, 16)
    ]
    assert (Sweep(rows).over, list(Sweep(rows).curves)) == ('num_steps', ['a', 'b'])
    rows += [{**each, 'classifier_weight': 1.0} for each in rows]
    assert Sweep(rows).over == 'classifier_weight'


def test_each_variant_is_drawn_over_its_own_weight():
    rows = [{'variant': 'a', 'guidance_weight': w, 'classifier_weight': 0} for w in (0, 1)]
    rows += [{'variant': 'b', 'guidance_weight': 0, 'classifier_weight': c} for c in (2, 0)]
    sweep = Sweep(rows)
    assert [sweep.over_of([rows[i] for i in members]) for members in sweep.curves.values()] == [
        *('guidance_weight', 'classifier_weight'),
    ]
    assert sweep.curves['b'] == [3, 2]
