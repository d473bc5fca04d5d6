"""Learned variances, discrete timesteps and both of ADM's algorithms, against what OpenAI's program computes.

Tolerances are a few times what is reached, which stands beside them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import convert, diffusion, guidance, losses, samplers, schedules
from cfg_jax.diffusion import Prediction
from cfg_jax.models.classifier import NoisyClassifier
from cfg_jax.models.unet import UNet
from tests import mixture
from tests.convert_test import DATA, WIDE

LINEAR, COSINE = schedules.linear_beta_logsnr(), schedules.iddpm_cosine_logsnr()


def nhwc(images):
    return np.moveaxis(images, -3, -1)


EXPECTED = {name: nhwc(array) if array.ndim > 3 else array for name, array in np.load(DATA / 'diffusion.npz').items()}
SCALE = float(EXPECTED['classifier_scale'])
X, NOISE, X_T = (EXPECTED[f'hybrid_{name}'] for name in ('x', 'noise', 'x_t'))
T, Y = (np.int32(EXPECTED[f'hybrid_{name}']) for name in ('t', 'y'))
LOGSNR_T = np.float32(LINEAR)[T]


def assert_close(ours, name, error):
    np.testing.assert_allclose(ours, EXPECTED[name], rtol=error, atol=error, err_msg=name)


# ---------------------------------------------------------------- the networks, told λ


@functools.cache
def params():
    unet, classifier = UNet(**WIDE, num_labels=10, out_channels=6), NoisyClassifier(**WIDE, num_classes=10)
    state = {name: convert.load_openai_state_dict(DATA / f'{name}.pt') for name in ('unet_new_order', 'classifier')}
    return (
        convert.openai_unet_params(state['unet_new_order'], unet, 16, new_attention_order=True),
        convert.openai_classifier_params(state['classifier'], classifier, 16),
    )


def network(params, table):
    module = UNet(**{**WIDE, 'time_input': schedules.table_time_input(table)}, num_labels=10, out_channels=6)
    return functools.partial(module.apply, {'params': params[0]})


def log_prob(params, table):
    module = NoisyClassifier(**{**WIDE, 'time_input': schedules.table_time_input(table)}, num_classes=10)

    def of_labels(z, logsnr, labels):
        logits = module.apply({'params': params[1]}, z, logsnr)
        return jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]

    return of_labels


def denoiser(params, table, labels):
    def denoise(z, logsnr):
        return Prediction(*diffusion.split_variance(network(params, table)(z, logsnr, labels)))

    return denoise


def guided(params, table, labels):
    """ADM's Algorithm 2, which clips x before it guides, and not after."""

    def clipped(z, logsnr):
        return diffusion.clip_prediction(denoiser(params, table, labels)(z, logsnr), z, logsnr)

    return guidance.classifier(clipped, log_prob(params, table), labels, SCALE)


@functools.cache
def outputs():
    """At X_T: the network's output, the guided prediction, and the classifier's gradient."""

    @jax.jit
    def at(params, z, logsnr):
        gradient = guidance.classifier_mean_shift(log_prob(params, LINEAR), Y, SCALE)(z, logsnr, 1.0)
        return network(params, LINEAR)(z, logsnr, Y), guided(params, LINEAR, Y)(z, logsnr), gradient

    return at(params(), X_T, LOGSNR_T)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize('table', [LINEAR, COSINE])
def test_the_table_gives_its_timesteps(table):
    time_input, timesteps = jax.jit(schedules.table_time_input(table)), np.arange(1000)
    np.testing.assert_array_equal(time_input(np.float32(table)), timesteps)
    between = timesteps[:-1] + 0.4
    logsnr = np.interp(between, timesteps, table)
    np.testing.assert_allclose(time_input(np.float32(logsnr)), between, atol=1e-3)
    np.testing.assert_array_equal(time_input(np.float32([50.0, -50.0])), [0, 999])


def test_a_tables_functions_are_equal_and_hash():
    for make in (schedules.table_time_input, schedules.table_logsnr):
        assert make(LINEAR) == make(LINEAR) and hash(make(LINEAR)) == hash(make(LINEAR))
        assert make(LINEAR) != make(COSINE)
        for wrong in (LINEAR[::-1], LINEAR[:1], np.array([1.0, -np.inf])):
            with pytest.raises(ValueError, match='must be finite and decrease'):
                make(wrong)
        with pytest.raises((ValueError, TypeError)):  # a TypeError if shapes are checked
            make(LINEAR[None])
    assert schedules.table_time_input(LINEAR) != schedules.table_logsnr(LINEAR)
    assert hash(UNet(**{**WIDE, 'time_input': schedules.table_time_input(LINEAR)})) is not None


def test_uniform_timesteps():
    logsnr = jax.jit(schedules.table_logsnr(LINEAR))
    np.testing.assert_array_equal(logsnr((np.arange(1000) + 0.5) / 1000), np.float32(LINEAR))
    last = np.nextafter(np.float32(1), np.float32(0))
    np.testing.assert_array_equal(logsnr(np.float32([0.0, last, 1.0])), np.float32(LINEAR)[[0, -1, -1]])


def test_spaced_grids_increase_to_the_data():
    grid = schedules.spaced_grid(LINEAR, 'ddim25')
    assert grid.dtype == jnp.float32 and bool(jnp.all(jnp.diff(grid) > 0))
    np.testing.assert_array_equal(schedules.table_time_input(LINEAR)(grid), np.arange(960, -1, -40))


# ---------------------------------------------------------------- one step: OpenAI's numbers


def test_hybrid_loss_is_the_references():
    z = diffusion.q_sample(X, NOISE, LOGSNR_T)
    assert_close(z, 'hybrid_x_t', 1e-6)
    mse, bound = jax.jit(functools.partial(losses.hybrid_terms, logsnrs=LINEAR))(outputs()[0], z, X, NOISE, T)
    for ours, name in ((mse, 'mse'), (bound, 'vb'), (mse + bound, 'loss')):  # reached: 7e-7, 9e-6, 7e-7
        np.testing.assert_allclose(ours, EXPECTED[f'hybrid_{name}'], rtol=3e-5, err_msg=name)


def test_reverse_step_is_the_references():
    prediction = Prediction(*diffusion.split_variance(outputs()[0]))
    x, mean, log_variance = diffusion.table_reverse(prediction, X_T, T, logsnrs=LINEAR, clip_x=True)
    assert_close(x, 'p_pred_xstart', 2e-4)  # 5e-5, at t = 999, where 1/alpha is 158
    assert_close(mean, 'p_mean', 3e-6)
    assert_close(log_variance, 'p_log_variance', 1e-5)
    np.testing.assert_allclose(jnp.exp(log_variance), EXPECTED['p_variance'], rtol=5e-5)
    mean, variance = diffusion.q_posterior(X, X_T, *diffusion.table_step(LINEAR, T))
    assert_close(mean, 'posterior_mean', 3e-6)
    np.testing.assert_allclose(np.ravel(variance), EXPECTED['posterior_variance'], rtol=5e-5)


def test_both_algorithms_single_steps_are_the_references():
    output, prediction, gradient = outputs()
    unguided = Prediction(*diffusion.split_variance(output))
    _, mean, log_variance = diffusion.table_reverse(unguided, X_T, T, logsnrs=LINEAR, clip_x=True)
    assert_close(mean + jnp.exp(log_variance) * gradient, 'condition_mean', 3e-6)
    x, mean, _ = diffusion.table_reverse(prediction, X_T, T, logsnrs=LINEAR, clip_x=False)
    assert_close(x, 'condition_score_pred_xstart', 2e-4)
    assert_close(mean, 'condition_score_mean', 3e-6)
    assert np.abs(EXPECTED['condition_mean'] - EXPECTED['p_mean']).max() > 1e-4  # the gradient is seen


# ---------------------------------------------------------------- 25 steps: OpenAI's images


LABELS = np.int32(EXPECTED['loop_y'])
# conftest.py's unoptimised code takes 15 s for 25 gradients in a loop; this takes 0.6 s.
optimised_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 1})


@pytest.mark.parametrize('name', ['ddim25', 'ddim25_classifier'])
def test_ddim_is_the_references(name):
    @optimised_jit
    def sample(params, z, grid):
        if name == 'ddim25':
            return samplers.ddim(denoiser(params, LINEAR, LABELS), z, grid)
        return samplers.ddim(guided(params, LINEAR, LABELS), z, grid, clip_x=False)

    images = sample(params(), EXPECTED['loop_noise'], schedules.spaced_grid(LINEAR, 'ddim25'))
    assert_close(images, name, 1e-4)  # 1.2e-5, 1.8e-5


@pytest.mark.parametrize('name', ['ancestral25', 'ancestral25_classifier'])
def test_ancestral_is_the_references(name, monkeypatch):
    noise = jnp.asarray(EXPECTED[f'{name}_step_noise'])
    monkeypatch.setattr(samplers, 'step_noise', lambda keys, step, shape: noise[step - 1])

    @optimised_jit
    def sample(params, z, grid):
        shift = (
            guidance.classifier_mean_shift(log_prob(params, COSINE), LABELS, SCALE)
            if name == 'ancestral25_classifier'
            else None
        )
        keys = samplers.image_keys(0, jnp.arange(len(z)))  # their noise is replaced by the reference's
        return samplers.ancestral(denoiser(params, COSINE, LABELS), z, grid, keys, mean_shift=shift)

    images = sample(params(), EXPECTED['loop_noise'], schedules.spaced_grid(COSINE, '25'))
    assert_close(images, name, 3e-5)  # 3e-6, 5e-6


# ---------------------------------------------------------------- properties


def test_algorithms_1_and_2_meet_as_steps_grow():
    """Same start, same noise: the images of the two differ by O(1/T) on the mixture, where the classifier is exact."""
    keys, labels, weight = samplers.image_keys(0, jnp.arange(200)), jnp.arange(200) % 3, 2.0

    def unconditional(z, logsnr):
        return mixture.model(z, logsnr, jnp.full(len(z), mixture.NULL))

    @functools.partial(jax.jit, static_argnames='num_steps')
    def both(num_steps):
        z = samplers.step_noise(keys, 0, (2,))
        grid = schedules.logsnr_grid(schedules.cosine_logsnr, num_steps)
        shift = guidance.classifier_mean_shift(mixture.log_posterior, labels, weight)
        score = guidance.classifier(unconditional, mixture.log_posterior, labels, weight)
        first = samplers.ancestral(unconditional, z, grid, keys, v=1.0, clip_x=False, mean_shift=shift)
        return first, samplers.ancestral(score, z, grid, keys, v=1.0, clip_x=False)

    errors = []
    for num_steps in (32, 128, 512):
        first, second = both(num_steps)
        errors.append(float(jnp.sqrt(jnp.mean(jnp.square(first - second)))))
    assert errors[2] < errors[1] / 2 < errors[0] / 4, errors
    assert errors[2] < 0.02, errors


def tiny_case():
    """8-bit images, and a network of eps and variance that is no constant: (network, x)."""
    x = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 2)) / 127.5 - 1
    x[0, 0, 0] = [-1, 1]

    def net(scale, z, logsnr, labels):
        return jnp.concatenate([scale * 0.9 * z, jnp.cos(3 * scale * z)], axis=-1)

    return net, np.float32(x)


def test_bits_per_dim_against_float64_in_betas():
    """The same bound, written with DDPM's β_t and ᾱ_t, in numpy."""
    net, x = tiny_case()
    table, keys = schedules.linear_beta_logsnr(25), samplers.image_keys(0, jnp.arange(3))

    def denoise(z, logsnr):
        return Prediction(*diffusion.split_variance(net(1.0, z, logsnr, None)))

    got = jax.jit(lambda x: losses.bits_per_dim_terms(denoise, x, keys, logsnrs=table))(x)
    beta = schedules.linear_betas(25)
    bar = np.cumprod(1 - beta)
    before = np.append(1.0, bar[:-1])
    low = beta * (1 - before) / (1 - bar)
    low[0] = low[1]
    terms = np.zeros((3, 25))
    for t in range(25):
        eps = np.float64(jax.vmap(lambda key, t=t: jax.random.normal(jax.random.fold_in(key, t), (4, 4, 2)))(keys))
        z = np.sqrt(bar[t]) * x + np.sqrt(1 - bar[t]) * eps
        v = (np.cos(3 * z) + 1) / 2
        x_hat = np.clip((z - np.sqrt(1 - bar[t]) * 0.9 * z) / np.sqrt(bar[t]), -1, 1)
        log_variance = v * np.log(beta[t]) + (1 - v) * np.log(low[t])
        square = (np.sqrt(before[t]) * beta[t] / (1 - bar[t]) * (x - x_hat)) ** 2
        nats = 0.5 * (log_variance - np.log(low[t]) - 1 + (low[t] + square) / np.exp(log_variance))
        if t == 0:
            lower, upper = ((x - x_hat + side / 255) / np.exp(log_variance / 2) for side in (-1, 1))
            lower, upper = (0.5 + 0.5 * np.tanh(math.sqrt(2 / np.pi) * (a + 0.044715 * a**3)) for a in (lower, upper))
            mass = np.where(x > 0.999, 1, upper) - np.where(x < -0.999, 0, lower)
            nats = -np.log(np.maximum(mass, 1e-12))
        terms[:, t] = nats.mean((1, 2, 3)) / np.log(2)
        np.testing.assert_allclose(got['x_mse'][:, t], np.square(x_hat - x).mean((1, 2, 3)), rtol=1e-4)
    prior = 0.5 * (bar[-1] * np.float64(x) ** 2 - bar[-1] - np.log1p(-bar[-1])).mean((1, 2, 3)) / np.log(2)
    np.testing.assert_allclose(got['terms'], terms, rtol=1e-4)
    np.testing.assert_allclose(got['prior'], prior, rtol=1e-4)
    np.testing.assert_allclose(got['total'], prior + terms.sum(1), rtol=1e-4)


def test_who_knows_x_pays_for_the_last_step_alone():
    """The exact denoiser: no KL with the posterior's variance, and N(x, variance)'s mass on x's own bin."""
    _, x = tiny_case()
    table, keys = schedules.linear_beta_logsnr(1000)[::100], samplers.image_keys(0, jnp.arange(3))

    def denoise(z, logsnr):
        return Prediction(diffusion.predict_eps(z, x, logsnr))

    got = losses.bits_per_dim_terms(denoise, x, keys, logsnrs=table, v=0.0)
    np.testing.assert_allclose(got['terms'][:, 1:], 0, atol=1e-6)
    std = float(np.sqrt((1 - np.exp(table[1] - table[0])) / (1 + np.exp(table[0]))))
    inner, outer = (math.erf(1 / 255 / std / math.sqrt(2)), 0.5 + 0.5 * math.erf(1 / 255 / std / math.sqrt(2)))
    expected = -np.log2(np.where(np.abs(x) > 0.999, outer, inner)).mean((1, 2, 3))
    np.testing.assert_allclose(got['terms'][:, 0], expected, rtol=5e-3)  # the cdf is an approximation, good to 3e-4


@pytest.mark.parametrize('log_variance', [-12.0, -8.0, 0.0])
@pytest.mark.parametrize('mean', [-1.1, 0.003, 0.9])
def test_the_bins_share_out_all_the_mass(mean, log_variance):
    bins = np.float32(np.arange(256) / 127.5 - 1)
    mass = np.exp(np.float64(losses.discretized_log_likelihood(bins, np.float32(mean), np.float32(log_variance))))
    assert abs(mass.sum() - 1) < 1e-5


def test_gaussian_kl():
    a, b = (0.3, -1.0), (-0.2, 0.5)
    expected = 0.5 * (1.5 - 1 + math.exp(-1.5) + 0.25 * math.exp(-0.5))
    np.testing.assert_allclose(losses.gaussian_kl(*map(jnp.float32, (*a, *b))), expected, rtol=1e-6)


@pytest.mark.parametrize('t', [0, 1, 700, 999])
def test_the_bound_teaches_the_variance_alone(t):
    net, x = tiny_case()
    eps, t = np.float32(np.random.default_rng(1).normal(size=x.shape)), np.full(3, t)
    z = diffusion.q_sample(x, eps, np.float32(LINEAR)[t])

    def of_output(output, part):
        return losses.hybrid_terms(output, z, x, eps, t, logsnrs=LINEAR)[part].sum()

    gradient = jax.jit(jax.grad(of_output), static_argnums=1)
    mse, bound = (gradient(net(1.0, z, None, None), part) for part in (0, 1))
    assert not np.any(bound[..., :2]) and np.any(bound[..., 2:]) and np.all(np.isfinite(bound))
    assert np.any(mse[..., :2]) and not np.any(mse[..., 2:])


def test_hybrid_loss_draws_what_the_plain_loss_draws():
    """Same key, same timesteps and noise: what it adds to Algorithm 1's loss is the bound, and T/1000 weighs it."""
    net, x = tiny_case()
    labels, key = jnp.arange(3), jax.random.key(3)
    options = {'null_label': 10, 'p_uncond': 0.5, 'low_discrepancy': True}

    hybrid_network = functools.partial(net, 1.0)

    def eps_alone(z, logsnr, labels):
        return diffusion.split_variance(net(1.0, z, logsnr, labels))[0]

    hybrid = jax.jit(lambda x: losses.hybrid_loss(hybrid_network, x, labels, key, logsnrs=LINEAR, **options))
    plain = losses.diffusion_loss(eps_alone, x, labels, key, schedule=schedules.table_logsnr(LINEAR), **options)
    hybrid = hybrid(x)
    np.testing.assert_array_equal(hybrid.logsnr, plain.logsnr)
    np.testing.assert_array_equal(hybrid.dropped, plain.dropped)
    assert hybrid.loss.shape == (3,) and bool(jnp.all(hybrid.loss > plain.loss))


def test_the_bound_prefers_the_variance_that_fits():
    """The bound wants the larger variance where eps is far off, and the posterior's where it is right."""
    _, x = tiny_case()
    eps, t = np.float32(np.random.default_rng(1).normal(size=x.shape)), np.full(3, 3)
    z = diffusion.q_sample(x, eps, np.float32(LINEAR)[t])

    def bound(half, error):
        output = jnp.concatenate([eps + error, jnp.full_like(eps, half)], axis=-1)
        return float(losses.hybrid_terms(output, z, x, eps, t, logsnrs=LINEAR)[1].mean())

    assert bound(1.0, error=2.0) < bound(-1.0, error=2.0)
    assert bound(-1.0, error=0.0) < bound(1.0, error=0.0)
