"""Metrics against the reference program's numbers, against scipy and scikit-learn, and against exact values."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist
from sklearn import metrics as sklearn_metrics
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from cfg_jax import metrics

DATA = Path(__file__).parent / 'data'
VECTORS = np.load(DATA / 'metrics.npz')
EXPECTED = json.loads((DATA / 'metrics.json').read_text())
NEIGHBOURS = json.loads((DATA / 'density_coverage.json').read_text())
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


def test_statistics_of_features():
    for features in (A, A.astype(np.float16), A[:5] + 1e4):
        mean, covariance = metrics.feature_statistics(features)
        np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64).T), rtol=1e-9, atol=1e-12)


def test_statistics_of_more_than_one_block(monkeypatch):
    monkeypatch.setattr(metrics, '_BLOCK', 64)
    test_statistics_of_features()


def test_frechet_distance_is_refused_for_few_samples():
    metrics.check_enough(2049, 2048)
    with pytest.raises(ValueError, match='2,048 samples of 2,048 features: with fewer than 2,049'):
        metrics.check_enough(2048, 2048)


class Draws:
    """Features drawn from one Gaussian, and its known distance to another."""

    def __init__(self, dimensions=32):
        rng = np.random.default_rng(0)
        self.variances = 1.0 / np.arange(1, dimensions + 1)
        self.other = np.zeros(dimensions), np.diag(self.variances * rng.uniform(0.6, 1.6, dimensions))
        self.mean = 0.2 * np.sqrt(self.variances)
        self.true = metrics.gaussian_distance(self.mean, np.diag(self.variances), *self.other)

    def draw(self, number, seed):
        rng = np.random.default_rng(seed)
        return self.mean + np.sqrt(self.variances) * rng.standard_normal((number, len(self.mean)))

    def distance(self, features):
        return metrics.gaussian_distance(*metrics.feature_statistics(features), *self.other)


def bootstrap(statistic, features, num_resamples=200):
    """Return the standard deviation of the statistic over resamples of the features, with replacement."""
    rng = np.random.default_rng(0)
    resamples = (rng.integers(len(features), size=len(features)) for _ in range(num_resamples))
    return np.std([statistic(features[rows]) for rows in resamples], ddof=1)


def test_the_error_of_the_frechet_distance():
    """It equals the spread over independent draws of all images, and a plain bootstrap's with many resamples."""
    draws = Draws()
    spread = np.std([draws.distance(draws.draw(600, seed)) for seed in range(200)], ddof=1)
    features = draws.draw(600, 1000)
    error = metrics.frechet_distance_error(features, *draws.other)
    assert error == pytest.approx(spread, rel=0.25)
    assert error == pytest.approx(bootstrap(draws.distance, features), rel=0.25)


def test_the_extrapolated_frechet_distance():
    """It is far closer to the truth than the plain distance of the same samples, whose bias is slope / N."""
    draws = Draws()
    plain, extrapolated = [], []
    for seed in range(10):
        features = draws.draw(400, seed)
        line = metrics.extrapolated_frechet_distance(features, *draws.other, seed=seed)
        plain.append(draws.distance(features))
        extrapolated.append(line.value)
        assert line.sizes.tolist() == [200, 240, 280, 320, 360, 400]
        assert line.distances[-1] == pytest.approx(plain[-1], rel=1e-9)
        np.testing.assert_allclose(line.value + line.slope / line.sizes, line.distances, atol=0.03)
    assert abs(np.mean(extrapolated) - draws.true) < 0.2 * abs(np.mean(plain) - draws.true)
    assert (np.abs(np.subtract(extrapolated, draws.true)) < np.abs(np.subtract(plain, draws.true))).all()
    assert np.mean(plain) - line.slope / 400 == pytest.approx(draws.true, abs=0.05)


def test_an_extrapolation_needs_samples():
    draws = Draws()
    with pytest.raises(ValueError, match=r'needs 66 samples or more \(over twice the 32 features\), but there are 65'):
        metrics.extrapolated_frechet_distance(draws.draw(65, 0), *draws.other)
    with pytest.raises(ValueError, match='num_points is 1'):
        metrics.extrapolated_frechet_distance(draws.draw(66, 0), *draws.other, num_points=1)


def test_frechet_distance_properties():
    assert metrics.frechet_distance(A, A) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_distance(A, A + 2.0) == pytest.approx(4 * A.shape[1])
    assert metrics.frechet_distance(A, B) == pytest.approx(metrics.frechet_distance(B, A))
    # fewer samples than dimensions: both covariances are singular
    assert metrics.frechet_distance(A[:20], A[:20] + 1.0) == pytest.approx(A.shape[1], rel=1e-6)
    assert metrics.frechet_distance(A[:, 0], 2 * A[:, 0]) == pytest.approx(A[:, 0].mean() ** 2 + A[:, 0].var(ddof=1))


def test_inception_score_against_sklearns_mutual_information():
    """If each image has one certain class, the score is exp of the entropy of the classes."""
    classes = np.array([0] * 50 + [1] * 30 + [2] * 20)
    certain = 100.0 * np.eye(3)[classes]
    expected = np.exp(sklearn_metrics.mutual_info_score(classes, classes))
    assert metrics.inception_score(certain, num_splits=1)[0] == pytest.approx(expected, rel=1e-6)
    assert metrics.inception_score(np.zeros((100, 3)), num_splits=4) == pytest.approx((1.0, 0.0))
    with pytest.raises(ValueError, match='num_splits'):
        metrics.inception_score(LOGITS, num_splits=0)


def test_the_error_of_the_inception_score():
    def score(logits):
        return metrics.inception_score(logits, num_splits=1)[0]

    parts = np.array_split(LOGITS, 4)
    expected = np.sqrt(sum(bootstrap(score, part) ** 2 for part in parts)) / 4
    assert metrics.inception_score_error(LOGITS, num_splits=4) == pytest.approx(expected, rel=0.15)
    assert metrics.inception_score_error(np.zeros((100, 3)), num_splits=4) == 0


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


def by_differences(points, centres, k):
    """Return bool [N]: which points lie in a ball, by scipy's float64 distances."""
    radii = np.partition(cdist(centres, centres), k, axis=1)[:, k]
    return (cdist(points, centres) <= radii).any(1)


def crowd(number, seed):
    """Return points in five tight clusters far apart: float32 cannot resolve the distances within a cluster."""
    rng = np.random.default_rng(seed)
    return (100.0 * rng.integers(0, 5, (number, 1)) + 1e-2 * rng.standard_normal((number, 32))).astype(np.float32)


DUPLICATES = A[np.random.default_rng(0).integers(0, 100, 400)]


@pytest.mark.parametrize(
    ('a', 'b'),
    [
        (A, B), (A, A[::3]), (A, DUPLICATES), (DUPLICATES, DUPLICATES[::2] + 0.0), (crowd(300, 0), crowd(200, 1)),
        (A, A + 1000.0), (np.ones_like(A), A), (A.astype(np.float16), B),
        (np.arange(90.0)[:, None] % 17, 2.0 * np.arange(50)[:, None]),
    ],
    ids=['plain', 'subset', 'duplicates', 'all twice', 'clusters', 'far', 'constant', 'half precision', 'grid'],
)  # fmt: skip
@pytest.mark.parametrize('block', [37, 128, 4096])
def test_the_members_of_a_manifold_are_exact(a, b, block, monkeypatch):
    """Ties and distances that float32 confuses are decided as in float64, in several blocks and in one."""
    monkeypatch.setattr(metrics, '_BLOCK', block)
    for k in (1, 3):
        inside_b, inside_a = metrics.manifold_members(a, b, k=k)
        np.testing.assert_array_equal(inside_b, by_differences(a, b, k))
        np.testing.assert_array_equal(inside_a, by_differences(b, a, k))


def test_the_edge_of_a_ball_is_inside():
    """The balls of real features 1 apart have radius 1; a generated feature lies at an edge, just beyond or within."""
    real = np.stack([np.arange(5.0), np.zeros(5)], axis=1)
    for offset, inside in ((1.0, True), (1.0 + 1e-9, False), (1.0 - 1e-9, True)):
        generated = np.array([[2.0, offset], [2.0, 100.0]])
        assert metrics.manifold_members(generated, real, k=1)[0].tolist() == [inside, False]


def test_distances_are_bounded_on_both_sides():
    """In 2,048 dimensions the bounds enclose the distances by differences, and differ by less than 1e-11 of them."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((128, 2048)) + 1.0 for _ in range(2))
    lower, exact, upper = (
        metrics._squared_distances(x, y, -1.0),
        cdist(x, y) ** 2,
        metrics._squared_distances(x, y, 1.0),
    )
    assert (lower < exact).all() and (exact < upper).all() and ((upper - lower) < 1e-11 * exact).all()


def test_features_must_be_finite():
    with pytest.raises(ValueError, match='finite'):
        metrics.precision_recall(np.where(np.arange(len(A))[:, None] == 3, np.nan, A), B)
    with pytest.raises(ValueError, match='finite'):
        metrics.precision_recall(A, np.where(np.arange(len(B))[:, None] == 3, np.inf, B))


@pytest.mark.parametrize('block', [128, 4096])
def test_density_and_coverage_against_the_authors_program(block, monkeypatch):
    monkeypatch.setattr(metrics, '_BLOCK', block)
    for k in (3, 5):
        expected = NEIGHBOURS[f'k{k}']
        density, coverage = metrics.density_coverage(A, B, k=k)
        assert density == pytest.approx(expected['density'], abs=1e-6)
        assert coverage == pytest.approx(expected['coverage'], abs=1e-6)
        assert metrics.precision_recall(A, B, k=k) == pytest.approx((expected['precision'], expected['recall']))
    # all four at once, with a k of their own each
    both = metrics.neighbourhoods(A, B, k=3, coverage_k=5)
    assert (both.precise.mean(), both.recalled.mean()) == metrics.precision_recall(A, B, k=3)
    assert (both.balls.mean() / 5, (both.members > 0).mean()) == metrics.density_coverage(A, B, k=5)


@pytest.mark.parametrize('block', [37, 4096])
def test_the_balls_are_those_of_plain_distances(block, monkeypatch):
    monkeypatch.setattr(metrics, '_BLOCK', block)
    for real in (A[:200], DUPLICATES, crowd(200, 1)):
        real = real[:, :32]
        inside = cdist(A[:, :32], real) < np.partition(cdist(real, real), 5, axis=1)[:, 5]
        found = metrics.neighbourhoods(A[:, :32], real, k=None, coverage_k=5)
        np.testing.assert_array_equal(found.balls, inside.sum(1))
        np.testing.assert_array_equal(found.members, inside.sum(0))
        np.testing.assert_array_equal(found.only, inside[:, inside.sum(0) == 1].sum(1))


def test_density_and_coverage_properties():
    assert metrics.density_coverage(A, A) == (1.0, 1.0)  # the k-th neighbour lies on the edge, which is outside
    assert metrics.density_coverage(A, A + 1000.0) == (0.0, 0.0)
    crowded = np.repeat(A[:1], 50, axis=0)
    density, coverage = metrics.density_coverage(crowded, A)
    assert density > 0 and coverage == density * 5 / len(A)  # one mode: each ball that holds it is covered
    draws = [np.random.default_rng(seed).standard_normal((2000, 4)) for seed in range(2)]
    assert metrics.density_coverage(*draws) == pytest.approx((1.0, 0.97), abs=0.05)
    with pytest.raises(ValueError, match='k is 5; it must be below the number of images, 5'):
        metrics.density_coverage(A, B[:5])


def test_the_errors_of_density_and_coverage():
    """Against draws of new generated images, with the real ones fixed."""
    real = np.random.default_rng(0).standard_normal((300, 6))
    values, errors = [], []
    for seed in range(1, 101):
        generated = 0.9 * np.random.default_rng(seed).standard_normal((100, 6))
        found = metrics.neighbourhoods(generated, real, k=None)
        values.append((found.balls.mean() / 5, (found.members > 0).mean()))
        errors.append(metrics.density_coverage_errors(found))
    density, coverage = np.mean(errors, axis=0) / np.std(values, axis=0, ddof=1)
    assert density == pytest.approx(1.0, abs=0.2) and 0.95 < coverage < 1.8
    assert metrics.density_coverage_errors(metrics.neighbourhoods(A, A + 1000.0)) == (0, 0)


def test_kernel_distance_against_sklearns_kernel():
    def off_diagonal(matrix):
        return matrix[~np.eye(len(matrix), dtype=bool)].mean()

    a, b = np.float64(A), np.float64(B)  # scikit-learn 1.4 computes in the type that it is given
    k_aa, k_bb, k_ab = (polynomial_kernel(x, y, degree=3, coef0=1) for x, y in ((a, a), (b, b), (a, b)))
    expected = off_diagonal(k_aa) + off_diagonal(k_bb) - 2 * k_ab.mean()
    assert metrics.kernel_distance(A, B) == pytest.approx(expected, rel=1e-8)


def test_kernel_distance_of_more_than_one_block(monkeypatch):
    expected = metrics.kernel_distance(A, B)
    monkeypatch.setattr(metrics, '_BLOCK', 64)
    assert metrics.kernel_distance(A, B) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_subsets():
    mean, deviation = metrics.kernel_distance_subsets(A, B, num_subsets=50, subset_size=200)
    assert mean == pytest.approx(metrics.kernel_distance(A, B), abs=2 * deviation / np.sqrt(50) + 0.02)
    assert 0 < deviation < 0.3 * mean
    # the whole of both sets is one subset only
    whole = metrics.kernel_distance_subsets(A[:500], B, num_subsets=2, subset_size=500)
    assert whole == pytest.approx((metrics.kernel_distance(A[:500], B), 0), rel=1e-9, abs=1e-9)
    with pytest.raises(ValueError, match='subset_size is 501'):
        metrics.kernel_distance_subsets(A, B, subset_size=501)


def test_the_vendi_score_against_the_authors_program():
    assert metrics.vendi_score(A[:300])[0] == pytest.approx(NEIGHBOURS['vendi_cosine_first300_of_a'], abs=1e-6)
    # more features than images: from K itself
    wide = np.hstack([A[:300], np.zeros((300, 400))])
    assert metrics.vendi_score(wide) == pytest.approx(metrics.vendi_score(A[:300]), rel=1e-9)


def test_the_vendi_score_counts_modes(monkeypatch):
    monkeypatch.setattr(metrics, '_BLOCK', 64)
    modes = np.eye(12)[np.arange(140) % 7] * np.arange(1, 141)[:, None]  # lengths do not count
    assert metrics.vendi_score(modes) == pytest.approx((7.0, 0.0))
    assert metrics.vendi_score(np.eye(12)[:7])[0] == pytest.approx(7.0)
    assert metrics.vendi_score(np.ones((50, 3))) == pytest.approx((1.0, 0.0))
    shares = np.array([0.7, 0.2, 0.1])
    unequal = np.repeat(np.eye(3), [70, 20, 10], axis=0)
    assert metrics.vendi_score(unequal)[0] == pytest.approx(np.exp(-shares @ np.log(shares)))
    assert metrics.vendi_score(np.vstack([modes, np.zeros((1, 12))]))[0] == pytest.approx(7.0, rel=0.05)


def test_the_error_of_the_vendi_score():
    draws = [np.random.default_rng(seed).standard_normal((400, 8)) + 0.5 for seed in range(100)]
    scores, errors = zip(*map(metrics.vendi_score, draws))
    assert np.mean(errors) == pytest.approx(np.std(scores, ddof=1), rel=0.25)
    _, error = metrics.vendi_score(draws[0])
    assert error == pytest.approx(bootstrap(lambda x: metrics.vendi_score(x)[0], draws[0]), rel=0.25)


@pytest.mark.parametrize('block', [37, 4096])
def test_nearest_neighbours_against_plain_distances(block, monkeypatch):
    monkeypatch.setattr(metrics, '_BLOCK', block)
    distances, places = metrics.nearest_neighbours(A, B.astype(np.float16), k=7)
    expected = cdist(A, B.astype(np.float16))
    np.testing.assert_array_equal(places, np.argsort(expected, axis=1)[:, :7])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :7], rtol=1e-10)
    copies, places = metrics.nearest_neighbours(B[:90], B, k=1)
    assert not copies.any() and places[:, 0].tolist() == list(range(90))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f'k is {k}; it must be from 1 to the number of other features, 3'):
            metrics.nearest_neighbours(A, B[:3], k=k)


TRAINING = np.random.default_rng(999).standard_normal((1500, 8))


def to_training(features):
    return metrics.nearest_neighbours(features, TRAINING, k=50)[0]


def memorisation(generated, held_out):
    generated, held_out = to_training(generated), to_training(held_out)
    share = metrics.memorised_share(metrics.nearest_ratios(generated), metrics.nearest_ratios(held_out))
    return *share, *metrics.distance_ratio(generated[:, 0], held_out[:, 0])


def test_copies_are_found_and_new_draws_are_not():
    rng = np.random.default_rng(0)
    held_out, fresh, copies = rng.standard_normal((800, 8)), rng.standard_normal((800, 8)), TRAINING[:800]
    assert memorisation(held_out, held_out)[::2] == (0.01, 1.0)
    assert memorisation(copies, held_out) == (1.0, 0.0, 0.0, 0.0)
    share, error, ratio, error_of_ratio = memorisation(fresh, held_out)
    assert abs(share - 0.01) < 2.5 * error < 0.02 and abs(ratio - 1.0) < 2.5 * error_of_ratio < 0.06
    # near copies, of an eighth of the samples
    share, _, ratio, _ = memorisation(np.vstack([copies[:100] + 0.01, fresh[100:]]), held_out)
    assert share == pytest.approx(0.125 + 0.01, abs=0.01) and 0.9 < ratio < 1.0
    # less variety alone: closer to the training images, which lie closer to each other there too
    share, error, ratio, _ = memorisation(0.6 * fresh, held_out)
    assert share < 0.03 and ratio < 0.85
    with pytest.raises(ValueError, match='half of the held-out images, or more, are copies of training images'):
        memorisation(fresh, copies)


def test_equal_images_have_a_ratio_too():
    distances = np.array([[0.0, 0.0], [0.0, 2.0], [1.0, 3.0]])
    assert metrics.nearest_ratios(distances).tolist() == [0.0, 0.0, 0.5]


def test_the_errors_of_memorisation():
    """Against new draws of both sets of images."""
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        found.append(memorisation(0.8 * rng.standard_normal((400, 8)), rng.standard_normal((400, 8))))
    share, error, ratio, error_of_ratio = np.transpose(found)
    assert error.mean() == pytest.approx(share.std(ddof=1), rel=0.3)
    assert error_of_ratio.mean() == pytest.approx(ratio.std(ddof=1), rel=0.3)


def test_the_distance_of_two_halves_of_a_set():
    """Its mean and deviation are those of two independent sets of half the size."""
    draws = Draws(8)
    pairs = [(draws.draw(500, 2 * seed), draws.draw(500, 2 * seed + 1)) for seed in range(100)]
    expected = [metrics.frechet_distance(*pair) for pair in pairs]
    halves = [metrics.frechet_distance_of_halves(np.vstack(pair), seed=seed) for seed, pair in enumerate(pairs[:30])]
    mean, deviation = np.mean(halves, axis=0)
    assert mean == pytest.approx(np.mean(expected), rel=0.1)
    assert deviation == pytest.approx(np.std(expected, ddof=1), rel=0.25)
    assert metrics.frechet_distance_of_halves(A) == metrics.frechet_distance_of_halves(A)
    with pytest.raises(ValueError, match='32 samples of 48 features'):
        metrics.frechet_distance_of_halves(A[:65])


def test_the_halves_have_the_same_share_of_each_class():
    """Otherwise chance makes their means differ, by more than anything within the classes that lie far apart."""
    labels = np.repeat([0, 1, 2], [200, 100, 100])
    features = 30.0 * np.eye(4)[labels] + np.random.default_rng(0).standard_normal((400, 4))
    shuffled = np.random.default_rng(1).permutation(400)
    with_labels = metrics.frechet_distance_of_halves(features[shuffled], labels[shuffled])
    assert 10 * with_labels[0] < metrics.frechet_distance_of_halves(features)[0]


def test_accuracy_and_spread():
    labels = LOGITS.argmax(1)
    assert metrics.class_accuracy(LOGITS, labels) == sklearn_metrics.accuracy_score(labels, LOGITS.argmax(1)) == 1
    assert metrics.class_accuracy(LOGITS[:4], np.where(np.arange(4) < 1, labels[:4], -1)) == 0.25
    features = np.array([[0.0, 0], [2, 0], [5, 5], [5, 11]])
    assert metrics.within_class_spread(features, np.array([0, 0, 7, 7])) == pytest.approx((1 + 3) / 2)
