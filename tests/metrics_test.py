import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from sklearn import metrics as sklearn_metrics
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from cfg_jax import metrics

DATA = Path(__file__).parent / 'data'
VECTORS = np.load(DATA / 'metrics.npz')
EXPECTED = json.loads((DATA / 'metrics.json').read_text())
A, B, LOGITS = VECTORS['features_a'], VECTORS['features_b'], VECTORS['logits']


def test_against_the_reference_program():
    expected_fid = EXPECTED['fid']['frechet_inception_distance']
    assert metrics.frechet_distance(A, B) == pytest.approx(expected_fid, abs=1e-3)
    mean, deviation = metrics.inception_score(LOGITS, num_splits=10)
    assert mean == pytest.approx(EXPECTED['isc']['inception_score_mean'], rel=1e-6)
    assert deviation == pytest.approx(EXPECTED['isc']['inception_score_std'], rel=1e-6)
    precision, recall = metrics.precision_recall(A, B)
    assert precision == pytest.approx(EXPECTED['prc']['precision'], abs=1e-6)
    assert recall == pytest.approx(EXPECTED['prc']['recall'], abs=1e-6)
    expected_kid = EXPECTED['kid']['kernel_inception_distance_mean']
    assert metrics.kernel_distance(A[:500], B) == pytest.approx(expected_kid, rel=1e-4)


def test_frechet_distance_against_scipys_matrix_root():
    covariance_a, covariance_b = np.cov(A.T), np.cov(B.T)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    expected = np.sum((A.mean(0) - B.mean(0)) ** 2) + np.trace(covariance_a + covariance_b - 2 * root)
    assert metrics.frechet_distance(A, B) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_properties():
    assert metrics.frechet_distance(A, A) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_distance(A, A + 2.0) == pytest.approx(4 * A.shape[1])
    assert metrics.frechet_distance(A, B) == pytest.approx(metrics.frechet_distance(B, A))
    # fewer samples than dimensions: both covariances are singular
    assert metrics.frechet_distance(A[:20], A[:20] + 1.0) == pytest.approx(A.shape[1], rel=1e-6)
    assert metrics.frechet_distance(A[:, 0], 2 * A[:, 0]) == pytest.approx(A[:, 0].mean() ** 2 + A[:, 0].var(ddof=1))


def test_inception_score_against_sklearns_mutual_information():
    """Where each image has one certain class, the score is exp of the entropy of the classes."""
    classes = np.array([0] * 50 + [1] * 30 + [2] * 20)
    certain = 100.0 * np.eye(3)[classes]
    expected = np.exp(sklearn_metrics.mutual_info_score(classes, classes))
    assert metrics.inception_score(certain, num_splits=1)[0] == pytest.approx(expected, rel=1e-6)
    assert metrics.inception_score(np.zeros((100, 3)), num_splits=4) == pytest.approx((1.0, 0.0))
    with pytest.raises(ValueError, match='num_splits'):
        metrics.inception_score(LOGITS, num_splits=0)


def test_precision_recall_against_sklearns_neighbours():
    def covered(points, centres, k):
        radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1]
        return (sklearn_metrics.pairwise_distances(points, centres) <= radii).any(1).mean()

    for k in (1, 3, 5):
        assert metrics.precision_recall(A, B, k=k) == pytest.approx((covered(A, B, k), covered(B, A, k)))
    assert metrics.precision_recall(A, A) == (1.0, 1.0)
    assert metrics.precision_recall(A, B + 1000.0) == (0.0, 0.0)
    with pytest.raises(ValueError, match='k is 3'):
        metrics.precision_recall(A[:3], B)


def test_precision_recall_does_not_depend_on_the_block(monkeypatch):
    whole = metrics.precision_recall(A, B)
    monkeypatch.setattr(metrics._blocks, '__defaults__', (7,))
    assert metrics.precision_recall(A, B) == whole


def test_kernel_distance_against_sklearns_kernel():
    def off_diagonal(matrix):
        return matrix[~np.eye(len(matrix), dtype=bool)].mean()

    k_aa, k_bb, k_ab = (polynomial_kernel(x, y, degree=3, coef0=1) for x, y in ((A, A), (B, B), (A, B)))
    expected = off_diagonal(k_aa) + off_diagonal(k_bb) - 2 * k_ab.mean()
    assert metrics.kernel_distance(A, B) == pytest.approx(expected, rel=1e-8)


def test_accuracy_and_spread():
    labels = LOGITS.argmax(1)
    assert metrics.class_accuracy(LOGITS, labels) == sklearn_metrics.accuracy_score(labels, LOGITS.argmax(1)) == 1
    assert metrics.class_accuracy(LOGITS[:4], np.where(np.arange(4) < 1, labels[:4], -1)) == 0.25
    features = np.array([[0.0, 0], [2, 0], [5, 5], [5, 11]])
    assert metrics.within_class_spread(features, [0, 0, 7, 7]) == pytest.approx((1 + 3) / 2)
