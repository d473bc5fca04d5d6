import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import diffusion

X = jax.random.normal(jax.random.key(0), (64, 4, 4, 3))
EPS = jax.random.normal(jax.random.key(1), X.shape)


def worst(a, b):
    return float(jnp.max(jnp.abs(a - b)))


def test_alpha_sigma():
    logsnr = jnp.array([-20.0, -1.0, 0.0, 3.0, 20.0])
    alpha, sigma = diffusion.alpha_sigma(logsnr)
    exact = np.exp(np.float64(logsnr))
    np.testing.assert_allclose(alpha, np.sqrt(exact / (1 + exact)), rtol=1e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 / (1 + exact)), rtol=1e-6)
    np.testing.assert_allclose(diffusion.log_alpha2(logsnr), -np.log1p(1 / exact), rtol=1e-6)
    np.testing.assert_allclose(diffusion.log_sigma2(logsnr), -np.log1p(exact), rtol=1e-6)


@pytest.mark.parametrize('array', [np.asarray, jnp.asarray])
def test_8_bit_images_survive_the_round_trip(array):
    images = array(np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1))
    x = diffusion.to_unit_range(images)
    assert type(x) is type(images) and x.dtype == np.float32
    assert float(x.min()) == -1 and float(x.max()) == 1
    back = diffusion.to_uint8(x)
    assert type(back) is type(images) and back.dtype == np.uint8
    np.testing.assert_array_equal(back, images)
    np.testing.assert_array_equal(diffusion.to_uint8(array(np.float32([-7.0, 0.001, 1.1]))), [0, 128, 255])


def test_clipping_keeps_what_is_not_finite():
    clipped = diffusion.clip_to_range(jnp.float32([-1e38, -0.5, 1.5, jnp.inf, -jnp.inf, jnp.nan]))
    np.testing.assert_array_equal(clipped, np.float32([-1, -0.5, 1, np.nan, np.nan, np.nan]))


# The error of a round trip is float32's 6e-8, times what it divides by: 1/alpha is 2.2e4 at λ = -20, 1/sigma at λ = 20.
@pytest.mark.parametrize(
    ('logsnr', 'x_error', 'eps_error'), [(-20.0, 2e-2, 1e-6), (0.0, 2e-6, 2e-6), (20.0, 1e-6, 2e-2)]
)
def test_round_trips(logsnr, x_error, eps_error):
    logsnr = jnp.full(len(X), logsnr)
    z = diffusion.q_sample(X, EPS, logsnr)
    assert worst(diffusion.predict_x(z, EPS, logsnr), X) <= x_error
    assert worst(diffusion.predict_eps(z, X, logsnr), EPS) <= eps_error
    v = diffusion.velocity(X, EPS, logsnr)
    # v and z are a rotation of x and eps: nothing is divided, no digits are lost at either end
    assert worst(diffusion.network_eps(v, z, logsnr, 'v'), EPS) <= 2e-6
    alpha, sigma = diffusion.alpha_sigma(logsnr[:, None, None, None])
    assert worst(alpha * z - sigma * v, X) <= 2e-6
    assert worst(diffusion.network_eps(X, z, logsnr, 'x'), EPS) <= eps_error
    assert worst(diffusion.network_eps(EPS, z, logsnr, 'eps'), EPS) == 0


@pytest.mark.parametrize('logsnr', [-20.0, -3.0, 0.0, 4.0, 20.0])
@pytest.mark.parametrize('sigma_data', [0.2, 0.5, 3.0])
def test_edms_output_and_back(logsnr, sigma_data):
    logsnr = jnp.full(len(X), logsnr)
    z = diffusion.q_sample(X, EPS, logsnr)
    output = diffusion.edm_output(X, EPS, logsnr, sigma_data)
    assert worst(diffusion.network_eps(output, z, logsnr, 'edm', sigma_data), EPS) <= 5e-6


def test_edms_output_is_the_papers():
    """In EDM's units, y = z / alpha = x + sigma eps: D = c_skip y + c_out F(c_in y), of table 1, in float64."""
    logsnr, sigma_data = np.linspace(-12, 12, len(X)), 0.4
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr)))[:, None, None, None] for s in (-1, 1))
    output, z, sigma = np.float64(X), np.float64(EPS), sigma / alpha
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    c_in = 1 / np.sqrt(sigma**2 + sigma_data**2)
    x = c_skip * z / alpha + c_out * output
    eps = (z - alpha * x) / (alpha * sigma)
    got = diffusion.network_eps(X, EPS, jnp.float32(logsnr), 'edm', sigma_data)
    np.testing.assert_allclose(got, eps, rtol=1e-4, atol=1e-5)
    got = diffusion.network_input(EPS, jnp.float32(logsnr), 'edm', sigma_data)
    np.testing.assert_allclose(got, c_in * z / alpha, rtol=1e-5)


def test_edms_output_is_minus_v_where_the_data_have_deviation_1():
    logsnr = jnp.linspace(-20.0, 20.0, len(X))
    z, v = diffusion.q_sample(X, EPS, logsnr), diffusion.velocity(X, EPS, logsnr)
    assert worst(diffusion.edm_output(X, EPS, logsnr, 1.0), -v) <= 2e-6
    assert worst(diffusion.edm_eps(-v, z, logsnr, 1.0), diffusion.network_eps(v, z, logsnr, 'v')) <= 2e-6
    assert worst(diffusion.network_input(z, logsnr, 'edm', 1.0), z) <= 2e-6
    for prediction in ('eps', 'x', 'v'):
        assert diffusion.network_input(z, logsnr, prediction, 0.5) is z


def test_edms_network_sees_and_gives_values_of_deviation_1():
    x = 0.3 * jax.random.normal(jax.random.key(2), (9, 100, 100, 1))
    eps = jax.random.normal(jax.random.key(3), x.shape)
    logsnr = jnp.linspace(-20.0, 20.0, 9)
    seen = diffusion.network_input(diffusion.q_sample(x, eps, logsnr), logsnr, 'edm', 0.3)
    np.testing.assert_allclose(jnp.std(seen, axis=(1, 2, 3)), 1.0, atol=0.03)
    np.testing.assert_allclose(jnp.std(diffusion.edm_output(x, eps, logsnr, 0.3), axis=(1, 2, 3)), 1.0, atol=0.03)


def test_unknown_prediction():
    with pytest.raises(ValueError, match="'eps', 'x', 'v', 'edm'"):
        diffusion.network_eps(EPS, X, 0.0, 'score')


@pytest.mark.parametrize(('logsnr_t', 'logsnr_s'), [(-20.0, -19.0), (-1.0, 2.0), (15.0, 20.0)])
def test_one_transition_after_another_is_the_forward_process(logsnr_t, logsnr_s):
    """q(z_s | x), then q(z_t | z_s), gives the mean and the variance of q(z_t | x)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = diffusion.alpha_sigma(logsnr_t), diffusion.alpha_sigma(logsnr_s)
    scale, variance = diffusion.q_transition(logsnr_t, logsnr_s)
    np.testing.assert_allclose(scale * alpha_s, alpha_t, rtol=1e-6)
    np.testing.assert_allclose(scale**2 * sigma_s**2 + variance, sigma_t**2, rtol=1e-6)


def test_one_minus_ratio_does_not_cancel():
    np.testing.assert_allclose(
        diffusion.one_minus_ratio(0.0, jnp.array([1e-6, 3.0])), [1e-6, 1 - np.exp(-3)], rtol=1e-6
    )


def test_the_score_is_the_gradient_of_the_log_density():
    """Of q(z | x), whose eps is known."""
    logsnr = jnp.linspace(-5.0, 5.0, len(X))
    z = diffusion.q_sample(X, EPS, logsnr)
    alpha, sigma = diffusion.alpha_sigma(logsnr[:, None, None, None])
    gradient = jax.grad(lambda z: jnp.sum(-jnp.square(z - alpha * X) / (2 * sigma**2)))(z)
    np.testing.assert_allclose(diffusion.score(EPS, logsnr), gradient, rtol=2e-4, atol=1e-4)


def test_posterior_is_bayes_rule():
    """q(z_s | z_t, x) from q(z_s | x) and q(z_t | z_s), in float64."""
    for logsnr_t, logsnr_s in [(-20.0, -19.0), (-1.0, 2.0), (15.0, 20.0)]:
        exact = [np.sqrt(1 / (1 + np.exp(sign * value))) for value in (logsnr_t, logsnr_s) for sign in (-1, 1)]
        alpha_t, sigma_t, alpha_s, sigma_s = exact
        alpha_ts = alpha_t / alpha_s
        variance_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
        precision = 1 / sigma_s**2 + alpha_ts**2 / variance_ts
        expected = (np.float64(X) * alpha_s / sigma_s**2 + np.float64(EPS) * alpha_ts / variance_ts) / precision
        mean, variance = diffusion.q_posterior(X, EPS, logsnr_t, logsnr_s)
        np.testing.assert_allclose(diffusion.q_transition(logsnr_t, logsnr_s), [alpha_ts, variance_ts], rtol=1e-5)
        np.testing.assert_allclose(mean, expected, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(variance, 1 / precision, rtol=2e-5)


def test_reverse_variance_interpolates_in_the_logarithm():
    logsnr_t, logsnr_s = -1.0, 0.5
    _, posterior = diffusion.q_posterior(X, EPS, logsnr_t, logsnr_s)
    _, upper = diffusion.q_transition(logsnr_t, logsnr_s)
    np.testing.assert_allclose(diffusion.reverse_variance(logsnr_t, logsnr_s, 0.0), posterior, rtol=1e-6)
    np.testing.assert_allclose(diffusion.reverse_variance(logsnr_t, logsnr_s, 1.0), upper, rtol=1e-6)
    between = diffusion.reverse_variance(logsnr_t, logsnr_s, jnp.array([0.3, 0.5]))
    np.testing.assert_allclose(between, posterior ** np.array([0.7, 0.5]) * upper ** np.array([0.3, 0.5]), rtol=1e-6)


def test_logsnr_may_be_one_per_image_or_one_for_all():
    z_each, z_all = diffusion.q_sample(X, EPS, jnp.full(len(X), 0.7)), diffusion.q_sample(X, EPS, 0.7)
    np.testing.assert_array_equal(z_each, z_all)
    _, variance = diffusion.q_posterior(X, EPS, jnp.full(len(X), -1.0), jnp.full(len(X), 1.0))
    assert variance.shape == (len(X), 1, 1, 1)


def test_uniform_timesteps_stay_below_their_number():
    u = np.float32([0.0, 0.25, 0.9989, np.nextafter(np.float32(1), np.float32(0)), 1.0])
    t = diffusion.uniform_timestep(u, 1000)
    assert t.dtype == jnp.int32
    np.testing.assert_array_equal(t, [0, 250, 998, 999, 999])
