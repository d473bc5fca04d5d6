from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import diffusion, guidance, losses, samplers, schedules
from cfg_jax.diffusion import Prediction
from tests import mixture
from tests.tiny import ROOT

MEAN, STD = jnp.array([0.5, -0.3]), jnp.array([0.4, 0.1])
NUM_SAMPLES = 8_000
SAMPLERS = {
    'ancestral': partial(samplers.ancestral, v=0.3, clip_x=False),
    'ddim': partial(samplers.ddim, clip_x=False),
    'ddim, eta 1': partial(samplers.ddim, eta=1.0, clip_x=False),
}
# of a higher order: their own tests are below
MORE = {
    'dpmpp_2m': partial(samplers.dpmpp_2m, clip_x=False),
    'dpmpp_2m_sde': partial(samplers.dpmpp_2m_sde, clip_x=False),
    'unipc_2': partial(samplers.unipc_2, clip_x=False),
    'heun': partial(samplers.heun, clip_x=False),
    'heun, churn': partial(samplers.heun, clip_x=False, churn=10.0, churn_interval=(-4.0, 4.0)),
}
EVERY = SAMPLERS | MORE


def gaussian(z, logsnr):
    """The exact eps where the data is N(MEAN, diag STD²)."""
    alpha, sigma = diffusion.alpha_sigma(logsnr[:, None])
    return Prediction(sigma * (z - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2))


@partial(jax.jit, static_argnames=('sampler', 'num_steps', 'denoise'))
def draw(sampler, denoise, num_steps, seed):
    keys = samplers.image_keys(seed, jnp.arange(NUM_SAMPLES))
    grid = schedules.logsnr_grid(schedules.cosine_logsnr, num_steps)
    return EVERY[sampler](denoise, samplers.step_noise(keys, 0, (2,)), grid, keys)


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


@pytest.mark.parametrize('sampler', EVERY)
def test_each_class_of_a_mixture_is_reached(sampler):
    """A solver of second order needs a quarter of the steps."""
    x = np.float64(draw(sampler, conditional, 256 if sampler in MORE else 1024, 2))
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
    for sampler in EVERY.values():
        np.testing.assert_allclose(sampler(gaussian, z, logsnr, keys), expected, rtol=1e-5)


def test_clipping_bounds_x():
    def wild(z, logsnr):
        return Prediction(-10.0 * z)

    keys = samplers.image_keys(0, jnp.arange(4))
    z, grid = samplers.step_noise(keys, 0, (2,)), schedules.logsnr_grid(schedules.cosine_logsnr, 8)
    for sampler in {each.func for each in EVERY.values()}:
        assert float(jnp.abs(sampler(wild, z, grid, keys)).max()) == 1.0
        limited = sampler(wild, z, grid, keys, clip_x=partial(diffusion.dynamic_threshold, percentile=60.0))
        assert float(jnp.abs(limited).max()) == 1.0 and float(jnp.abs(limited).min()) < 1.0


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
    with pytest.raises(ValueError, match='keys'):
        samplers.heun(gaussian, jnp.zeros((4, 2)), jnp.array([0.0, 1.0]), churn=0.5)


GRIDS = {
    'reversed': [2.0, 0.0, -2.0],
    'repeated': [-2.0, 0.0, 0.0, 2.0],
    'unsorted': [-2.0, 3.0, 0.0],
    'nan': [0.0, np.nan],
}


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('sampler', ['ancestral', 'ddim', 'dpmpp_2m', 'dpmpp_2m_sde', 'unipc_2', 'heun'])
@pytest.mark.parametrize('compiled', [False, True])
def test_a_grid_that_does_not_increase_is_refused(sampler, grid, compiled):
    keys, grid = samplers.image_keys(0, jnp.arange(4)), jnp.array(GRIDS[grid])
    hint = ', and these are in the reverse order' if grid[0] == 2 else ''
    draw = lambda z: EVERY[sampler](gaussian, z, grid, keys)  # noqa: E731
    with pytest.raises(ValueError, match=f'values of λ must be finite and increase.* need them{hint}'):
        (jax.jit(draw) if compiled else draw)(samplers.step_noise(keys, 0, (2,)))
    with pytest.raises(ValueError, match='must be finite and decrease'):
        losses.bits_per_dim_terms(gaussian, jnp.zeros((4, 2)), keys, logsnrs=-grid)


@pytest.mark.parametrize('sampler', ['ancestral', 'heun'])
def test_a_denoiser_that_returns_no_prediction_is_refused(sampler):
    keys, grid = samplers.image_keys(0, jnp.arange(4)), jnp.array([-1.0, 1.0])
    z = samplers.step_noise(keys, 0, (2,))
    for wrong, message in (
        (lambda z, logsnr: z, r'returned an array of shape \(4, 2\); it must return a cfg_jax.diffusion.Prediction'),
        (lambda z, logsnr: (z, None), 'returned tuple; it must return'),
        (lambda z, logsnr: Prediction(jnp.concatenate([z, z], -1)), r'eps of shape \(4, 4\) for z of \(4, 2\)'),
    ):
        for draw in (EVERY[sampler], jax.jit(EVERY[sampler], static_argnums=0)):
            with pytest.raises(ValueError, match=message):
                draw(wrong, z, grid, keys)
        with pytest.raises(ValueError, match=message):
            losses.continuous_bound(wrong, z, keys)
        with pytest.raises(ValueError, match=message):
            losses.bits_per_dim_terms(wrong, z, keys, logsnrs=grid[::-1])
    with pytest.raises(ValueError, match='must be finite and increase'):
        losses.continuous_bound(gaussian, z, keys, logsnr_min=13.3, logsnr_max=-20.0)


# ---------------------------------------------------------------- solvers for few steps

REFERENCE = dict(np.load(ROOT / 'tests' / 'data' / 'guiders_solvers.npz'))


def toy(z, logsnr):
    """The reference's network, on ADM's linear table."""
    t = schedules.table_time_input(schedules.linear_beta_logsnr())(logsnr)[:, None, None, None]
    return Prediction(0.6 * z + 0.3 * jnp.tanh(z) * jnp.cos(t / 300) + 0.1 * jnp.sin(t / 90))


@pytest.mark.parametrize('num_steps', [5, 20])
@pytest.mark.parametrize(
    ('sampler', 'name'),
    [('ddim', 'dpmpp_1'), ('dpmpp_2m', 'dpmpp_2m'), ('unipc_2', 'unipc_2_bh2'), ('dpmpp_2m_sde', 'dpmpp_2m_sde')],
)
@pytest.mark.parametrize('traced', [False, True])
def test_solvers_are_the_references(monkeypatch, sampler, name, num_steps, traced):
    key, keys = f'{name}_{num_steps}', samplers.image_keys(0, jnp.arange(2))
    if f'{key}_noise' in REFERENCE:
        noise = jnp.asarray(REFERENCE[f'{key}_noise'])
        monkeypatch.setattr(samplers, 'step_noise', lambda keys, step, shape: noise[step - 1])
    draw = lambda grid: EVERY[sampler](toy, REFERENCE['solver_start'], grid, keys)  # noqa: E731
    found = (jax.jit(draw) if traced else draw)(np.float32(REFERENCE[f'{key}_logsnr']))
    expected = REFERENCE[f'{key}_final_x']
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def solution(sampler, num_steps, start):
    """x of the Gaussian from `start`, over uniform λ."""
    keys = samplers.image_keys(0, jnp.arange(len(start)))
    grid = schedules.uniform_logsnr_grid(num_steps, logsnr_min=-8.0, logsnr_max=8.0)
    return np.float64(EVERY[sampler](gaussian, start, grid, keys))


def test_orders_of_the_solvers():
    """The error of DDIM falls as 1/T, of 2M and Heun as 1/T², of UniPC-2 faster: exact scores, against the exact flow.

    A Gaussian's flow keeps (z - alpha m) / sqrt(alpha² s² + sigma²) as it is.
    """
    start = samplers.step_noise(samplers.image_keys(1, jnp.arange(256)), 0, (2,))
    mean, variance = np.float64(MEAN), np.float64(STD) ** 2
    standing = []
    for logsnr in (-8.0, 8.0):
        alpha2 = 1.0 / (1.0 + np.exp(-logsnr))
        standing.append((np.sqrt(alpha2), np.sqrt(alpha2 * variance + 1.0 - alpha2)))
    (alpha_0, deviation_0), (alpha_1, deviation_1) = standing
    z = alpha_1 * mean + deviation_1 * (np.float64(start) - alpha_0 * mean) / deviation_0
    eps = np.sqrt(1.0 - alpha_1**2) * (z - alpha_1 * mean) / deviation_1**2
    exact = (z - np.sqrt(1.0 - alpha_1**2) * eps) / alpha_1
    slopes = {}
    for sampler in ('ddim', 'dpmpp_2m', 'unipc_2', 'heun'):
        errors = [np.sqrt(np.mean((solution(sampler, steps + 1, start) - exact) ** 2)) for steps in (16, 32, 64)]
        slopes[sampler] = np.polyfit(np.log([16, 32, 64]), np.log(errors), 1)[0]
    assert -1.3 < slopes['ddim'] < -0.8, slopes
    assert -2.5 < slopes['dpmpp_2m'] < -1.7 and -2.5 < slopes['heun'] < -1.7, slopes
    assert slopes['unipc_2'] < -2.0, slopes


def test_karras_grid_is_edms():
    """Eq. 5 of EDM, with its defaults: sigma_i = (80^(1/7) + i / (N - 1) (0.002^(1/7) - 80^(1/7)))^7."""
    i = np.arange(18)
    sigmas = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(schedules.karras_grid(18), -2 * np.log(sigmas), rtol=1e-5)
    for wrong in ({'sigma_min': 0.0}, {'sigma_min': 90.0}, {'rho': 0.0}):
        with pytest.raises(ValueError, match='sigma_min'):
            schedules.karras_grid(18, **wrong)
    np.testing.assert_allclose(schedules.uniform_logsnr_grid(3, logsnr_min=-4.0, logsnr_max=8.0), [-4.0, 2.0, 8.0])


def test_churn_adds_the_noise_that_it_says():
    """A network that predicts x = 0 leaves z = sigma eps: with churn the last call's z has the last λ's deviation."""
    keys = samplers.image_keys(0, jnp.arange(4000))
    z, grid, seen = samplers.step_noise(keys, 0, (2,)), np.linspace(-4.0, 4.0, 5, dtype=np.float32), []

    def denoise(z, logsnr):
        jax.debug.callback(lambda z, logsnr: seen.append((np.asarray(z), float(logsnr[0]))), z, logsnr, ordered=True)
        return Prediction(diffusion.predict_eps(z, jnp.zeros_like(z), logsnr))

    samplers.heun(denoise, z, grid, keys, churn=2.0, churn_interval=(-1.0, 3.0)).block_until_ready()
    jax.effects_barrier()
    calls = np.array([logsnr for _, logsnr in seen])
    raised = 2 * np.log1p(2.0 / 5)
    np.testing.assert_allclose(calls, [-4, -2, -2, 0, 0 - raised, 2, 2 - raised, 4, 4], atol=1e-5)
    for z, logsnr in seen[1:]:
        deviation = np.sqrt(1.0 / (1.0 + np.exp(logsnr)))
        assert abs(z.std() / deviation - 1.0) < 0.05


@pytest.mark.parametrize('sampler', ['ddim', 'dpmpp_2m'])
def test_a_denoiser_may_name_the_noise_that_is_added_back(sampler):
    """CFG++: a step from z = alpha x + sigma renoise_eps, at every call; the same as DDIM's own formula there."""
    keys, grid = samplers.image_keys(0, jnp.arange(8)), np.array([-2.0, -1.0, 1.0, 2.0], np.float32)
    z, seen = samplers.step_noise(keys, 0, (2,)), []

    def denoise(z, logsnr):
        seen.append(z)
        return Prediction(0.2 * z, renoise_eps=0.1 * z)

    with jax.disable_jit():
        EVERY[sampler](denoise, z, grid, keys)
    x_before = h_before = None
    for before, after, logsnr_t, logsnr_s in zip(seen, seen[1:], grid, grid[1:]):
        x = diffusion.predict_x(before, 0.2 * before, logsnr_t)
        moved = diffusion.q_sample(x, 0.1 * before, logsnr_t)
        (_, sigma_t), (alpha, sigma) = diffusion.alpha_sigma(logsnr_t), diffusion.alpha_sigma(logsnr_s)
        if sampler == 'ddim':
            np.testing.assert_allclose(after, alpha * x + sigma * 0.1 * before, rtol=1e-4, atol=1e-5)
        elif sampler == 'dpmpp_2m':
            h = 0.5 * (logsnr_s - logsnr_t)
            middle = x if x_before is None else x + 0.5 * h / h_before * (x - x_before)
            np.testing.assert_allclose(
                after, sigma / sigma_t * moved - alpha * np.expm1(-h) * middle, rtol=1e-4, atol=1e-4
            )
            x_before, h_before = x, h


@pytest.mark.parametrize('sampler', ['heun', 'unipc_2'])
def test_solvers_that_step_from_an_earlier_z_refuse_another_noise(sampler):
    z = jnp.ones((8, 2))
    with pytest.raises(ValueError, match=r'cannot renoise with another eps \(CFG\+\+\)'):
        EVERY[sampler](lambda z, logsnr: Prediction(z, renoise_eps=z), z, jnp.array([-1.0, 1.0]))


@pytest.mark.parametrize('sampler', ['dpmpp_2m', 'unipc_2'])
def test_a_long_last_step_is_taken_with_order_one(sampler):
    """On the default grid the last step is ten times as long as the one before: there x is not extrapolated."""
    start = samplers.step_noise(samplers.image_keys(1, jnp.arange(256)), 0, (2,))

    def error(name, grid, **options):
        keys = samplers.image_keys(0, jnp.arange(256))
        solve = lambda name, grid, **options: np.float64(EVERY[name](gaussian, start, grid, keys, **options))  # noqa: E731
        exact = solve('ddim', schedules.logsnr_grid(schedules.cosine_logsnr, 1024))
        return np.sqrt(np.mean((solve(name, grid, **options) - exact) ** 2))

    for steps in (16, 32):
        grid = schedules.logsnr_grid(schedules.cosine_logsnr, steps)
        first_order, lowered = error('ddim', grid), error(sampler, grid, lower_order_final=True)
        assert lowered < 0.7 * first_order < 2.0 * error(sampler, grid), (steps, first_order, lowered)
