"""Metrics of generated images, computed from a judge network's features and logits, and their error bars.

features: [N, D], any real type; logits: [N, num_classes]; labels: int [N]. All sums are float64, a block at a time.
"""

from typing import NamedTuple

import numpy as np
import scipy.special

from cfg_jax.typing import Array, Bool, Float, Float64, Int, Real

MEMORISED_PERCENT = 1.0  # of images that training has not seen, which `memorised_share` counts too
_BLOCK = 4096  # rows converted to float64 at a time


def _blocks(features):
    return (np.asarray(features[start : start + _BLOCK], np.float64) for start in range(0, len(features), _BLOCK))


# ---------------------------------------------------------------- Fréchet distance (Heusel et al. 2017, eq. 6)


def frechet_distance(features_a: Real[Array, ' N *D'], features_b: Real[Array, ' M *D']) -> float:
    """Return |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^{1/2}) of Gaussians fitted to the features (covariance over N - 1)."""
    return gaussian_distance(*feature_statistics(features_a), *feature_statistics(features_b))


def feature_statistics(features: Real[Array, ' N *F']) -> tuple[Float64[np.ndarray, ' D'], Float64[np.ndarray, 'D D']]:
    """Return (mean [D], covariance [D, D] over N - 1), float64, of [N, D] features; [N] is read as [N, 1]."""
    features = _as_rows(features)
    ((_, mean, covariance),) = _growing_statistics(features, np.arange(len(features)), [len(features)])
    return mean, covariance


def _as_rows(features):
    features = np.asarray(features)
    return features.reshape(len(features), -1)


def _growing_statistics(features, order, sizes):
    """Yield (size, mean, covariance) of the first `size` features in this order, for increasing sizes."""
    centre = sum(block.sum(0) for block in _blocks(features)) / len(features)
    total, scatter = np.zeros(features.shape[1]), np.zeros((features.shape[1],) * 2)
    for start, stop in zip([0, *sizes], sizes):
        for rows in (order[first : min(first + _BLOCK, stop)] for first in range(start, stop, _BLOCK)):
            block = features[rows] - centre
            total += block.sum(0)
            scatter += block.T @ block
        mean = total / stop
        yield stop, centre + mean, (scatter - stop * np.outer(mean, mean)) / (stop - 1)


def gaussian_distance(
    mean_a: Float[Array, ' D'],
    covariance_a: Float[Array, 'D D'],
    mean_b: Float[Array, ' D'],
    covariance_b: Float[Array, 'D D'],
) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians.

    tr (Σa Σb)^{1/2} is the sum of the square roots of the eigenvalues of L^T Σa L, where Σb = L L^T. As that matrix is
    symmetric, singular covariances need no offset on the diagonal, and it takes a fifth of a matrix root's time.
    """
    return _distance_to(mean_b, covariance_b)(mean_a, covariance_a)


def _distance_to(mean_b, covariance_b):
    """Return `gaussian_distance` to one Gaussian as a function of the other's mean and covariance."""
    root, trace = _root(covariance_b), np.trace(covariance_b)

    def distance(mean, covariance):
        cross = np.linalg.eigvalsh(root.T @ covariance @ root)
        difference = mean - mean_b
        trace_of_root = np.sqrt(np.maximum(cross, 0.0)).sum()
        squared = float(difference @ difference + np.trace(covariance) + trace - 2.0 * trace_of_root)
        return max(squared, 0.0)  # rounding takes that of equal Gaussians below zero; NaN stays

    return distance


def _root(covariance):
    """Return L with L L^T = Σ, from the eigenvectors if Σ is singular."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(np.maximum(values, 0.0))


def check_enough(num_samples: int, num_features: int) -> None:
    """Raise ValueError, with the reason, if there are too few samples for a Fréchet distance."""
    if num_samples <= num_features:
        raise ValueError(
            f'{num_samples:,} samples of {num_features:,} features: with fewer than {num_features + 1:,} samples the '
            'covariance is singular and FID much too large'
        )


def frechet_distance_error(
    features: Real[Array, ' N *F'], mean: Float[Array, ' D'], covariance: Float[Array, 'D D']
) -> float:
    """Return the standard error of the Fréchet distance of N features to a fixed Gaussian.

    It equals, to first order in 1/N, that of a bootstrap over images with infinitely many resamples (the infinitesimal
    jackknife, Efron 1982): the deviation of the images' influences, over sqrt(N).
    """
    return standard_error(frechet_distance_influences(features, mean, covariance))


def standard_error(influences: Float[Array, ' N']) -> float:
    """Return the standard error of a statistic with these influences, or, of their differences, that of a difference.

    For two sets whose images i start from the same noise, the difference of influences counts what they share.
    """
    return float(np.std(influences, ddof=1) / np.sqrt(len(influences)))


def frechet_distance_influences(
    features: Real[Array, ' N *F'], mean: Float[Array, ' D'], covariance: Float[Array, 'D D']
) -> Float64[np.ndarray, ' N']:
    """Return N times what each image changes the Fréchet distance by, at the cost of one eigendecomposition.

    Let μ and Σ be the features' mean and covariance, L L^T the other covariance and T = L (L^T Σ L)^{-1/2} L^T the
    optimal transport. The influence of image x is

        2 (x - μ)·(μ - mean) + |x - μ|² - (x - μ)^T T (x - μ).
    """
    features = _as_rows(features)
    own_mean, own_covariance = feature_statistics(features)
    root = _root(covariance)
    values, vectors = np.linalg.eigh(root.T @ own_covariance @ root)
    kept = values > 1e-10 * values[-1]
    half = ((root @ vectors[:, kept]) / values[kept] ** 0.25).astype(np.float32)  # T = half half^T
    influences = []
    for block in _blocks(features):
        centred = block - own_mean
        transported = np.square(centred.astype(np.float32) @ half).sum(1, dtype=np.float64)
        influences.append(2.0 * centred @ (own_mean - mean) + np.square(centred).sum(1) - transported)
    return np.concatenate(influences)


def frechet_distance_of_halves(
    features: Real[Array, ' N *F'], labels: Int[Array, ' N'] | None = None, *, num_splits: int = 5, seed: int = 0
) -> tuple[float, float]:
    """Return (mean, deviation) of the Fréchet distance of two random halves, over splits of the same features.

    Of real images it is the floor: what other real images get. With labels both halves have the same share of each
    class, as samples have that are balanced over the classes; without, chance alone makes the shares differ, and the
    distance larger. Its bias is that of N / 2 images against N / 2, about twice that of N against N. The deviation is
    that of one split. Raises ValueError unless N / 2 > D.
    """
    features = _as_rows(features)
    labels, half = np.zeros(len(features)) if labels is None else np.asarray(labels), len(features) // 2
    check_enough(half, features.shape[1])
    rng, distances = np.random.default_rng(seed), []
    for _ in range(num_splits):
        order = rng.permutation(len(features))
        order = order[np.argsort(labels[order], kind='stable')]  # each class in turn, in random order
        halves = (_growing_statistics(features, order[first::2], [half]) for first in (0, 1))
        (_, *one), (_, *other) = (next(iter(each)) for each in halves)
        distances.append(gaussian_distance(*one, *other))
    return float(np.mean(distances)), float(np.std(distances, ddof=1))


class Extrapolation(NamedTuple):
    """The line value + slope / N, fitted to the distances of the first `sizes` features in a random order."""

    value: float
    slope: float
    sizes: Int[np.ndarray, ' P']
    distances: Float64[np.ndarray, ' P']


def extrapolated_frechet_distance(
    features: Real[Array, ' N *F'],
    mean: Float[Array, ' D'],
    covariance: Float[Array, 'D D'],
    *,
    num_points: int = 6,
    seed: int = 0,
) -> Extrapolation:
    """Return the `Extrapolation` of the Fréchet distance to a Gaussian to N = infinity (Chong & Forsyth 2020).

    The plain distance is too large by about slope / N. The paper fits the line from N / 10 on, this function from
    N / 2, because the curve bends where N / 10 is near D. The bias from the other side's finite number of images
    remains. Raises ValueError unless N / 2 > D; reliable for N of 5 D or more.
    """
    features = _as_rows(features)
    number, dimensions = features.shape
    if number // 2 <= dimensions:
        raise ValueError(
            f'the extrapolation needs {2 * dimensions + 2:,} samples or more (over twice the {dimensions:,} features), '
            f'but there are {number:,}'
        )
    if num_points < 2:
        raise ValueError(f'num_points is {num_points}; a line needs 2 or more')
    sizes = np.unique(np.linspace(number // 2, number, num_points).round().astype(int))
    order = np.random.default_rng(seed).permutation(number)
    distance = _distance_to(mean, covariance)
    distances = np.array([distance(*gaussian) for _, *gaussian in _growing_statistics(features, order, sizes.tolist())])
    slope, value = np.polyfit(1.0 / sizes, distances, 1)
    return Extrapolation(float(value), float(slope), sizes, distances)


# ---------------------------------------------------------------- Inception score (Salimans et al. 2016)


def inception_score(logits: Float[Array, 'N K'], *, num_splits: int) -> tuple[float, float]:
    """Return (mean, standard deviation) of exp E KL(p(y | x) || p(y)) over `num_splits` consecutive parts."""
    scores = [np.exp(divergences.mean()) for divergences in _divergences(logits, num_splits)]
    return float(np.mean(scores)), float(np.std(scores))


def inception_score_error(logits: Float[Array, 'N K'], *, num_splits: int) -> float:
    """Return the standard error of the score's mean over the parts, to first order a bootstrap's within each part."""
    variances = [
        np.exp(2.0 * divergences.mean()) * divergences.var() / len(divergences)
        for divergences in _divergences(logits, num_splits)
    ]
    return float(np.sqrt(np.sum(variances)) / num_splits)


def _divergences(logits, num_splits):
    """Yield, for each part, KL(p(y | x) || p(y)) of its images."""
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f'num_splits is {num_splits}; it must be from 1 to the number of images, {len(logits)}')
    for part in np.array_split(logits, num_splits):
        log_p = scipy.special.log_softmax(np.asarray(part, np.float64), axis=1)
        log_marginal = scipy.special.logsumexp(log_p, axis=0) - np.log(len(part))
        yield np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1)


# --------------------------------- precision, recall (Kynkäänniemi et al. 2019); density, coverage (Naeem et al. 2020)


class Neighbourhoods(NamedTuple):
    """How generated and real features lie in the balls around the other set.

    precise: bool [N], generated features in a real ball of k neighbours. recalled: bool [M], real features in a
    generated ball of k neighbours. balls: int [N], real balls of coverage_k neighbours that hold each generated
    feature. members: int [M], generated features in each of these balls. only: int [N], balls that hold this generated
    feature and no other.
    """

    precise: Bool[np.ndarray, ' N']
    recalled: Bool[np.ndarray, ' M']
    balls: Int[np.ndarray, ' N']
    members: Int[np.ndarray, ' M']
    only: Int[np.ndarray, ' N']


def precision_recall(generated: Real[Array, 'N D'], real: Real[Array, 'M D'], *, k: int = 3) -> tuple[float, float]:
    """Return (precision, recall): the fractions of the generated and the real features that are `manifold_members`."""
    precise, recalled = manifold_members(generated, real, k=k)
    return float(precise.mean()), float(recalled.mean())


def manifold_members(
    generated: Real[Array, 'N D'], real: Real[Array, 'M D'], *, k: int = 3
) -> tuple[Bool[np.ndarray, ' N'], Bool[np.ndarray, ' M']]:
    """Return bool [N] and bool [M]: which features of each set lie in a k-nearest-neighbour ball of the other set.

    A feature's ball reaches to its k-th nearest neighbour in its own set. Its edge is inside, with a margin for
    float64's rounding. A standard error computed from these takes the balls as fixed. Over new draws of generated
    images it is right for the precision, and within a quarter for the recall (Gaussians of 16 dimensions), as the
    recall's balls are drawn too. Raises ValueError unless the features are finite and more than k in each set.
    """
    found = neighbourhoods(generated, real, k=k, coverage_k=None)
    return found.precise, found.recalled


def density_coverage(generated: Real[Array, 'N D'], real: Real[Array, 'M D'], *, k: int = 5) -> tuple[float, float]:
    """Return (density, coverage), from the balls that reach to each real feature's k-th nearest real neighbour.

    Density is the mean number of balls around a generated feature, over k: about 1 for new draws of the real
    distribution, not bounded by 1. Coverage is the fraction of balls with a generated feature in them. An edge is
    outside, as in the authors' program, so that a set has density 1 against itself.
    """
    found = neighbourhoods(generated, real, k=None, coverage_k=k)
    return float(found.balls.mean() / k), float((found.members > 0).mean())


def density_coverage_errors(found: Neighbourhoods, *, k: int = 5) -> tuple[float, float]:
    """Return the standard errors of (density, coverage) over new draws of the generated images.

    The real images, and so the balls, count as fixed, as in FID's error. The coverage's is a jackknife: without a
    generated feature the balls that hold it alone are lost. On average it is never too small (Efron & Stein 1981); for
    Gaussians it is a seventh too large at a coverage of 0.6, and up to two thirds at 0.97.
    """
    number = len(found.balls)
    lost = found.only / len(found.members)
    return standard_error(found.balls / k), float(np.std(lost) * np.sqrt(number - 1))


def neighbourhoods(
    generated: Real[Array, 'N D'], real: Real[Array, 'M D'], *, k: int | None = 3, coverage_k: int | None = 5
) -> Neighbourhoods:
    """Return the `Neighbourhoods` of both families, for which each distance is computed once.

    With k=None nothing is precise or recalled, and the generated features' own neighbours are not looked for; with
    coverage_k=None no ball holds anything. Raises ValueError unless the features are finite, more than k in each set,
    and the real ones more than coverage_k.
    """
    a, b = np.asarray(generated), np.asarray(real)
    centre = (a.mean(0, np.float64) + b.mean(0, np.float64)) / 2.0  # small norms lose fewer digits
    radii_b = _squared_radii(b, centre, [each for each in (k, coverage_k) if each is not None])
    radii_a = None if k is None else _squared_radii(a, centre, [k])[0]
    strict_b = None if coverage_k is None else radii_b[-1] - 4.0 * _margin(a, b, centre)
    found = Neighbourhoods(
        *(np.zeros(len(each), kind) for each, kind in zip((a, b, a, b, a), (bool, bool, int, int, int)))
    )
    places = np.zeros(len(b))  # the sum of the places of a ball's members: of one member, its place
    for rows, x in _centred(a, centre):
        for columns, y in _centred(b, centre):
            distances = _squared_distances(x, y, -1.0)
            if k is not None:
                found.precise[rows] |= (distances <= radii_b[0][columns]).any(1)
                found.recalled[columns] |= (distances <= radii_a[rows, None]).any(0)
            if coverage_k is not None:
                inside_x, inside_y = np.nonzero(distances < strict_b[columns])
                found.balls[rows] += np.bincount(inside_x, minlength=len(x))
                found.members[columns] += np.bincount(inside_y, minlength=len(y))
                places[columns] += np.bincount(inside_y, inside_x + rows.start, minlength=len(y))
    alone = places[found.members == 1].astype(int)
    return found._replace(only=np.bincount(alone, minlength=len(a)))


def _squared_radii(features, centre, ks):
    """Return the squared distances of each feature to its k-th nearest neighbours, [K, N]; a pair is computed once."""
    k = max(ks)
    if k >= len(features):
        raise ValueError(f'k is {k}; it must be below the number of images, {len(features)}')
    nearest = np.full((len(features), k + 1), np.inf)  # including the feature itself
    for rows, x in _centred(features, centre):
        for columns, y in _centred(features, centre, rows.start):
            distances = _squared_distances(x, y, 1.0)
            for part, block in [(rows, distances), (columns, distances.T)][: 1 + (columns != rows)]:
                candidates = np.hstack([nearest[part], block])
                candidates.partition(k, axis=1)
                nearest[part] = candidates[:, : k + 1]
    nearest.sort(axis=1)
    return nearest[:, ks].T


def _centred(features, centre, first=0):
    """Yield (slice of rows, these features - centre in float64), block by block from row `first` on."""
    for start in range(first, len(features), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(features)))
        yield rows, features[rows] - centre


def _squared_distances(x, y, side):
    """Return an upper (side 1) or lower (side -1) bound on |x - y|² of all pairs, [X, Y], tight to rounding.

    |x|² + |y|² - 2 x·y in float64 is off by at most 2⁻⁵² (D + 16) (|x|² + |y|²), whatever the order of summation.
    """
    squares = [np.einsum('nd,nd->n', z, z) * (1.0 + side * _rounding(z)) for z in (x, y)]
    if not all(np.isfinite(norms).all() for norms in squares):
        raise ValueError('the features must be finite')
    distances = x @ y.T
    distances *= -2.0
    distances += squares[0][:, None]
    distances += squares[1]
    return distances


def _rounding(features):
    """Return the relative error that a squared distance of such features may have."""
    return 2.0**-52 * (features.shape[1] + 16)


def _margin(a, b, centre):
    """Return the largest difference of the bounds that `_squared_distances` gives on a distance of two features."""
    largest = max(np.einsum('nd,nd->n', x, x).max() for each in (a, b) for _, x in _centred(each, centre))
    return 4.0 * _rounding(a) * largest


# ---------------------------------------------------------------- kernel distance (Bińkowski et al. 2018)


def kernel_distance(features_a: Real[Array, 'N D'], features_b: Real[Array, 'M D']) -> float:
    """Return the unbiased squared MMD with the kernel (a·b / D + 1)³, over all features (no subsets)."""
    a, b = np.asarray(features_a), np.asarray(features_b)
    cross = sum(_kernel(x, y).sum() for x in _blocks(a) for y in _blocks(b)) / (len(a) * len(b))
    return float(_mean_off_diagonal(a) + _mean_off_diagonal(b) - 2.0 * cross)


def kernel_distance_subsets(
    features_a: Real[Array, 'N D'],
    features_b: Real[Array, 'M D'],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return (mean, standard deviation) of `kernel_distance` over random subsets of both, as papers report it."""
    a, b = np.asarray(features_a), np.asarray(features_b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f'subset_size is {subset_size}; it must be from 2 to {min(len(a), len(b))}, the smaller set')
    rng = np.random.default_rng(seed)
    chosen = ([rng.choice(len(x), subset_size, replace=False) for x in (a, b)] for _ in range(num_subsets))
    distances = [kernel_distance(a[rows_a], b[rows_b]) for rows_a, rows_b in chosen]
    return float(np.mean(distances)), float(np.std(distances))


def _kernel(x, y):
    base = x @ y.T
    base /= x.shape[1]
    base += 1.0
    return base * base * base


def _mean_off_diagonal(features):
    """Return the mean of the kernel over pairs of different features; each pair of blocks is computed once."""
    total = 0.0
    for start, x in zip(range(0, len(features), _BLOCK), _blocks(features)):
        within = _kernel(x, x)
        total += within.sum() - np.trace(within)
        total += 2.0 * sum(_kernel(x, y).sum() for y in _blocks(features[start + _BLOCK :]))
    return total / (len(features) * (len(features) - 1))


# ---------------------------------------------------------------- Vendi score (Friedman & Dieng 2023, definition 3.1)


def vendi_score(features: Real[Array, 'N D']) -> tuple[float, float]:
    """Return (exp of the entropy of the eigenvalues of K / N, its standard error), with K_ij = cos(x_i, x_j).

    The score is the number of orthogonal features, all equally frequent, that are as diverse; it needs no reference.
    The kernel is the authors' for features: the cosine, no mean subtracted. With few images the score is too low, so
    compare it at equal N. The error is the infinitesimal jackknife's, over new draws of the images. The eigenvalues
    are those of the second moment of the normalised features, [D, D], or of K / N itself where N < D. A feature of
    zeros has no direction and adds no diversity.
    """
    features = np.asarray(features)
    number, dimensions = features.shape
    if number < dimensions:
        unit = np.concatenate(list(_unit_blocks(features)))
        values, vectors = _spectrum(unit @ unit.T / number)
        squares = number * values * np.square(vectors)  # of the features along the second moment's eigenvectors
    else:
        values, vectors = _spectrum(sum(unit.T @ unit for unit in _unit_blocks(features)) / number)
        squares = np.concatenate([np.square(unit @ vectors) for unit in _unit_blocks(features)])
    score = float(np.exp(-values @ np.log(values)))
    return score, score * standard_error(squares @ (np.log(values) + 1.0))


def _unit_blocks(features):
    """Yield the features, block by block in float64, each divided by its norm."""
    for block in _blocks(features):
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        yield block / np.where(norms > 0, norms, 1.0)


def _spectrum(matrix):
    """Return (eigenvalues, eigenvectors) of a symmetric matrix without those of its null space."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > 1e-12 * values[-1]
    return values[kept], vectors[:, kept]


# ------------------------ nearest training images (Carlini et al. 2023, section 4.2; Stein et al. 2023, section 5)


def nearest_neighbours(
    features: Real[Array, 'N D'], others: Real[Array, 'M D'], *, k: int
) -> tuple[Float64[np.ndarray, 'N K'], Int[np.ndarray, 'N K']]:
    """Return the distances to the k nearest of the other features, increasing, and their places.

    The distance to an equal feature is 0. Raises ValueError unless the features are finite and k is from 1 to M.
    """
    features, others = np.asarray(features), np.asarray(others)
    if not 1 <= k <= len(others):
        raise ValueError(f'k is {k}; it must be from 1 to the number of other features, {len(others)}')
    centre = others[:_BLOCK].mean(0, np.float64)
    squared, places = np.full((len(features), k), np.inf), np.zeros((len(features), k), int)
    for rows, x in _centred(features, centre):
        for columns, y in _centred(others, centre):
            block = _squared_distances(x, y, -1.0)
            nearest = np.argpartition(block, min(k, len(y)) - 1, axis=1)[:, :k]
            every = np.hstack([squared[rows], np.take_along_axis(block, nearest, axis=1)])
            which = np.hstack([places[rows], nearest + columns.start])
            order = np.argsort(every, axis=1, kind='stable')[:, :k]
            squared[rows], places[rows] = (np.take_along_axis(each, order, axis=1) for each in (every, which))
    return np.sqrt(np.maximum(squared, 0.0)), places


def nearest_ratios(distances: Float[Array, 'N K']) -> Float64[np.ndarray, ' N']:
    """Return the nearest distance over the mean of the k nearest: near 0 for a copy, wherever it lies.

    Plain distances are smaller where the training images are dense, for copies and for new images alike.
    """
    means = np.mean(distances, axis=1, dtype=np.float64)
    return np.divide(distances[:, 0], means, out=np.zeros(len(means)), where=means > 0)


def memorised_share(
    ratios: Float[Array, ' N'], held_out: Float[Array, ' M'], *, percent: float = MEMORISED_PERCENT
) -> tuple[float, float]:
    """Return (the share of ratios that are no larger than the held-out ones' quantile of `percent`, its error).

    Images that training has not seen have this share themselves: percent / 100. The error counts the draws of both
    sets of images, and takes the training images as fixed.
    """
    level = percent / 100.0
    deviation = np.sqrt(level * (1.0 - level) / len(held_out))  # of the share of held-out ratios below a fixed one
    limits = np.quantile(held_out, np.clip([level, level - deviation, level + deviation], 0.0, 1.0))
    share, low, high = (float(np.mean(ratios <= limit)) for limit in limits)
    return share, float(np.hypot(np.sqrt(share * (1.0 - share) / len(ratios)), (high - low) / 2.0))


def distance_ratio(nearest: Float[Array, ' N'], held_out: Float[Array, ' M']) -> tuple[float, float]:
    """Return (the median nearest distance over that of held-out images, its error).

    1: as far from the training images as unseen ones; below 1: closer. The error counts the draws of both sets of
    images, and takes the training images as fixed. Raises ValueError if the held-out median is 0.
    """
    (median, error), (other, error_of_other) = _median(nearest), _median(held_out)
    if not other > 0:
        raise ValueError('half of the held-out images, or more, are copies of training images')
    return median / other, float(np.hypot(error, median / other * error_of_other) / other)


def _median(values):
    """Return (the median, its standard error: half the distance of the quantiles one deviation of a rank away)."""
    step = 0.5 / np.sqrt(len(values))
    median, low, high = np.quantile(values, np.clip([0.5, 0.5 - step, 0.5 + step], 0.0, 1.0))
    return float(median), float(high - low) / 2.0


# ---------------------------------------------------------------- with labels


def confusion_matrix(
    logits: Float[Array, 'N K'], labels: Int[Array, ' N'], num_classes: int
) -> Int[np.ndarray, 'num_classes num_classes']:
    """Return how many images of each label (rows) are put into each class (columns)."""
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (labels, np.argmax(logits, axis=1)), 1)
    return counts


def class_accuracy(logits: Float[Array, 'N K'], labels: Int[Array, ' N']) -> float:
    """Return the fraction of images that the judge assigns to the class they were generated for."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def within_class_spread(features: Real[Array, 'N D'], labels: Int[Array, ' N']) -> float:
    """Return the mean over classes of the RMS distance of features to their class's mean; it falls with variety."""
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    spreads = [
        np.sqrt(np.square(members - members.mean(0)).sum(1).mean())
        for members in (features[labels == label] for label in np.unique(labels))
    ]
    return float(np.mean(spreads))
