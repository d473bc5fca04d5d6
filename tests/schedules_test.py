from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cfg_jax import diffusion, schedules
from cfg_jax.errors import UserError

REFERENCE = np.load(Path(__file__).parent / 'data' / 'schedules.npz')


def paper_logsnr(u, logsnr_min=-20.0, logsnr_max=20.0):
    """Section 2 of the paper, word for word, in float64."""
    b = np.arctan(np.exp(-logsnr_max / 2))
    a = np.arctan(np.exp(-logsnr_min / 2)) - b
    return -2 * np.log(np.tan(a * np.float64(u) + b))


def test_cosine_is_the_papers_formula():
    u = np.float32(np.linspace(0, 1, 1001))
    # λ moves by 2a/(sin cos) · δu = 7e4 δu at the ends: the error that u's own rounding makes is what is allowed there.
    np.testing.assert_allclose(schedules.cosine_logsnr(u)[20:-20], paper_logsnr(u)[20:-20], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(schedules.cosine_logsnr(u), paper_logsnr(u), atol=5e-3)
    np.testing.assert_allclose(schedules.cosine_logsnr(jnp.array([0.0, 0.5, 1.0])), [20, 0, -20], atol=1e-5)


def test_other_ends():
    values = schedules.cosine_logsnr(jnp.array([0.0, 0.3, 1.0]), logsnr_min=-8.0, logsnr_max=12.0)
    np.testing.assert_allclose(values, paper_logsnr([0.0, 0.3, 1.0], -8.0, 12.0), rtol=1e-5)


@pytest.mark.parametrize(('logsnr', 'error'), [(-20.0, 5e-3), (-5.0, 1e-4), (0.0, 2e-6), (5.0, 1e-5), (20.0, 1e-5)])
def test_u_round_trip(logsnr, error):
    """λ -> u -> λ in float32. At λ = -20, u is within 1e-9 of 1, where float32 has steps of 6e-8 and λ of 4e-3."""
    assert abs(float(schedules.cosine_logsnr(schedules.cosine_u(logsnr))) - logsnr) <= error


@pytest.mark.parametrize(('mean', 'std'), [(-1.2, 1.2), (0.0, 1.0), (-0.4, 1.0)])
def test_normal_times_have_the_normals_quantiles(mean, std):
    """EDM, table 1: log sigma ~ N(mean, std²), sigma = e^{-λ/2}; u = 0 is the end of the data."""
    u = np.linspace(0.001, 0.999, 999)
    logsnr = schedules.normal_logsnr(np.float32(u), mean=mean, std=std)
    np.testing.assert_allclose(-logsnr / 2, stats.norm(mean, std).ppf(u), rtol=1e-4, atol=1e-4)
    for u in (0.0, 1.0):
        value, slope = jax.value_and_grad(lambda u: schedules.normal_logsnr(u, mean=mean, std=std))(u)
        assert jnp.isfinite(value) and jnp.isfinite(slope) and (value > 8) == (u == 0.0)


def test_normal_times_stay_within_the_schedules_range():
    draw = lambda u: schedules.normal_logsnr(u, mean=-1.2, std=1.2, logsnr_min=-1.0, logsnr_max=4.0)  # noqa: E731
    logsnr = np.asarray(draw(jnp.linspace(0.0, 1.0, 10_001)))
    assert logsnr.min() == -1 and logsnr.max() == 4
    for end, beyond in ((-1.0, stats.norm.cdf(-3.4 / 2.4)), (4.0, stats.norm.sf(1.6 / 2.4))):
        np.testing.assert_allclose((logsnr == end).mean(), beyond, atol=2e-4)
    assert jax.grad(draw)(0.0) == 0.0


def test_logit_normal_times_are_esser_and_others():
    """t = sigma / (alpha + sigma) of z = (1 - t) x + t eps, scaled: logit t ~ N(0, 1)."""
    logsnr = schedules.normal_logsnr(jnp.linspace(0.01, 0.99, 99), mean=0.0, std=1.0)
    alpha, sigma = (np.float64(value) for value in diffusion.alpha_sigma(logsnr))
    t = sigma / (alpha + sigma)
    np.testing.assert_allclose(np.log(t / (1 - t)), stats.norm.ppf(np.linspace(0.01, 0.99, 99)), atol=1e-4)


def test_u_round_trip_the_other_way():
    u = jnp.linspace(0.0, 1.0, 257)
    np.testing.assert_allclose(schedules.cosine_u(schedules.cosine_logsnr(u)), u, atol=2e-7)


def test_gradient_is_finite_everywhere():
    gradient = jax.vmap(jax.grad(schedules.cosine_logsnr))(jnp.linspace(0.0, 1.0, 33))
    assert bool(jnp.all(gradient < 0)) and bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize('ends', [(-20.0, 20.0), (-8.0, 12.0)])
def test_the_gradient_is_the_papers_in_the_middle_too(ends):
    """dλ/du = -4a / (2 sin cos) = -4a / sin(2 (a u + b)); u = 1/2, where the two formulas meet, is a step's start."""
    b, end = np.arctan(np.exp(-ends[1] / 2)), np.arctan(np.exp(-ends[0] / 2))
    u = np.array([0.25, 0.4999, 0.5, 0.5001, 0.75])
    schedule = partial(schedules.cosine_logsnr, logsnr_min=ends[0], logsnr_max=ends[1])
    expected = -4 * (end - b) / np.sin(2 * ((end - b) * u + b))
    np.testing.assert_allclose(jax.vmap(jax.grad(schedule))(jnp.float32(u)), expected, rtol=1e-5)
    rate = jax.jvp(schedule, (jnp.float32(u),), (jnp.ones(5),))[1]
    np.testing.assert_allclose(rate, expected, rtol=1e-5)


def test_each_half_of_the_cosine_is_its_own_formula_to_the_bit():
    """A fine grid, and all float32 within 1000 steps of u = 1/2."""
    b = end = np.arctan(np.exp(-10.0))
    slope, near = 0.5 * np.pi - b - end, np.float32(2**-25) * np.arange(-1000, 1000, dtype=np.float32)
    u = np.concatenate([np.linspace(0, 1, 100_001, dtype=np.float32), np.float32(0.5) + near])
    near_data = -2.0 * jnp.log(jnp.tan(slope * jnp.minimum(u, 0.5) + b))
    near_noise = 2.0 * jnp.log(jnp.tan(slope * jnp.minimum(1.0 - u, 0.5) + end))
    np.testing.assert_array_equal(schedules.cosine_logsnr(u), jnp.where(u < 0.5, near_data, near_noise))


GRIDS = (
    partial(schedules.logsnr_grid, schedules.cosine_logsnr),
    partial(schedules.open_logsnr_grid, schedules.cosine_logsnr),
    schedules.uniform_logsnr_grid,
    schedules.karras_grid,
)


@pytest.mark.parametrize('grid_of', GRIDS)
def test_grid_increases_from_noise_to_data(grid_of):
    grid = grid_of(64)
    assert grid.shape == (64,) and bool(jnp.all(jnp.diff(grid) > 0))
    with pytest.raises(UserError, match=r'num_steps is 0; it must be at least 1 \(config\.sample\.num_steps\)'):
        grid_of(0)


def test_the_grid_of_u_has_both_ends():
    grid = schedules.logsnr_grid(schedules.cosine_logsnr, 64)
    np.testing.assert_allclose(grid[jnp.array([0, -1])], [-20, 20], atol=1e-5)


def test_time_input():
    np.testing.assert_allclose(
        schedules.continuous_time_input(jnp.array([-20.0, 0.0, 20.0])), [999.971, 500.0, 0.028903], rtol=1e-4
    )


@pytest.mark.parametrize('name', ['linear', 'cosine'])
def test_discrete_tables_are_the_references(name):
    betas = {'linear': schedules.linear_betas, 'cosine': schedules.iddpm_cosine_betas}[name]()
    logsnr = {'linear': schedules.linear_beta_logsnr, 'cosine': schedules.iddpm_cosine_logsnr}[name]()
    np.testing.assert_allclose(betas, REFERENCE[f'betas_{name}_1000'], rtol=0, atol=1e-12)
    np.testing.assert_allclose(1 / (1 + np.exp(-logsnr)), REFERENCE[f'alphas_cumprod_{name}_1000'], rtol=0, atol=1e-10)
    assert np.all(np.diff(logsnr) < 0)


@pytest.mark.parametrize('spacing', ['250', 'ddim25', '10,15,20', '1000'])
def test_spacings_are_the_references(spacing):
    assert schedules.spaced_timesteps(1000, spacing) == REFERENCE[f'timesteps_{spacing.replace(",", "_")}'].tolist()


@pytest.mark.parametrize('spacing', ['0', '1001', 'ddim999', 'ddimx', '10,-1', 'many', ''])
def test_wrong_spacings(spacing):
    with pytest.raises(UserError, match='spacing'):
        schedules.spaced_timesteps(1000, spacing)
