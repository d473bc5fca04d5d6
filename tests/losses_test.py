import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import diffusion, losses, schedules

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
