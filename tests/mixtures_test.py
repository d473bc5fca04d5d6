import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cfg_jax import diffusion, guidance, mixtures, samplers, schedules
from cfg_jax.mixtures import Mixture
from tests import mixture as by_hand

STAR = mixtures.star(3, radii=(1.0,), std=0.35)


def random_mixture(dimensions, *, seed=0):
    """Three classes of 1, 2 and 3 Gaussians with full covariances."""
    random = np.random.default_rng(seed)
    roots = 0.4 * random.standard_normal((6, dimensions, dimensions)) / np.sqrt(dimensions)
    covariances = roots @ roots.swapaxes(1, 2) + 0.02 * np.eye(dimensions)
    means = random.standard_normal((6, dimensions)) / np.sqrt(dimensions)
    return Mixture(means, covariances, random.uniform(0.5, 1.5, 6), np.array([0, 1, 1, 2, 2, 2]))


FLAT, DEEP = random_mixture(2), random_mixture(16)
MIXTURES = {'2-D': FLAT, '16-D': DEEP, 'star': STAR}
LOGSNRS = [-20.0, -6.0, -0.1, 0.0, 3.0, 9.0, 20.0, np.inf]


def reference_log_density(mixture, z, logsnr, label=None):
    """log p(z | label) by scipy, float64."""
    alpha2 = 1 / (1 + np.exp(-logsnr))
    shares = np.asarray(mixture.class_weights(label), np.float64)
    terms = [
        np.log(share) + stats.multivariate_normal(np.sqrt(alpha2) * mean, alpha2 * covariance + (1 - alpha2) * np.eye(
            len(mean))).logpdf(z)
        for share, mean, covariance in zip(shares, np.float64(mixture.means), np.float64(mixture.covariances)) if share
    ]  # fmt: skip
    return np.logaddexp.reduce(terms, axis=0)


def noisy(mixture, n, logsnr, seed=0):
    """z of samples, float32 [n, D], and their labels."""
    x, labels = mixture.sample_with_labels(jax.random.key(seed), n)
    return diffusion.q_sample(x, jax.random.normal(jax.random.key(seed + 1), x.shape), logsnr), labels


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize('name', MIXTURES)
@pytest.mark.parametrize('label', [None, 0, 1, 2])
def test_samples_have_the_closed_forms_moments(name, label):
    """Means and covariances to 4 standard errors."""
    mixture, n = MIXTURES[name], 40_000
    x = np.float64(mixture.sample(jax.random.key(3), n, label))
    mean, covariance = map(np.float64, mixture.moments(label))
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 4.5 * np.sqrt(np.diag(covariance) / n))
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    np.testing.assert_array_less(np.abs(products.mean(0) - covariance), 4.5 * products.std(0) / np.sqrt(n))


def test_classes_come_in_their_shares():
    n = 40_000
    _, labels = DEEP.sample_with_labels(jax.random.key(0), n)
    shares = np.array([DEEP.weights[:1].sum(), DEEP.weights[1:3].sum(), DEEP.weights[3:].sum()])
    np.testing.assert_allclose(np.bincount(labels) / n, shares, atol=4 * np.sqrt(0.25 / n))
    each = DEEP.sample(jax.random.key(0), n, jnp.arange(n) % 3)
    np.testing.assert_allclose(each[1::3].mean(0), DEEP.moments(1)[0], atol=4 * 0.5 / np.sqrt(n / 3))


@pytest.mark.parametrize('name', MIXTURES)
@pytest.mark.parametrize('logsnr', LOGSNRS)
@pytest.mark.parametrize('label', [None, 2])
def test_the_density_is_scipys(name, logsnr, label):
    z, _ = noisy(MIXTURES[name], 200, logsnr)
    expected = reference_log_density(MIXTURES[name], np.float64(z), logsnr, label)
    np.testing.assert_allclose(MIXTURES[name].log_density(z, logsnr, label), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('name', MIXTURES)
@pytest.mark.parametrize('logsnr', [-20.0, -6.0, 0.0, 3.0, 9.0])
def test_the_score_is_the_densitys_gradient(name, logsnr):
    mixture = MIXTURES[name]
    z, labels = noisy(mixture, 200, logsnr)
    for label in (None, 1, labels):
        expected = jax.grad(lambda z, label=label: mixture.log_density(z, logsnr, label).sum())(z)
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(mixture.score(z, logsnr, label), expected, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize('logsnr', [-20.0, -3.0, 0.0, 4.0, 20.0])
def test_eps_is_right_to_float32_at_both_ends(logsnr):
    """Against the same formulas in float64, which are also those of tests/mixture.py where classes are round."""
    z, labels = noisy(DEEP, 300, logsnr)
    alpha2 = 1 / (1 + np.exp(-logsnr))
    wide = np.float64(z)
    densities, scores = [], []
    for share, mean, covariance in zip(*map(np.float64, (DEEP.weights, DEEP.means, DEEP.covariances))):
        inverse = np.linalg.inv(alpha2 * covariance + (1 - alpha2) * np.eye(16))
        apart = wide - np.sqrt(alpha2) * mean
        densities.append(np.log(share) + 0.5 * np.linalg.slogdet(inverse)[1] - 0.5 * np.sum(apart @ inverse * apart, 1))
        scores.append(-apart @ inverse)
    for chosen in (labels, np.full(300, DEEP.null_label)):
        member = (np.asarray(DEEP.labels) == np.asarray(chosen)[:, None]) | (np.asarray(chosen)[:, None] == 3)
        logits = np.where(member, np.transpose(densities), -np.inf)
        shares = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
        expected = -np.sqrt(1 - alpha2) * np.einsum('bk,kbd->bd', shares, scores)
        eps = DEEP.model(z, jnp.full(300, logsnr), jnp.asarray(chosen)).eps
        np.testing.assert_allclose(eps, expected, rtol=1e-5, atol=2e-6 if logsnr < 0 else 2e-5)
        x = (wide - np.sqrt(1 - alpha2) * expected) / np.sqrt(alpha2)
        np.testing.assert_allclose(DEEP.expected_x(z, logsnr, jnp.asarray(chosen)), x, atol=2e-5)


@pytest.mark.parametrize('logsnr', [-8.0, 0.0, 8.0])
def test_it_is_the_mixture_by_hand(logsnr):
    same = Mixture(by_hand.MEANS, by_hand.SCALE**2 * np.stack([np.eye(2)] * 3), np.ones(3), np.arange(3))
    z, labels = noisy(same, 200, logsnr)
    at = jnp.full(200, logsnr)
    for chosen in (labels, jnp.full(200, by_hand.NULL)):
        np.testing.assert_allclose(same.model(z, at, chosen).eps, by_hand.model(z, at, chosen).eps, atol=1e-4)
    np.testing.assert_allclose(same.log_prob(z, at, labels), by_hand.log_posterior(z, at, labels), atol=2e-5)


@pytest.mark.parametrize('logsnr', [-20.0, -10.0, 0.0, 10.0, 20.0])
def test_the_posterior_keeps_its_digits(logsnr):
    """At λ = -20 the classes' densities differ by 1e-4 of 20: the difference is right to 1e-4 of itself."""
    z, _ = noisy(DEEP, 300, logsnr)
    by_class = np.stack([reference_log_density(DEEP, np.float64(z), logsnr, label) for label in range(3)], axis=1)
    shares = np.array([DEEP.weights[np.asarray(DEEP.labels) == label].sum() for label in range(3)], np.float64)
    prior = np.log(shares / shares.sum())
    logits = by_class + prior
    expected = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    found = np.float64(DEEP.log_posterior(z, logsnr))
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, atol=1e-6)
    scale = np.abs(expected - prior).max()
    tolerance = 2e-7 + 1e-4 * scale if logsnr < 0 else 1e-5 * scale
    np.testing.assert_allclose(found, expected, atol=tolerance)
    gradient = jax.grad(lambda z: DEEP.log_prob(z, logsnr, jnp.zeros(300, jnp.int32)).sum())(z)
    exact = DEEP.score(z, logsnr, 0) - DEEP.score(z, logsnr)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient, exact, atol=2e-5 * float(jnp.abs(exact).max()) + 2e-6)


# ---------------------------------------------------------------- as a model, for guidance and samplers

IMAGES = Mixture(DEEP.means, DEEP.covariances, DEEP.weights, DEEP.labels)
LABELS = jnp.arange(12) % 3
GUIDED = {
    'classifier_free': lambda: guidance.classifier_free(DEEP.model, LABELS, 1.5, null_label=DEEP.null_label),
    'conditional': lambda: guidance.conditional(DEEP.model, LABELS, 0.0, null_label=DEEP.null_label),
    'unconditional': lambda: guidance.unconditional(DEEP.model, LABELS, 0.0, null_label=DEEP.null_label),
    'classifier': lambda: guidance.classifier(
        guidance.conditional(DEEP.model, LABELS, 0.0, null_label=DEEP.null_label), DEEP.log_prob, LABELS, 1.5
    ),
}


@pytest.mark.parametrize(
    ('form', 'sampler'),
    [('classifier_free', 'ancestral'), ('classifier', 'ddim'), ('conditional', 'ddim'), ('unconditional', 'ddim')],
)
def test_every_guidance_and_sampler_takes_it(form, sampler):
    """As vectors and as images 2x2x4, to the same numbers."""
    keys = samplers.image_keys(0, jnp.arange(12))
    grid = schedules.logsnr_grid(schedules.cosine_logsnr, 8)
    flat = samplers.step_noise(keys, 0, (16,))

    def draw(z):
        noise = z.reshape(12, 2, 2, 4)
        return getattr(samplers, sampler)(GUIDED[form](), noise, grid, keys, clip_x=False)

    x = jax.jit(draw)(flat)
    assert x.shape == (12, 2, 2, 4) and np.isfinite(x).all()
    images = GUIDED[form]()(flat.reshape(12, 2, 2, 4), jnp.zeros(12)).eps
    np.testing.assert_allclose(images.reshape(12, 16), GUIDED[form]()(flat, jnp.zeros(12)).eps, atol=1e-6)


def test_the_implicit_classifier_and_the_mean_shift_take_it():
    z = jax.random.normal(jax.random.key(0), (12, 16))
    at = jnp.zeros(12)
    exact = DEEP.score(z, at, LABELS) - DEEP.score(z, at)
    implicit = guidance.implicit_classifier_score(DEEP.model, LABELS, null_label=DEEP.null_label)
    np.testing.assert_allclose(implicit(z, at), exact, atol=1e-5)
    shift = guidance.classifier_mean_shift(DEEP.log_prob, LABELS, 2.0)(z, at, 0.25)
    np.testing.assert_allclose(shift, 0.5 * exact, atol=1e-5)


@pytest.mark.parametrize('logsnr', [-12.0, -3.0, 0.0, 3.0, 12.0])
@pytest.mark.parametrize('weight', [0.0, 1.0, 4.0])
def test_classifier_free_is_classifier_guidance_from_either_side(weight, logsnr):
    """Conditional with w, unconditional with w + 1 (paper, section 3.1), and the gradient of the guided target."""
    z, labels = noisy(FLAT, 300, logsnr)
    at = jnp.full(300, logsnr)
    plain = {name: getattr(guidance, name)(FLAT.model, labels, 0.0, null_label=3)
             for name in ('conditional', 'unconditional')}  # fmt: skip
    free = guidance.classifier_free(FLAT.model, labels, weight, null_label=3)(z, at).eps
    for start, factor in (('conditional', weight), ('unconditional', weight + 1.0)):
        eps = guidance.classifier(plain[start], FLAT.log_prob, labels, factor)(z, at).eps
        np.testing.assert_allclose(eps, free, atol=1e-5 * max(1.0, float(jnp.abs(free).max())))
    gradient = jax.grad(lambda z: FLAT.target_log_density(z, labels, weight, logsnr).sum())(z)
    np.testing.assert_allclose(diffusion.score(free, logsnr), gradient, atol=3e-5 * float(jnp.abs(gradient).max()))


# ---------------------------------------------------------------- the guided target


def integrated(mixture, label, weight, *, size=4.5, points=700):
    """(normaliser, mass of each class's region) of the target in 2-D, by a sum over a grid, float64."""
    line = (np.arange(points) + 0.5) / points * 2 * size - size
    grid = np.float32(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2))
    density = np.exp(np.float64(jax.jit(mixture.target_log_density, static_argnums=1)(grid, label, weight)))
    likeliest = np.argmax(jax.jit(mixture.log_posterior)(grid), axis=1)
    cell = (2 * size / points) ** 2
    normaliser = density.sum() * cell
    return normaliser, np.bincount(likeliest, density, mixture.num_classes) * cell / normaliser


@pytest.mark.parametrize(('name', 'weight'), [('star', 4.0), ('2-D', 0.0), ('2-D', 1.0)])
def test_the_targets_mass_is_the_integrals(name, weight):
    """To 1e-3, in the region of every class."""
    mixture = MIXTURES[name]
    normaliser, mass = integrated(mixture, 1, weight)
    jitted = {'static_argnums': (1, 2)}
    found, error = jax.jit(mixture.target_mass, **jitted)(jax.random.key(1), 1_000_000, 1, weight)
    assert 0 < float(error.max()) < 1e-3 / 2
    np.testing.assert_allclose(found, mass, atol=1e-3)
    found, error = jax.jit(mixture.target_normaliser, **jitted)(jax.random.key(2), 400_000, 1, weight)
    assert abs(found - normaliser) < 4 * error + 1e-5
    if weight == 0:
        assert normaliser == pytest.approx(1.0, abs=1e-4)


def test_resampling_draws_from_the_target():
    """The mean along the class's axis is the weighted one, and that of an integral."""
    samples = jax.jit(STAR.target_samples, static_argnums=(1, 2))(jax.random.key(0), 100_000, 0, 4.0)
    assert 10_000 < float(samples.effective_size) < 100_000
    mean, error = samples.mean(samples.x)
    drawn = samples.resample(jax.random.key(1), 20_000)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=4 * 0.35 / np.sqrt(20_000))
    line = np.linspace(-4.5, 4.5, 500)
    grid = np.float32(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2))
    density = np.exp(np.float64(jax.jit(STAR.target_log_density, static_argnums=1)(grid, 0, 4.0)))
    expected = density @ np.float64(grid) / density.sum()
    np.testing.assert_array_less(np.abs(mean - expected), 4 * np.asarray(error) + 1e-5)
    equal = STAR.target_samples(jax.random.key(0), 1000, 0, 0.0)
    assert float(equal.effective_size) == pytest.approx(1000, rel=1e-4)


def test_it_is_a_pytree():
    z, labels = noisy(FLAT, 50, 0.0)
    leaves = jax.tree.leaves(FLAT)
    assert len(leaves) == 5
    through = jax.jit(lambda mixture, z: mixture.model(z, 0.0, labels).eps)(FLAT, z)
    np.testing.assert_allclose(through, FLAT.model(z, 0.0, labels).eps, atol=1e-6)
    moved = jax.tree.map(lambda a: a, FLAT)
    assert moved.num_classes == 3 and np.array_equal(moved.labels, FLAT.labels)


def test_a_star_has_its_classes_around_the_origin():
    star = mixtures.star(3, radii=(0.4, 1.0), std=0.1, dimensions=5)
    assert star.means.shape == (6, 5) and star.num_classes == 3 and star.dimensions == 5
    np.testing.assert_allclose(star.means[:2, :2], [[0, 0.4], [0, 1.0]], atol=1e-6)
    np.testing.assert_allclose(star.moments()[0], 0.0, atol=1e-6)
    for a, b in itertools.combinations(range(1, 6, 2), 2):
        assert np.linalg.norm(star.means[a] - star.means[b]) == pytest.approx(np.sqrt(3), rel=1e-5)


GOOD = {'means': np.zeros((2, 2)), 'covariances': np.stack([np.eye(2)] * 2), 'weights': np.ones(2),
        'labels': np.arange(2)}  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('means', np.zeros(2), r'means have shape \(2,\); they must be \[K, D\]'),
        ('means', np.full((2, 2), np.nan), 'means are not all finite'),
        ('covariances', np.eye(2), r'covariances have shape \(2, 2\); for means of \(2, 2\) it must be \(2, 2, 2\)'),
        ('covariances', np.stack([np.eye(2), np.diag([1.0, -1.0])]), r'covariances\[1\] is not positive definite'),
        ('covariances', np.stack([np.eye(2), np.ones((2, 2))]), r'covariances\[1\] is not positive definite'),
        ('covariances', np.stack([np.array([[1.0, 0.5], [0.0, 1.0]])] * 2), r'covariances\[0\] is not symmetric'),
        ('weights', np.array([1.0, 0.0]), r'weights are \[1.0, 0.0\]; they must be positive'),
        ('weights', np.ones(3), r'weights have shape \(3,\)'),
        ('labels', np.array([0, 2]), r'labels are \[0, 2\]; they must be whole numbers, each of 0 .. n-1'),
        ('labels', np.array([0.0, 1.0]), 'they must be whole numbers'),
    ],
)
def test_what_is_no_mixture_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{**GOOD, name: value})


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match=r'z has shape \(4, 2, 2, 1\); a mixture in 2 dimensions'):
        FLAT.model(jnp.zeros((4, 2, 2, 1)), jnp.zeros(4), jnp.zeros(4, jnp.int32))
    for label in (-1, 4):
        with pytest.raises(ValueError, match=f'label is {label}; allowed: 0 to 2, and 3 for the whole mixture'):
            FLAT.sample(jax.random.key(0), 3, label)
