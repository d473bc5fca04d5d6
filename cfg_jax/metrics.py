"""Metrics of generated images, from the features and logits of a judge network. numpy and scipy, float64.

features: [N, D]; logits: [N, num_classes]; labels: int [N].
"""

import numpy as np
import scipy.linalg
import scipy.spatial.distance
import scipy.special

# ---------------------------------------------------------------- Fréchet distance (Heusel et al. 2017, eq. 6)


def frechet_distance(features_a, features_b):
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^{1/2}) of the Gaussians fitted to the features (covariance with N - 1)."""
    return gaussian_distance(*_gaussian(features_a), *_gaussian(features_b))


def _gaussian(features):
    features = np.asarray(features, np.float64)
    return np.atleast_1d(features.mean(0)), np.atleast_2d(np.cov(features, rowvar=False))


def gaussian_distance(mean_a, covariance_a, mean_b, covariance_b):
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians.

    tr (Σa Σb)^{1/2} is the sum of the square roots of the eigenvalues of A^T Σb A, Σa = A A^T: symmetric, so that
    singular covariances need no offset on their diagonals.
    """
    values, vectors = scipy.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    cross = scipy.linalg.eigvalsh(root.T @ covariance_b @ root)
    trace_of_root = np.sqrt(np.maximum(cross, 0.0)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * trace_of_root)


# ---------------------------------------------------------------- Inception score (Salimans et al. 2016)


def inception_score(logits, *, num_splits):
    """exp E KL(p(y | x) || p(y)) over `num_splits` parts in order: its (mean, standard deviation) over the parts."""
    logits = np.asarray(logits, np.float64)
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f'num_splits is {num_splits}; it must be from 1 to the number of images, {len(logits)}')
    log_p = scipy.special.log_softmax(logits, axis=1)
    scores = []
    for part in np.array_split(log_p, num_splits):
        log_marginal = scipy.special.logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp(np.sum(np.exp(part) * (part - log_marginal), axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------- improved precision, recall (Kynkäänniemi et al. 2019)


def precision_recall(generated, real, *, k=3):
    """(precision, recall): the fraction of one set's features within the k-nearest-neighbour balls of the other's."""
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    return _covered(generated, real, k), _covered(real, generated, k)


def _blocks(features, size=2048):
    return (features[start : start + size] for start in range(0, len(features), size))


def _covered(points, centres, k):
    if k >= len(centres):
        raise ValueError(f'k is {k}; it must be below the number of images, {len(centres)}')
    # Column 0 of each sorted row is the point itself.
    radii = np.concatenate(
        [np.partition(scipy.spatial.distance.cdist(block, centres), k, axis=1)[:, k] for block in _blocks(centres)]
    )
    inside = [(scipy.spatial.distance.cdist(block, centres) <= radii).any(axis=1) for block in _blocks(points)]
    return float(np.concatenate(inside).mean())


# ---------------------------------------------------------------- kernel distance (Bińkowski et al. 2018)


def kernel_distance(features_a, features_b):
    """The unbiased squared MMD with the kernel (a·b / D + 1)³, over all features (no subsets)."""
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def mean_off_diagonal(matrix):
        n = len(matrix)
        return (matrix.sum() - np.trace(matrix)) / (n * (n - 1))

    return float(mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b)) - 2.0 * kernel(a, b).mean())


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
