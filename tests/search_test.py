"""The search for the least FID on functions that are known, without any sampling."""

import itertools

import numpy as np
import pytest

from cfg_jax.evaluation import search

WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)


def parabola(weight, interval=()):
    """Least, 1, at a weight of 1.3 and an interval from -2 to 1."""
    low, high = interval or (-20.0, 20.0)
    return 1 + (weight - 1.3) ** 2 + 0.1 * ((low + 2) ** 2 + (high - 1) ** 2)


@pytest.mark.parametrize('rounds', range(6))
def test_each_round_halves_the_bracket_of_the_weight(rounds):
    best, tried = search.search(parabola, WEIGHTS, rounds=rounds)
    assert abs(best.weight - 1.3) <= 0.5 / 2**rounds
    assert len(tried) <= len(WEIGHTS) + 2 * rounds
    assert best.fid == min(each.fid for each in tried) == parabola(best.weight)
    assert [each.round for each in tried] == sorted(each.round for each in tried)
    assert {each.weight for each in tried if each.round == 0} == set(WEIGHTS)


def test_no_point_is_tried_twice():
    calls = []
    search.search(lambda *point: calls.append(point) or parabola(*point), WEIGHTS, [(-4.0, 4.0), (0.0, 2.0)], rounds=5)
    assert len(set(calls)) == len(calls)


def test_the_ends_of_the_interval_move_too():
    coarse = [(low, high) for low, high in itertools.product((-5.0, -1.0, 0.0), (0.5, 3.0))]
    best, tried = search.search(parabola, WEIGHTS, coarse, rounds=6)
    assert best.fid < 1.02 < min(each.fid for each in tried if each.round == 0)
    assert all(low < high for _, (low, high), *_ in tried)
    assert best.interval == pytest.approx((-2, 1), abs=0.3)


def test_one_interval_or_none_is_kept():
    for interval in ((), (-3.0, 2.0)):
        _, tried = search.search(parabola, WEIGHTS, [interval], rounds=3)
        assert {each.interval for each in tried} == {interval}
    _, tried = search.search(parabola, WEIGHTS, [(), (-3.0, 2.0)], rounds=3)
    assert {each.interval for each in tried} == {(), (-3.0, 2.0)}


def test_intervals_are_not_tried_where_guidance_is_off():
    _, tried = search.search(parabola, WEIGHTS, [(), (-3.0, 2.0), (0.0, 1.0)], rounds=0, off=0.0)
    assert [each.interval for each in tried if not each.weight] == [()] and len(tried) == 1 + 3 * 4
    best, tried = search.search(lambda weight, interval: weight, WEIGHTS, [(), (0.0, 1.0)], rounds=2, off=0.0)
    assert best.weight == 0 and search.at_end(best, tried) == 'lowest'


def test_the_end_of_the_weights_is_told():
    for target, expected in ((9.0, 'highest'), (-1.0, 'lowest'), (1.2, '')):
        best, tried = search.search(lambda weight, _, target=target: abs(weight - target), WEIGHTS)
        assert search.at_end(best, tried) == expected
    assert search.at_end(*search.search(parabola, (0.0,))) == ''


def test_the_least_of_noisy_values_is_too_low_and_measuring_again_is_not():
    """The reason why the best point is measured again with another seed."""
    rng = np.random.default_rng(0)
    found, confirmed = [], []
    for _ in range(300):
        best, _ = search.search(lambda weight, _: parabola(weight, (-2, 1)) + 0.3 * rng.standard_normal(), WEIGHTS)
        found.append(best.fid - parabola(best.weight, (-2, 1)))
        confirmed.append(0.3 * rng.standard_normal())
    assert np.mean(found) < -0.1 and abs(np.mean(confirmed)) < 0.06
