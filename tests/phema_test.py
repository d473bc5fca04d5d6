"""Post-hoc EMA: its equations, and averages of trajectories that are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import phema
from cfg_jax.errors import UserError
from cfg_jax.training import optim


def test_lengths_of_the_paper():
    assert phema.gamma(0.05) == pytest.approx(16.97, abs=0.005) and phema.gamma(0.1) == pytest.approx(6.94, abs=0.005)
    assert phema.gamma(phema.LONGEST) == pytest.approx(0.0, abs=1e-9)
    for gamma in (0.0, 0.5, 3.0, 6.94, 16.97, 100.0, 3000.0):
        assert phema.gamma(phema.sigma_rel(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize('gamma', [0.0, 2.5, 16.97])
def test_sigma_rel_is_the_deviation_of_the_profile(gamma):
    tau = (np.arange(200_000) + 0.5) / 200_000
    profile = (gamma + 1.0) * tau**gamma
    mean = np.mean(profile * tau)
    assert phema.sigma_rel(gamma) == pytest.approx(np.sqrt(np.mean(profile * tau**2) - mean**2), rel=1e-6)


def test_inner_products_are_integrals():
    gammas, times = np.array([1.0, 6.94, 16.97]), np.array([40.0, 100.0, 70.0])
    tau = (np.arange(100_000) + 0.5) / 1000.0
    profiles = [np.where(tau < t, (g + 1.0) * tau**g / t ** (g + 1.0), 0.0) for g, t in zip(gammas, times)]
    integrals = np.array([[np.sum(a * b) / 1000.0 for b in profiles] for a in profiles])
    np.testing.assert_allclose(phema.inner_products(gammas, times, gammas, times), integrals, rtol=1e-5)


def test_the_running_average_is_that_of_the_profile():
    """In float32, of many steps; what it starts from does not count."""
    values = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    steps = jnp.arange(1, 2001)
    for length in (0.05, 0.1, 0.2):
        gamma = float(phema.gamma(length))

        def moved(average, of_step, gamma=gamma):
            average = optim.power_ema(average, of_step[0], gamma, of_step[1])
            return average, average

        averages = jax.lax.scan(moved, jnp.float32(1e3), (values, steps))[1]
        for step in (1, 30, 2000):
            direct = phema.weights_of_steps(length, step) @ values[:step]
            np.testing.assert_allclose(averages[step - 1], direct, rtol=1e-4, atol=1e-4 if step == 1 else 2e-6)


def trajectories(num_steps):
    """Parameters over the steps, [num_steps, 3], each from -1 to 1: a ramp, a random walk, an approach with noise."""
    rng, steps = np.random.default_rng(1), np.arange(1.0, num_steps + 1.0)
    walk = np.cumsum(rng.standard_normal(num_steps))
    approach = np.exp(-steps / num_steps * 5.0) + 0.1 * rng.standard_normal(num_steps)
    return np.stack([each / np.abs(each).max() for each in (steps, walk, approach)], axis=1)


LENGTHS, EVERY, NUM_STEPS = (0.05, 0.1), 25, 5000
TRAJECTORIES = trajectories(NUM_STEPS)


def averaged(length, step):
    return phema.weights_of_steps(length, step) @ TRAJECTORIES[:step]


@functools.cache
def snapshots():
    return {step: [averaged(length, step) for length in LENGTHS] for step in range(EVERY, NUM_STEPS + 1, EVERY)}


def made(lengths, step):
    """The averages of these lengths from the snapshots, [lengths, trajectories], by one fit for all of them."""
    steps = range(EVERY, step + 1, EVERY)
    weights, _ = phema.fit(LENGTHS, steps, lengths, step)
    np.testing.assert_allclose(weights.sum((1, 2)), 1.0, rtol=1e-9)
    return np.einsum('ksl,slt->kt', weights, np.array([snapshots()[each] for each in steps]))


@pytest.mark.parametrize('step', [1000, 2500, 5000])
def test_snapshots_give_the_average_of_another_length(step):
    lengths = (0.02, 0.03, 0.05, 0.08, 0.1, 0.14, 0.2, *([0.25] if step > 1000 else []))
    direct = [averaged(length, step) for length in lengths]
    np.testing.assert_allclose(made(lengths, step), direct, atol=1e-3)


def test_a_kept_length_is_the_snapshot_itself():
    np.testing.assert_allclose(made(LENGTHS, 1000), snapshots()[1000], atol=1e-9)


def test_the_fit_is_the_least_squares_of_the_profiles():
    """Sampled finely, with the weights' sum as one more equation that the fit nearly fulfils by itself."""
    tau = (np.arange(200_000) + 0.5) / 2000.0
    steps = [20, 40, 60, 80, 100]

    def profile(length, step):
        gamma = phema.gamma(length)
        return np.where(tau < step, (gamma + 1.0) * tau**gamma / float(step) ** (gamma + 1.0), 0.0)

    basis = np.stack([profile(length, step) for step in steps for length in LENGTHS], axis=1)
    for length in (0.07, 0.13):
        (weights,), (error,) = phema.fit(LENGTHS, steps, [length], 100)
        direct = np.linalg.lstsq(basis, profile(length, 100))[0]
        np.testing.assert_allclose(weights.ravel(), direct / direct.sum(), atol=1e-3)
        difference = basis @ weights.ravel() - profile(length, 100)
        assert error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(profile(length, 100)), rel=1e-2)


@pytest.mark.parametrize('length', [-0.1, 0.0, 1e-160, 5e-324, 0.0009, 0.005, 0.28, 0.3, 1.0, float('nan')])
def test_lengths_that_snapshots_cannot_give(length):
    message = rf'an EMA of length {length:g} cannot be made of the 40 snapshots up to step 1000; usable lengths '
    with pytest.raises(UserError, match=rf'^{message}\(sigma_rel\) are from 0\.011 to 0\.2\d\d \(ema, config\.eval'):
        phema.snapshot_weights(LENGTHS, range(EVERY, 1001, EVERY), length, 1000)


def test_one_snapshot_gives_little():
    weights = phema.snapshot_weights(LENGTHS, [100], 0.07, 100)
    assert weights.shape == (1, 2) and weights.min() > 0.0
    with pytest.raises(UserError, match=r'the 1 snapshots up to step 100; usable lengths .* are from 0\.0'):
        phema.snapshot_weights(LENGTHS, [100], 0.02, 100)
