"""Metrics of generated images, from the features and logits of a judge network, and their error bars.

features: [N, D], any real type; logits: [N, num_classes]; labels: int [N]. Sums are float64, block by block.
"""

from typing import NamedTuple

import numpy as np
import scipy.special

from cfg_jax import neighbours

_BLOCK = 4096  # rows that are float64 at a time


def _blocks(features, size=_BLOCK):
    return (np.asarray(features[start : start + size], np.float64) for start in range(0, len(features), size))


# ---------------------------------------------------------------- Fréchet distance (Heusel et al. 2017, eq. 6)


def frechet_distance(features_a, features_b):
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^{1/2}) of the Gaussians fitted to the features (covariance with N - 1)."""
    return gaussian_distance(*feature_statistics(features_a), *feature_statistics(features_b))


def feature_statistics(features):
    """(mean [D], covariance [D, D] with N - 1), float64, of [N, D] features; [N] is taken for [N, 1]."""
    features = _as_rows(features)
    ((_, mean, covariance),) = _growing_statistics(features, np.arange(len(features)), [len(features)])
    return mean, covariance


def _as_rows(features):
    features = np.asarray(features)
    return features.reshape(len(features), -1)


def _growing_statistics(features, order, sizes):
    """Yields (size, mean, covariance) of the first `size` features in this order; sizes increase."""
    centre = sum(block.sum(0) for block in _blocks(features)) / len(features)
    total, scatter = np.zeros(features.shape[1]), np.zeros((features.shape[1],) * 2)
    for start, stop in zip([0, *sizes], sizes):
        for rows in (order[first : min(first + _BLOCK, stop)] for first in range(start, stop, _BLOCK)):
            block = features[rows] - centre
            total += block.sum(0)
            scatter += block.T @ block
        mean = total / stop
        yield stop, centre + mean, (scatter - stop * np.outer(mean, mean)) / (stop - 1)


def gaussian_distance(mean_a, covariance_a, mean_b, covariance_b):
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians.

    tr (Σa Σb)^{1/2} is the sum of the square roots of the eigenvalues of L^T Σa L, Σb = L L^T: symmetric, so that
    singular covariances need no offset on their diagonals, and a fifth of the time of a matrix root.
    """
    return _distance_to(mean_b, covariance_b)(mean_a, covariance_a)


def _distance_to(mean_b, covariance_b):
    """`gaussian_distance` to one Gaussian, as a function of the other's mean and covariance."""
    root, trace = _root(covariance_b), np.trace(covariance_b)

    def distance(mean, covariance):
        cross = np.linalg.eigvalsh(root.T @ covariance @ root)
        difference = mean - mean_b
        trace_of_root = np.sqrt(np.maximum(cross, 0.0)).sum()
        return float(difference @ difference + np.trace(covariance) + trace - 2.0 * trace_of_root)

    return distance


def _root(covariance):
    """L with L L^T = Σ; of a singular Σ from its eigenvectors."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(np.maximum(values, 0.0))


def check_enough(num_samples, num_features):
    """Raises ValueError, whose text is the reason, if there are too few samples for a Fréchet distance."""
    if num_samples <= num_features:
        raise ValueError(
            f'{num_samples:,} samples of {num_features:,} features: with fewer than {num_features + 1:,} the '
            'covariance is singular, and the Fréchet distance is far above its value for many samples'
        )


def frechet_distance_error(features, mean, covariance):
    """The standard error of the Fréchet distance of N features to a fixed Gaussian.

    To first order in 1/N that of a bootstrap over images with endless resamples (the infinitesimal jackknife, Efron
    1982), for one eigendecomposition: with the optimal transport's T = L (L^T Σ L)^{-1/2} L^T, Σ and μ those of the
    features and L L^T the other covariance, image x moves the distance by 1/N times

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
    return float(np.concatenate(influences).std(ddof=1) / np.sqrt(len(features)))


class Extrapolation(NamedTuple):
    """A line value + slope / N through the distances of the first `sizes` features, in a random order."""

    value: float
    slope: float
    sizes: np.ndarray
    distances: np.ndarray


def extrapolated_frechet_distance(features, mean, covariance, *, num_points=6, seed=0):
    """The Fréchet distance to a Gaussian as N goes to infinity (Chong & Forsyth 2020), an `Extrapolation`.

    The plain distance is too large by about slope / N. The paper's line begins at N / 10; this one at N / 2, for where
    N / 10 is near D it bends. What the finite number of the other's images adds stays in. Raises ValueError unless
    N / 2 > D; from N = 5 D on it is to be trusted.
    """
    features = _as_rows(features)
    number, dimensions = features.shape
    if number // 2 <= dimensions:
        raise ValueError(
            f'the extrapolation over numbers of samples needs {2 * dimensions + 2:,} samples or more, over twice the '
            f'{dimensions:,} features, and has {number:,}'
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


def inception_score(logits, *, num_splits):
    """exp E KL(p(y | x) || p(y)) over `num_splits` parts in order: its (mean, standard deviation) over the parts."""
    scores = [np.exp(divergences.mean()) for divergences in _divergences(logits, num_splits)]
    return float(np.mean(scores)), float(np.std(scores))


def inception_score_error(logits, *, num_splits):
    """The standard error of the score's mean over the parts: to first order that of a bootstrap within each part."""
    variances = [
        np.exp(2.0 * divergences.mean()) * divergences.var() / len(divergences)
        for divergences in _divergences(logits, num_splits)
    ]
    return float(np.sqrt(np.sum(variances)) / num_splits)


def _divergences(logits, num_splits):
    """Yields KL(p(y | x) || p(y)) of the images of each part."""
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f'num_splits is {num_splits}; it must be from 1 to the number of images, {len(logits)}')
    for part in np.array_split(logits, num_splits):
        log_p = scipy.special.log_softmax(np.asarray(part, np.float64), axis=1)
        log_marginal = scipy.special.logsumexp(log_p, axis=0) - np.log(len(part))
        yield np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1)


# ---------------------------------------------------------------- improved precision, recall (Kynkäänniemi et al. 2019)


def precision_recall(generated, real, *, k=3):
    """(precision, recall): the fraction of one set's features within the k-nearest-neighbour balls of the other's."""
    precise, recalled = manifold_members(generated, real, k=k)
    return float(precise.mean()), float(recalled.mean())


def manifold_members(generated, real, *, k=3):
    """What `precision_recall` averages: bool [N] of the generated features, bool [M] of the real ones.

    A bootstrap of either mean holds the other set's balls fixed. Over new draws of generated images the precision
    spreads as it says; the recall, whose balls are theirs, within a quarter of it (Gaussians of 16 dimensions).
    """
    return neighbours.members(np.asarray(generated), np.asarray(real), k)


# ---------------------------------------------------------------- kernel distance (Bińkowski et al. 2018)


def kernel_distance(features_a, features_b):
    """The unbiased squared MMD with the kernel (a·b / D + 1)³, over all features (no subsets)."""
    a, b = np.asarray(features_a), np.asarray(features_b)
    cross = sum(_kernel(x, y).sum() for x in _blocks(a) for y in _blocks(b)) / (len(a) * len(b))
    return float(_mean_off_diagonal(a) + _mean_off_diagonal(b) - 2.0 * cross)


def kernel_distance_subsets(features_a, features_b, *, num_subsets=100, subset_size=1000, seed=0):
    """(mean, standard deviation) of `kernel_distance` over random subsets of both, as the papers report it."""
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
    """The mean of the kernel over pairs of different features; of the pairs of blocks each is computed once."""
    total = 0.0
    for start, x in zip(range(0, len(features), _BLOCK), _blocks(features)):
        within = _kernel(x, x)
        total += within.sum() - np.trace(within)
        total += 2.0 * sum(_kernel(x, y).sum() for y in _blocks(features[start + _BLOCK :]))
    return total / (len(features) * (len(features) - 1))


# ---------------------------------------------------------------- with labels


def class_accuracy(logits, labels):
    """The fraction of images that the judge puts into the class they were asked for."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def within_class_spread(features, labels):
    """Root mean squared distance of a class's features to their mean, averaged over classes: falls as variety does."""
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    spreads = [
        np.sqrt(np.square(members - members.mean(0)).sum(1).mean())
        for members in (features[labels == label] for label in np.unique(labels))
    ]
    return float(np.mean(spreads))


# ---------------------------------------------------------------- error bars


def bootstrap(statistic, *arrays, num_resamples=200, seed=0):
    """The standard error of statistic(*arrays): its deviation as the images are drawn anew, with replacement.

    arrays: [N, ...], whose rows go together; statistic: -> a number or an array, as the error then is.
    """
    number = len(arrays[0])
    rng = np.random.default_rng(seed)
    resamples = (rng.integers(number, size=number) for _ in range(num_resamples))
    errors = np.std([statistic(*(array[rows] for array in arrays)) for rows in resamples], axis=0, ddof=1)
    return float(errors) if errors.ndim == 0 else errors
