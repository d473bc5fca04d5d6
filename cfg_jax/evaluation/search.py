"""A search for the weight and interval of guidance with the least FID: a grid, then halved steps around its best.

Each value of FID has noise, and the least of several is too low on average: measure the best again, on other images.
"""

from itertools import product
from typing import NamedTuple


class Tried(NamedTuple):
    """A point that was tried: its weight, its interval (λ_low, λ_high) or (), its FID, and its round; 0 is the grid."""

    weight: float
    interval: tuple
    fid: float
    round: int


def search(evaluate, weights, intervals=((),), *, rounds=2, off=None):
    """Return (the `Tried` of least FID, all of them in order).

    evaluate(weight, interval) -> FID is called once for every weight with every interval and, in each round, for the
    points halfway between the best one and its neighbours: first in the weight, then in either end of the interval.
    Neighbours are the nearest values that were tried with any other setting; beyond the outermost nothing is tried.
    off: the weight at which intervals change nothing, so that it is tried with the first one alone.
    """
    tried, intervals = {}, [tuple(interval) for interval in intervals]

    def attempt(points, number):
        """Try the points that are new; return the best of all."""
        for weight, interval in points:
            interval = intervals[0] if weight == off else interval
            if (weight, interval) not in tried:
                tried[weight, interval] = Tried(weight, interval, evaluate(weight, interval), number)
        return min(tried.values(), key=lambda each: each.fid)

    best = attempt(product(weights, intervals), 0)
    for number in range(1, rounds + 1):
        near = _halfway(best.weight, {weight for weight, _ in tried})
        best = attempt([(weight, best.interval) for weight in near], number)
        best = attempt([(best.weight, interval) for interval in _near_intervals(best.interval, tried)], number)
    return best, list(tried.values())


def at_end(best, tried):
    """Return 'lowest' or 'highest' if the best weight is an outermost one of several, else ''."""
    weights = {each.weight for each in tried}
    if len(weights) == 1 or min(weights) < best.weight < max(weights):
        return ''
    return 'lowest' if best.weight == min(weights) else 'highest'


def _halfway(value, known):
    """Return the middles between a value and its neighbours among those known, one or two numbers or none."""
    below, above = [each for each in known if each < value], [each for each in known if each > value]
    return [(value + each) / 2 for each in ([max(below)] if below else []) + ([min(above)] if above else [])]


def _near_intervals(interval, tried):
    """Return the intervals with one end moved halfway to its neighbours; [] for ()."""
    if not interval:
        return []
    low, high = interval
    lows, highs = ({ends[place] for _, ends in tried if ends} for place in (0, 1))
    moved = [(each, high) for each in _halfway(low, lows)] + [(low, each) for each in _halfway(high, highs)]
    return [(low, high) for low, high in moved if low < high]
