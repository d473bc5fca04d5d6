"""Which points lie within the k-nearest-neighbour balls of others: exactly, in tiles, on the accelerator.

Distances are |a|² + |b|² - 2ab of float32 features, centred so that the norms are small. With u = 2⁻²⁴ the error of a
squared distance is at most u (D/2 + 6) (|a| + |b|)²: D/2 for the product (|fl(ab) - ab| <= D u |a| |b| in any order of
summation), the rest for rounding the features, the norms and the sums. Twice that and more,

    e(a, b) = 2 u (D + 16) (|a|² + |b|²),

is taken for the bound. A comparison that it leaves open is settled by the differences themselves in float64, as every
radius is, so that the result is that of float64 throughout. (A TPU makes float32 of six bfloat16 products: there the
margin is taken to be enough.)
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TILE = 4096  # points; two tiles of 2048 features and their distances take 128 MiB
_SPARE = 8  # nearest candidates beyond the k-th, among which float64 decides
_PAIRS = 2048  # compared at once in float64


class _Side(NamedTuple):
    """One of two sets. What `_compare` takes of tile i is [2, T] float32, where inside is certain and where it may be:
    points[:, i], |point|² with e's part, and balls[:, i], |centre|² with e's part, less the squared radius."""

    features: np.ndarray
    radii: np.ndarray
    tiles: list
    points: np.ndarray
    balls: np.ndarray


def _side(features, radii, centre):
    tiles, squares = _tiles(features, centre)
    relative = _relative_bound(features)
    squares = np.stack([(1.0 + relative) * squares, (1.0 - relative) * squares])
    padded = np.pad(radii, (0, squares[0].size - len(radii))).reshape(squares[0].shape)
    return _Side(features, radii, tiles, squares.astype(np.float32), (squares - padded).astype(np.float32))


def members(a, b, k):
    """bool [len(a)], bool [len(b)]: which points of each set lie within a k-nearest-neighbour ball of the other.

    a, b: real [N, D], finite. A point's ball reaches to its k-th nearest neighbour in its own set, edge included.
    """
    radii = squared_radii(a, k), squared_radii(b, k)
    centre = (_mean(a) * len(a) + _mean(b) * len(b)) / (len(a) + len(b))
    a, b = _side(a, radii[0], centre), _side(b, radii[1], centre)
    found_a, found_b = np.zeros(a.points.shape, bool), np.zeros(b.points.shape, bool)
    for i, tile_a in enumerate(a.tiles):
        for j, tile_b in enumerate(b.tiles):
            terms = a.points[:, i], b.points[:, j], a.balls[:, i], b.balls[:, j]
            of_a, of_b = jax.device_get(_compare(tile_a, tile_b, *terms))
            found_a[:, i] |= of_a
            found_b[:, j] |= of_b
    return _settle(a, b, found_a, centre), _settle(b, a, found_b, centre)


def _settle(side, other, found, centre):
    """bool [N] from what `_compare` found: the pairs that it leaves open are compared in float64."""
    inside, possible = found.reshape(2, -1)[:, : len(side.features)]
    low = 1.0 - _relative_bound(side.features)
    for rows in _chunks(np.flatnonzero(possible & ~inside)):
        pairs = _open_pairs(side.features[rows], centre, low, 0.0, other.tiles, other.balls[1])
        for first, second in pairs:
            near = squared_distances(side.features, rows[first], other.features, second) <= other.radii[second]
            inside[rows[first[near]]] = True
    return inside


def squared_radii(features, k):
    """float64 [N]: the squared distance of each point to its k-th nearest neighbour among the others."""
    number = len(features)
    if k >= number:
        raise ValueError(f'k is {k}; it must be below the number of images, {number}')
    centre, low = _mean(features), 1.0 - _relative_bound(features)
    tiles, squares = _tiles(features, centre)
    terms = (low * squares).astype(np.float32)
    # the point itself is one of them
    bounds, candidates = _nearest(tiles, terms, number, min(k + 1 + _SPARE, number))
    distances = np.full(bounds.shape, np.inf)
    distances[:, : k + 1] = _by_pairs(features, features, candidates[:, : k + 1])
    # Whatever may be nearer than the farthest of these k + 1 is looked at too.
    rows, columns = np.nonzero(bounds[:, k + 1 :] < distances[:, : k + 1].max(1, keepdims=True))
    distances[rows, columns + k + 1] = squared_distances(features, rows, features, candidates[rows, columns + k + 1])
    radii = np.partition(distances, k, axis=1)[:, k]
    if bounds.shape[1] < number:
        # No other point is nearer than the last candidate's bound. Where that is too low, all that may be are compared.
        for crowded in _chunks(np.flatnonzero(radii > bounds[:, -1])):
            pairs = _open_pairs(features[crowded], centre, low, radii[crowded], tiles, terms)
            first, second = (np.concatenate(part) for part in zip(*pairs))
            exact = squared_distances(features, crowded[first], features, second)
            order = np.lexsort((exact, first))
            radii[crowded] = exact[order][np.searchsorted(first[order], np.arange(len(crowded))) + k]
    return radii


def _chunks(rows):
    size = min(512, TILE)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _open_pairs(points, centre, low, radii, tiles, terms):
    """Yields the pairs (indices of points, of others) for which |a - b|² - e(a, b) <= radii, by the others' tiles."""
    (tile,), squares = _tiles(points, centre)
    squares[0, : len(points)] = low * squares[0, : len(points)] - radii
    for number, (others, term) in enumerate(zip(tiles, terms)):
        first, second = np.nonzero(np.asarray(_perhaps(tile, others, squares[0].astype(np.float32), term)))
        yield first, second + number * len(others)


def squared_distances(a, rows, b, columns):
    """float64 [P]: |a[row] - b[column]|² of P pairs, bit for bit the same both ways and for any grouping."""
    result = np.empty(len(rows))
    for start in range(0, len(rows), _PAIRS):
        part = slice(start, start + _PAIRS)
        difference = np.asarray(a[rows[part]], np.float64) - b[columns[part]]
        result[part] = np.square(difference, out=difference).sum(1)
    return result


def _by_pairs(a, b, columns):
    """float64 [N, C]: the squared distance of each row of `a` to its C rows of `b`."""
    rows = np.repeat(np.arange(len(columns)), columns.shape[1])
    return squared_distances(a, rows, b, columns.ravel()).reshape(columns.shape)


def _relative_bound(features):
    """e(a, b) / (|a|² + |b|²)."""
    return 2.0**-23 * (features.shape[1] + 16)


def _mean(features):
    parts = (features[start : start + TILE] for start in range(0, len(features), TILE))
    return sum(part.sum(0, np.float64) for part in parts) / len(features)


def _tiles(features, centre):
    """(float32 tiles [T, D] of the centred features on the device, their squared norms float64 [number of tiles, T]).

    What fills the last tile up lies infinitely far away.
    """
    number = len(features)
    size = min(TILE, -(-number // 128) * 128)
    tiles, squares = [], np.full(-(-number // size) * size, np.inf)
    for start in range(0, number, size):
        tile = (features[start : start + size].astype(np.float64) - centre).astype(np.float32)
        squares[start : start + len(tile)] = np.einsum('nd,nd->n', tile, tile, dtype=np.float64)
        tiles.append(jnp.asarray(np.pad(tile, [(0, size - len(tile)), (0, 0)])))
    if not (squares[:number] < 1e37).all():  # nor NaN
        raise ValueError('the features must be finite, and their squared norms below 1e37, as float32 has them')
    return tiles, squares.reshape(-1, size)


def _products(a, b):
    return 2.0 * jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _compare(a, b, points_a, points_b, balls_a, balls_b):
    """(of the points a, of b): bool [2, T], which are inside, and which perhaps, of the other's balls.

    A point is inside if |point|² + |centre|² - 2ab <= radius², or 2ab - (|centre|² - radius²) >= |point|².
    """
    products = _products(a, b)

    def among(points, balls, axis):
        nearest = [jnp.max(products - jnp.expand_dims(ball, 1 - axis), axis) for ball in balls]
        return jnp.stack(nearest) >= points

    return among(points_a, balls_b, 1), among(points_b, balls_a, 0)


@jax.jit
def _perhaps(a, b, point, centre):
    return _products(a, b) - centre >= point[:, None]


@partial(jax.jit, static_argnames='count')
def _lowest(a, squares_a, b, squares_b, count):
    """(values, indices) [T, count] of the lowest bounds of every row of |a - b|², and the same of every column."""
    bounds = squares_a[:, None] + squares_b - _products(a, b)
    return jax.lax.top_k(-bounds, count), jax.lax.top_k(-bounds.T, count)


def _nearest(tiles, terms, number, count):
    """([N, count], [N, count]): |a - b|² - e(a, b) in float32, increasing, and the index of b, of the lowest in a row.

    terms: |a|² (1 - e's part) by tile. Of the pairs of tiles, which lie symmetrically, each is computed once.
    """
    size = terms.shape[1]
    bounds = np.full((terms.size, count), np.inf, np.float32)
    indices = np.zeros((terms.size, count), np.int64)

    def update(tile, negative, found):
        rows = slice(tile * size, (tile + 1) * size)
        both = np.concatenate([bounds[rows], -negative], axis=1)
        order = np.argsort(both, axis=1, kind='stable')[:, :count]
        bounds[rows] = np.take_along_axis(both, order, 1)
        indices[rows] = np.take_along_axis(np.concatenate([indices[rows], found], axis=1), order, 1)

    for i, a in enumerate(tiles):
        for j in range(i, len(tiles)):
            of_rows, of_columns = jax.device_get(_lowest(a, terms[i], tiles[j], terms[j], count))
            update(i, of_rows[0], of_rows[1] + j * size)
            if j > i:
                update(j, of_columns[0], of_columns[1] + i * size)
    return bounds[:number], indices[:number]
