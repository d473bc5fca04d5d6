from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import diffusion, guidance, losses, samplers, schedules
from cfg_jax.diffusion import Prediction
from tests import mixture

MEAN, STD = jnp.array([0.5, -0.3]), jnp.array([0.4, 0.1])
NUM_SAMPLES = 8_000
SAMPLERS = {
    'ancestral': partial(samplers.ancestral, v=0.3, clip_x=False),
    'ddim': partial(samplers.ddim, clip_x=False),
    'ddim, eta 1': partial(samplers.ddim, eta=1.0, clip_x=False),
}


def gaussian(z, logsnr):
    """The exact eps where the data is N(MEAN, diag STD²)."""
    alpha, sigma = diffusion.alpha_sigma(logsnr[:, None])
    return Prediction(sigma * (z - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2))


@partial(jax.jit, static_argnames=('sampler', 'num_steps', 'denoise'))
def draw(sampler, denoise, num_steps, seed):
    keys = samplers.image_keys(seed, jnp.arange(NUM_SAMPLES))
    grid = schedules.logsnr_grid(schedules.cosine_logsnr, num_steps)
    return SAMPLERS[sampler](denoise, samplers.step_noise(keys, 0, (2,)), grid, keys)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_gaussian_is_reached_as_steps_grow(sampler):
    """The standard deviation's bias falls as 1/T; at T = 2048, mean and covariance are right to 4 standard errors."""
    samples = {num_steps: np.float64(draw(sampler, gaussian, num_steps, 1)) for num_steps in (8, 64, 2048)}
    errors = [np.abs(x.std(0) / STD - 1).max() for x in samples.values()]
    assert errors[2] < errors[1] / 2 < errors[0] / 4
    x, root_n = samples[2048], np.sqrt(NUM_SAMPLES)
    np.testing.assert_array_less(np.abs(x.mean(0) - MEAN), 4 * STD / root_n)
    np.testing.assert_allclose(x.std(0), STD, rtol=4 / np.sqrt(2) / root_n)
    assert abs(np.corrcoef(x.T)[0, 1]) < 4 / root_n


def test_ddim_with_eta_one_is_ancestral_sampling_with_the_posteriors_variance():
    keys = samplers.image_keys(0, jnp.arange(64))
    z, grid = samplers.step_noise(keys, 0, (2,)), schedules.logsnr_grid(schedules.cosine_logsnr, 16)
    x = samplers.ddim(gaussian, z, grid, keys, eta=1.0, clip_x=False)
    np.testing.assert_allclose(x, samplers.ancestral(gaussian, z, grid, keys, v=0.0, clip_x=False), atol=2e-5)


def conditional(z, logsnr):
    return mixture.model(z, logsnr, jnp.arange(NUM_SAMPLES) % 3)


def unconditional(z, logsnr):
    return mixture.model(z, logsnr, jnp.full(NUM_SAMPLES, mixture.NULL))


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_each_class_of_a_mixture_is_reached(sampler):
    x = np.float64(draw(sampler, conditional, 1024, 2))
    for label in range(3):
        members = x[label::3]
        root_n, variance = np.sqrt(len(members)), mixture.SCALE**2
        np.testing.assert_allclose(members.mean(0), mixture.MEANS[label], atol=4 * mixture.SCALE / root_n)
        np.testing.assert_allclose(np.cov(members.T), variance * np.eye(2), atol=4 * np.sqrt(2) * variance / root_n)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_the_whole_mixture_is_reached(sampler):
    """The unconditional model's samples fall on each class in its share."""
    x = draw(sampler, unconditional, 1024, 3)
    nearest = mixture.most_likely(x)
    shares = np.bincount(nearest, minlength=3) / NUM_SAMPLES
    np.testing.assert_allclose(shares, 1 / 3, atol=4 * np.sqrt(2 / 9 / NUM_SAMPLES) + 0.005)


def test_guidance_moves_mass_away_from_the_other_classes():
    """The paper's figure 2: as w grows, a class's samples leave the other classes, and their spread falls."""
    keys = samplers.image_keys(0, jnp.arange(2000))
    labels, grid = jnp.zeros(2000, jnp.int32), schedules.logsnr_grid(schedules.cosine_logsnr, 64)
    z = samplers.step_noise(keys, 0, (2,))

    @jax.jit
    def guided(weight):
        denoise = guidance.classifier_free(mixture.model, labels, weight, null_label=mixture.NULL)
        return samplers.ancestral(denoise, z, grid, keys, clip_x=False)

    posterior = [
        float(jnp.exp(mixture.log_posterior(guided(w), jnp.full(2000, 20.0), labels)).mean()) for w in (0.0, 1.0, 3.0)
    ]
    assert posterior[0] < posterior[1] < posterior[2]
    assert float(guided(3.0).std(0).prod()) < float(guided(0.0).std(0).prod())


def test_one_step_is_the_denoisers_x():
    keys = samplers.image_keys(0, jnp.arange(4))
    z = samplers.step_noise(keys, 0, (2,))
    logsnr = jnp.array([1.0])
    expected = diffusion.predict_x(z, gaussian(z, jnp.full(4, 1.0)).eps, 1.0)
    for sampler in SAMPLERS.values():
        np.testing.assert_allclose(sampler(gaussian, z, logsnr, keys), expected, rtol=1e-5)


def test_clipping_bounds_x():
    def wild(z, logsnr):
        return Prediction(-10.0 * z)

    keys = samplers.image_keys(0, jnp.arange(4))
    z, grid = samplers.step_noise(keys, 0, (2,)), schedules.logsnr_grid(schedules.cosine_logsnr, 8)
    for sampler in (samplers.ancestral, samplers.ddim):
        assert float(jnp.abs(sampler(wild, z, grid, keys)).max()) == 1.0


def test_a_learned_v_replaces_the_constant():
    keys = samplers.image_keys(0, jnp.arange(8))
    z, grid = samplers.step_noise(keys, 0, (2,)), schedules.logsnr_grid(schedules.cosine_logsnr, 8)

    def learned(z, logsnr):
        return gaussian(z, logsnr)._replace(v=jnp.full_like(z, 0.7))

    x = samplers.ancestral(learned, z, grid, keys, v=0.0, clip_x=False)
    np.testing.assert_allclose(x, samplers.ancestral(gaussian, z, grid, keys, v=0.7, clip_x=False), rtol=1e-5)


def test_mean_shift_is_added_to_the_mean():
    """One noisy step by hand: shifting the mean by d moves z_s by d, and nothing but the mean."""
    keys = samplers.image_keys(0, jnp.arange(8))
    z, grid = samplers.step_noise(keys, 0, (2,)), jnp.array([0.0, 1.0])
    seen = {}

    def denoise(z, logsnr):
        seen[len(seen)] = z
        return Prediction(jnp.zeros_like(z))

    with jax.disable_jit():
        samplers.ancestral(denoise, z, grid, keys, clip_x=False)
        samplers.ancestral(denoise, z, grid, keys, clip_x=False, mean_shift=lambda z, logsnr, variance: 0.25 + variance)
    variance = diffusion.reverse_variance(0.0, 1.0, 0.3)
    np.testing.assert_allclose(seen[3] - seen[1], jnp.full_like(z, 0.25 + variance), rtol=1e-5)


def test_noise_depends_on_the_image_alone():
    """Bit for bit: image i's start and its noise at each step, in batches of 1, 7 and 64."""
    whole = samplers.step_noise(samplers.image_keys(5, jnp.arange(64)), 3, (8, 8, 1))
    for indices in ([9], range(7, 14)):
        part = samplers.step_noise(samplers.image_keys(5, jnp.array(list(indices))), 3, (8, 8, 1))
        np.testing.assert_array_equal(part, whole[np.array(list(indices))])
    assert not np.array_equal(whole, samplers.step_noise(samplers.image_keys(5, jnp.arange(64)), 4, (8, 8, 1)))
    assert not np.array_equal(whole, samplers.step_noise(samplers.image_keys(6, jnp.arange(64)), 3, (8, 8, 1)))


def test_ddim_with_noise_needs_keys():
    with pytest.raises(ValueError, match='keys'):
        samplers.ddim(gaussian, jnp.zeros((4, 2)), jnp.array([0.0, 1.0]), eta=0.5)


GRIDS = {
    'reversed': [2.0, 0.0, -2.0],
    'repeated': [-2.0, 0.0, 0.0, 2.0],
    'unsorted': [-2.0, 3.0, 0.0],
    'nan': [0.0, np.nan],
}


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('sampler', ['ancestral', 'ddim'])
@pytest.mark.parametrize('compiled', [False, True])
def test_a_grid_that_does_not_increase_is_refused(sampler, grid, compiled):
    keys, grid = samplers.image_keys(0, jnp.arange(4)), jnp.array(GRIDS[grid])
    hint = ', and these are in the reverse order' if grid[0] == 2 else ''
    draw = lambda z: SAMPLERS[sampler](gaussian, z, grid, keys)  # noqa: E731
    with pytest.raises(ValueError, match=f'values of λ must be finite and increase.* need them{hint}'):
        (jax.jit(draw) if compiled else draw)(samplers.step_noise(keys, 0, (2,)))
    with pytest.raises(ValueError, match='must be finite and decrease'):
        losses.bits_per_dim_terms(gaussian, jnp.zeros((4, 2)), keys, logsnrs=-grid)


@pytest.mark.parametrize('sampler', ['ancestral', 'ddim'])
def test_a_denoiser_that_returns_no_prediction_is_refused(sampler):
    keys, grid = samplers.image_keys(0, jnp.arange(4)), jnp.array([-1.0, 1.0])
    z = samplers.step_noise(keys, 0, (2,))
    for wrong, message in (
        (lambda z, logsnr: z, r'returned an array of shape \(4, 2\); it must return a cfg_jax.diffusion.Prediction'),
        (lambda z, logsnr: (z, None), 'returned tuple; it must return'),
        (lambda z, logsnr: Prediction(jnp.concatenate([z, z], -1)), r'eps of shape \(4, 4\) for z of \(4, 2\)'),
    ):
        for draw in (SAMPLERS[sampler], jax.jit(SAMPLERS[sampler], static_argnums=0)):
            with pytest.raises(ValueError, match=message):
                draw(wrong, z, grid, keys)
        with pytest.raises(ValueError, match=message):
            losses.continuous_bound(wrong, z, keys)
        with pytest.raises(ValueError, match=message):
            losses.bits_per_dim_terms(wrong, z, keys, logsnrs=grid[::-1])
    with pytest.raises(ValueError, match='must be finite and increase'):
        losses.continuous_bound(gaussian, z, keys, logsnr_min=13.3, logsnr_max=-20.0)
