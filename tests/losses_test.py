from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cfg_jax import diffusion, losses, samplers, schedules
from cfg_jax.diffusion import Prediction
from tests import mixture

X = jax.random.uniform(jax.random.key(0), (512, 2, 2, 1), minval=-1.0)
LABELS = jnp.arange(512) % 10


def loss_of(network, **options):
    return losses.diffusion_loss(
        network,
        X,
        LABELS,
        jax.random.key(1),
        **{'schedule': schedules.cosine_logsnr, 'null_label': 10, 'p_uncond': 0.1, **options},
    )


def test_labels_are_dropped_with_the_right_probability():
    labels, dropped = losses.drop_labels(jax.random.key(0), jnp.arange(20_000) % 10, p_uncond=0.2, null_label=10)
    assert abs(float(dropped.mean()) - 0.2) < 4 * np.sqrt(0.16 / 20_000)
    np.testing.assert_array_equal(labels, np.where(dropped, 10, np.arange(20_000) % 10))


@pytest.mark.parametrize('p_uncond', [0.0, 1.0])
def test_the_network_sees_the_dropped_labels(p_uncond):
    seen = []
    out = loss_of(lambda z, logsnr, labels: seen.append(labels) or z, p_uncond=p_uncond)
    np.testing.assert_array_equal(seen[0], 10 if p_uncond else LABELS)
    assert bool(out.dropped.all()) == bool(p_uncond)


def test_u_is_uniform_and_the_low_discrepancy_one_even():
    keys = jax.random.split(jax.random.key(0), 400)
    even = jax.vmap(lambda key: losses.sample_u(key, 16, low_discrepancy=True))(keys)
    plain = jax.vmap(lambda key: losses.sample_u(key, 16, low_discrepancy=False))(keys)
    np.testing.assert_array_equal(np.sort(np.int32(even * 16), axis=1), np.tile(np.arange(16), (400, 1)))
    for u in (even, plain):
        assert float(u.min()) >= 0 and float(u.max()) < 1
        # each image's own u is uniform over the batches: mean and variance of U(0, 1)
        assert abs(float(u[:, 3].mean()) - 0.5) < 4 * np.sqrt(1 / 12 / 400)
        assert abs(float(u[:, 3].var()) - 1 / 12) < 0.02
    assert np.unique(np.int32(plain[0] * 16)).size < 16


def test_the_right_answer_has_no_loss_and_zero_has_one():
    """A network that knows x outputs eps exactly; one that outputs zero has E eps² = 1."""
    right = loss_of(lambda z, logsnr, labels: diffusion.predict_eps(z, X, logsnr))
    middle = jnp.abs(right.logsnr) < 10
    assert float(jnp.where(middle, right.loss, 0).max()) < 1e-6
    zero = loss_of(lambda z, logsnr, labels: jnp.zeros_like(z))
    assert abs(float(zero.loss.mean()) - 1) < 4 * np.sqrt(2 / X.size)
    assert zero.loss.shape == zero.logsnr.shape == zero.dropped.shape == (512,)


@pytest.mark.parametrize('prediction', ['eps', 'x', 'v'])
@pytest.mark.parametrize('target', ['eps', 'x', 'v'])
def test_the_error_is_on_the_target_whatever_is_predicted(prediction, target):
    """Against the definition: turn the output into the target's quantity and square that error, in float64."""
    logsnr = np.random.default_rng(0).uniform(-6, 6, 512)
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr)))[:, None, None, None] for s in (-1, 1))
    x, eps, output = (np.float64(jax.random.normal(jax.random.key(k), X.shape)) for k in range(3))
    z = alpha * x + sigma * eps
    eps_hat = {'eps': output, 'x': (z - alpha * output) / sigma, 'v': sigma * z + alpha * output}[prediction]
    x_hat = (z - sigma * eps_hat) / alpha
    error = {'eps': eps_hat - eps, 'x': x_hat - x, 'v': alpha * (eps_hat - eps) - sigma * (x_hat - x)}[target]
    got = losses.squared_error(*map(jnp.float32, (output, z, x, eps, logsnr)), prediction=prediction, target=target)
    np.testing.assert_allclose(got, np.square(error).mean((1, 2, 3)), rtol=1e-4)


# ---------------------------------------------------------------- weights of the error, in float64


SIGMA_DATA = 0.4
OPTIONS = {'gamma': 5.0, 'sigma_data': SIGMA_DATA, 'bias': 2.0}
SLOPE = np.pi / 2 - 2 * np.arctan(np.exp(-10.0))  # a of λ = -2 log tan(a u + b), of which -dλ/du = 4 a cosh(λ / 2)


def cosine_rate(logsnr):
    return 4 * SLOPE * np.cosh(logsnr / 2)


def weight_on_x(weighting, logsnr):
    """The papers' own formulas: of |x^ - x|², of SNR = alpha² / sigma² and EDM's sigma = 1 / sqrt(SNR)."""
    snr = np.exp(np.float64(logsnr))
    sigma = 1 / np.sqrt(snr)
    return {
        'min_snr': np.minimum(snr, 5.0),
        'truncated_snr': np.maximum(snr, 1.0),
        'edm': (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2,
        'sigmoid': snr * cosine_rate(logsnr) / (1 + np.exp(logsnr - 2.0)),
    }[weighting]


@pytest.mark.parametrize('weighting', losses.WEIGHTINGS)
def test_a_weight_is_the_papers_at_every_noise(weighting):
    logsnr = np.linspace(-20, 20, 401)
    got = losses.WEIGHTINGS[weighting](jnp.float32(logsnr), rate=jnp.float32(cosine_rate(logsnr)), **OPTIONS)
    np.testing.assert_allclose(got, np.log(weight_on_x(weighting, logsnr)) - logsnr, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('weighting', losses.WEIGHTINGS)
@pytest.mark.parametrize('prediction', diffusion.PARAMETERISATIONS)
def test_the_weighted_error_is_one_number_whatever_is_predicted(prediction, weighting):
    """Outputs that stand for the same x^ have the loss w |x^ - x|², computed from the definitions in float64."""
    logsnr = np.linspace(-10, 14, 512)
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr)))[:, None, None, None] for s in (-1, 1))
    x, eps, error = (np.float64(jax.random.normal(jax.random.key(k), X.shape)) for k in range(3))
    z, x_hat = alpha * x + sigma * eps, x + error
    eps_hat = (z - alpha * x_hat) / sigma
    scale = np.sqrt(sigma**2 + alpha**2 * SIGMA_DATA**2)
    output = {
        'eps': eps_hat,
        'x': x_hat,
        'v': alpha * eps_hat - sigma * x_hat,
        'edm': (x_hat - alpha * SIGMA_DATA**2 / scale**2 * z) * scale / (sigma * SIGMA_DATA),
    }[prediction]
    arrays = map(jnp.float32, (output, z, x, eps, logsnr))
    log_weight = losses.WEIGHTINGS[weighting](jnp.float32(logsnr), rate=jnp.float32(cosine_rate(logsnr)), **OPTIONS)
    got = losses.squared_error(*arrays, prediction=prediction, sigma_data=SIGMA_DATA, log_weight=log_weight)
    expected = weight_on_x(weighting, logsnr) * np.square(error).mean((1, 2, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_edms_weight_makes_the_plain_error_of_its_output():
    arrays = [jax.random.normal(jax.random.key(k), X.shape) for k in range(4)]
    logsnr = jnp.linspace(-20.0, 20.0, len(X))
    plain, weighted = (
        losses.squared_error(*arrays, logsnr, prediction='edm', target=target, sigma_data=SIGMA_DATA, log_weight=weight)
        for target, weight in (('edm', None), ('eps', losses.edm_weighting(logsnr, **OPTIONS)))
    )
    np.testing.assert_allclose(plain, weighted, rtol=1e-5)


@pytest.mark.parametrize('weighting', losses.WEIGHTINGS)
def test_the_loss_has_the_weight_of_its_own_times(weighting):
    """The rate -dλ/du is that of the schedule; a weight depends on λ alone, so the best prediction stays the best."""
    plain, weighted = (
        loss_of(lambda z, logsnr, labels: jnp.sin(5 * z), weighting=w)
        for w in (None, partial(losses.WEIGHTINGS[weighting], **OPTIONS))
    )
    np.testing.assert_array_equal(plain.logsnr, weighted.logsnr)
    logsnr = np.float64(plain.logsnr)
    within = np.abs(logsnr) < 15  # beyond, u has too few digits to tell λ
    expected = weight_on_x(weighting, logsnr) / np.exp(logsnr)
    np.testing.assert_allclose((weighted.loss / plain.loss)[within], expected[within], rtol=2e-3)


def test_the_sigmoids_weight_is_right_at_the_starts_of_a_students_steps():
    """Progressive distillation draws u = i / N alone, so that u = 1/2 is one of few."""
    u = jnp.arange(1, 9) / 8
    logsnr = np.float64(schedules.cosine_logsnr(u))[:-1]
    got = losses.log_weight(partial(losses.sigmoid_weighting, **OPTIONS), schedules.cosine_logsnr, u)[:-1]
    np.testing.assert_allclose(got, np.log(weight_on_x('sigmoid', logsnr)) - logsnr, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('weighting', losses.WEIGHTINGS)
@pytest.mark.parametrize('prediction', diffusion.PARAMETERISATIONS)
def test_a_weighted_loss_is_finite_at_both_ends_and_so_is_its_gradient(prediction, weighting):
    x, eps = X[:4], jax.random.normal(jax.random.key(2), X[:4].shape)
    schedule = partial(schedules.normal_logsnr, mean=0.0, std=1.2)
    for ends in (schedules.cosine_logsnr, schedule):
        u = jnp.array([0.0, 2.0**-24, 1.0 - 2.0**-24, 1.0])
        logsnr = ends(u)
        rate = losses._rate(ends, u)
        z = diffusion.q_sample(x, eps, logsnr)

        def loss(output, logsnr=logsnr, rate=rate, z=z):
            log_weight = losses.WEIGHTINGS[weighting](logsnr, rate=rate, **OPTIONS)
            error = losses.squared_error(output, z, x, eps, logsnr, prediction=prediction, log_weight=log_weight)
            return error.sum()

        value, gradient = jax.value_and_grad(loss)(jnp.zeros_like(x))
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


# ---------------------------------------------------------------- guidance-free training, where the answer is known


@pytest.fixture
def float64():
    jax.config.update('jax_enable_x64', True)
    yield
    jax.config.update('jax_enable_x64', False)


class Classes:
    """Two classes of one dimension, N(-0.6, 0.5²) and N(0.9, 0.5²), as likely; everything by quadrature in float64."""

    means, deviation = np.array([-0.6, 0.9]), 0.5

    def __init__(self, logsnr):
        self.alpha, self.sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr))) for s in (-1, 1))
        self.variance = self.alpha**2 * self.deviation**2 + self.sigma**2
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        self.eps, x = (nodes[index].ravel() for index in np.indices((80, 80)))
        self.probability = np.outer(weights, weights).ravel() / weights.sum() ** 2
        self.z = self.alpha * (self.means[:, None] + self.deviation * x) + self.sigma * self.eps  # [2, nodes]

    def conditional(self, label):
        return self.sigma * (self.z[label] - self.alpha * self.means[label]) / self.variance

    def unconditional(self, label):
        """The mixture's exact eps at z of this class: the mean over p(c | z), not affine in z."""
        distance = self.z[label] - self.alpha * self.means[:, None]
        share = np.exp(-0.5 * distance**2 / self.variance)
        return (share * self.sigma * distance / self.variance).sum(0) / share.sum(0)

    def guided(self, label, weight):
        return (1 + weight) * self.conditional(label) - weight * self.unconditional(label)

    def loss(self, output, label, weight):
        """The expected loss of a network whose output at the nodes of this class is `output`."""
        guided = losses.guidance_free_output(output, jnp.asarray(self.unconditional(label)), weight)
        return jnp.sum(self.probability * jnp.square(guided - self.eps))


CASES = [(-2.0, 0, 0.5), (0.0, 1, 1.0), (1.5, 0, 4.0)]


@pytest.mark.parametrize(('logsnr', 'label', 'weight'), CASES)
def test_gft_is_least_at_the_guided_prediction(float64, logsnr, label, weight):
    """At (1 + w) eps_c - w eps_null the expected loss has no slope in the direction of any function of z.

    Elsewhere it has: at the conditional eps, towards the guided one.
    """
    classes = Classes(logsnr)
    z, guided = classes.z[label], jnp.asarray(classes.guided(label, weight))
    for direction in (np.ones_like(z), z, z**3, np.sin(3 * z), np.exp(-(z**2)), classes.unconditional(label)):
        slope, curvature = (
            derivative(lambda t, d=direction: classes.loss(guided + t * d, label, weight))(0.0)
            for derivative in (jax.grad, jax.hessian)
        )
        assert abs(slope) < 1e-9 and curvature > 1e-4
    plain = jnp.asarray(classes.conditional(label))
    assert jax.grad(lambda t: classes.loss(plain + t * (guided - plain), label, weight))(0.0) < -1e-4


@pytest.mark.parametrize(('logsnr', 'label', 'weight'), CASES)
def test_gft_of_an_affine_network_finds_the_nearest_one_to_the_guided_prediction(float64, logsnr, label, weight):
    """The loss is quadratic in a and b of a z + b: one Newton step from anywhere ends at the least squares fit.

    The guided prediction is not affine, so the fit, weighted by p(z | c), is the exact answer.
    """
    classes = Classes(logsnr)
    basis = np.stack([classes.z[label], np.ones_like(classes.eps)], axis=1)

    def loss(coefficients):
        return classes.loss(basis @ coefficients, label, weight)

    start = jnp.array([0.3, -2.0])
    found = start - jnp.linalg.solve(jax.hessian(loss)(start), jax.grad(loss)(start))
    root = np.sqrt(classes.probability)
    wanted = np.linalg.lstsq(basis * root[:, None], classes.guided(label, weight) * root, rcond=None)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_gft_of_the_guided_model_is_the_conditional_one_and_dropped_labels_are_plain():
    """The weights, too: 1 / (1 + w) is uniform from 1/5 to 1, and w is 0 for null labels."""
    labels = jnp.arange(4000) % 4  # 3 is the null label
    x = mixture._mixture.sample(jax.random.key(0), 4000)
    logsnr = jnp.linspace(-6.0, 6.0, 4000)
    z, seen = diffusion.q_sample(x, jax.random.normal(jax.random.key(1), x.shape), logsnr), []
    exact = lambda z, logsnr, labels: mixture.model(z, logsnr, labels).eps  # noqa: E731

    def guided(z, logsnr, labels, weight):
        seen.append(weight)
        null = exact(z, logsnr, jnp.full_like(labels, mixture.NULL))
        return (1 + weight[:, None]) * exact(z, logsnr, labels) - weight[:, None] * null

    network = losses.guidance_free(guided, guided, jax.random.key(2), null_label=mixture.NULL, weight_max=4.0)
    np.testing.assert_allclose(network(z, logsnr, labels), exact(z, logsnr, labels), atol=1e-4)
    null_weight, weight = map(np.asarray, seen)
    assert not null_weight.any() and not weight[labels == mixture.NULL].any()
    beta = 1 / (1 + weight[labels != mixture.NULL])
    assert beta.min() >= 0.2 - 1e-6 and stats.kstest(beta, stats.uniform(0.2, 0.8).cdf).pvalue > 0.01


def test_gft_has_no_gradient_through_the_null_label():
    z, logsnr, labels = X[:8, 0, 0], jnp.zeros(8), jnp.arange(8) % 3

    def output(scale, frozen_scale):
        parts = (lambda z, *_, s=s: s * z for s in (scale, frozen_scale))
        return losses.guidance_free(*parts, jax.random.key(0), null_label=3, weight_max=4.0)(z, logsnr, labels).sum()

    gradients = jax.grad(output, argnums=(0, 1))(1.0, 1.0)
    assert gradients[0] != 0.0 and gradients[1] == 0.0


# ---------------------------------------------------------------- the bound in continuous time, where it is known


def test_the_bound_of_a_gaussian_is_its_density_times_the_bin():
    """x ~ N(m, s²) rounded to 8 bits, and its exact denoiser: -log2(N(x; m, s²) 2/255) where z still blurs the values.

    Above that this denoiser, which knows of no bins, pays for what z tells. The integral of one image has a closed form
    too: with y = s² e^λ, E|eps - eps^|² is (y² + y (x-m)²/s²) / (1+y)², and its integral over λ is
    log(1+y) + (1 - (x-m)²/s²) / (1+y).
    """
    m, s = 0.1, 0.2
    x = np.random.default_rng(0).normal(m, s, (400, 4, 4, 1)).clip(-0.9, 0.9)
    x = diffusion.to_unit_range(diffusion.to_uint8(x))

    def denoise(z, logsnr):
        alpha, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_images(logsnr, z))
        return Prediction(sigma * (z - alpha * m) / (alpha**2 * s**2 + sigma**2))

    keys, deviation = samplers.image_keys(0, jnp.arange(400)), np.square(np.float64(x) - m) / s**2
    expected = (0.5 * deviation + 0.5 * np.log(2 * np.pi * s**2) - np.log(2 / 255)).mean((1, 2, 3)) / np.log(2)
    for logsnr_max in (9.0, 13.3):
        got = jax.jit(lambda x, top: losses.continuous_bound(denoise, x, keys, logsnr_max=top))(x, logsnr_max)
        y = s**2 * np.exp([-20.0, logsnr_max])[:, None, None, None, None]
        integral = np.diff(np.log1p(y) + (1 - deviation) / (1 + y), axis=0)[0]
        exact_parts = {'diffusion': 0.5 * integral.mean((1, 2, 3)) / np.log(2)}
        for name, exact in (exact_parts | ({'total': expected} if logsnr_max < 10 else {})).items():
            error = np.float64(got[name]) - exact
            assert abs(error.mean()) < 4 * error.std() / np.sqrt(400) < 0.1, (name, logsnr_max, error.mean())
        np.testing.assert_array_less(got['prior'], 1e-8)
        parts = got['prior'] + got['reconstruction'] + got['diffusion']
        np.testing.assert_allclose(got['total'], parts, rtol=1e-6)


@pytest.mark.parametrize('weights', [{0: 0.5, 100: 0.2, 101: 0.05, 255: 0.25}, dict.fromkeys(range(256), 1 / 256)])
def test_the_bound_of_a_categorical_is_its_entropy(weights):
    """Each pixel one of few values, and the exact denoiser: -log2 p(x) of each image; 8 if all values are as likely."""
    values, weights = np.array(list(weights), np.uint8), np.array(list(weights.values()))
    x = np.random.default_rng(0).choice(values, (200, 4, 4, 1), p=weights)
    of_values = jnp.array(diffusion.to_unit_range(values))

    def denoise(z, logsnr):
        alpha, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_images(logsnr, z)[..., None])
        logits = jnp.log(weights) - 0.5 * jnp.square((z[..., None] - alpha * of_values) / sigma)
        x = jnp.sum(jax.nn.softmax(logits) * of_values, axis=-1)
        return Prediction(diffusion.predict_eps(z, x, logsnr))

    keys = samplers.image_keys(1, jnp.arange(200))
    images = jnp.array(diffusion.to_unit_range(x))
    got = jax.jit(lambda x: losses.continuous_bound(denoise, x, keys, logsnr_max=16.0))(images)
    exact = -np.log2(weights[np.searchsorted(values, x)]).mean((1, 2, 3))
    error = np.float64(got['total']) - exact
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(200) < 0.2, error.mean()
    np.testing.assert_allclose(exact.mean(), -(weights * np.log2(weights)).sum(), atol=0.1)
    np.testing.assert_array_less(got['reconstruction'], 1e-3)


def test_an_image_has_the_same_bound_in_any_batch_and_few_lambdas_are_right_on_average():
    x = diffusion.to_unit_range(np.random.default_rng(0).integers(0, 256, (300, 2, 2, 1), dtype=np.uint8))
    keys = samplers.image_keys(2, jnp.arange(300))

    @partial(jax.jit, static_argnums=2)
    def bound(x, keys, number):
        # a wrong denoiser: eps^ = 0, of which E|eps - eps^|² is 1 and the integral the range of λ
        zero = lambda z, logsnr: Prediction(jnp.zeros_like(z))  # noqa: E731
        return losses.continuous_bound(zero, x, keys, num_evaluations=number, clip_x=False)

    few, alone = bound(x, keys, 5), bound(x[7:8], keys[7:8], 5)
    for name, value in alone.items():
        np.testing.assert_allclose(value, few[name][7:8], rtol=1e-5)
    error = np.float64(few['diffusion']) - 0.5 * 33.3 / np.log(2)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(300)


@pytest.mark.parametrize('logsnr', [-20.0, 0.0, 9.0, 13.3, 20.0])
def test_how_surely_z_tells_a_value_against_float64(logsnr):
    values = np.arange(256) / 127.5 - 1
    x, eps = values[[0, 1, 128, 255]], np.array([0.7, -2.5, 1.0, 2.0])
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr))) for s in (-1, 1))
    logs = -0.5 * np.square((alpha * x + sigma * eps)[:, None] - alpha * values) / sigma**2
    exact = logs[np.arange(4), [0, 1, 128, 255]] - np.logaddexp.reduce(logs, axis=1)
    got = losses.value_log_likelihood(jnp.float32(x)[:, None], jnp.float32(eps)[:, None], logsnr)
    np.testing.assert_allclose(got[:, 0], exact, rtol=2e-3, atol=1e-6)
