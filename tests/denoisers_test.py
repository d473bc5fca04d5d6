import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import denoisers, samplers
from cfg_jax.denoisers import Stateful, Switched
from cfg_jax.diffusion import Prediction

Z = jax.random.normal(jax.random.key(0), (6, 3))
GRID = np.linspace(-5.0, 5.0, 11, dtype=np.float32)


def plain(z, logsnr):
    return Prediction(0.5 * z)


def counting(factor):
    """A denoiser whose eps grows with the number of its calls."""
    return Stateful(lambda z: jnp.zeros(()), lambda z, logsnr, n: (Prediction(factor * (n + 1.0) * z), n + 1.0))


def test_a_state_goes_from_step_to_step():
    seen = []

    def step(z, logsnr, number):
        jax.debug.callback(lambda number: seen.append(int(number)), number, ordered=True)
        return Prediction(z), number + 1

    samplers.ddim(Stateful(lambda z: jnp.int32(0), step), Z, GRID, clip_x=False).block_until_ready()
    jax.effects_barrier()
    assert seen == list(range(11))


def test_a_call_without_a_sampler_is_the_first_step():
    np.testing.assert_allclose(counting(0.1)(Z, jnp.zeros(6)).eps, 0.1 * Z)


@pytest.mark.parametrize('sampler', [samplers.ddim, samplers.heun, samplers.dpmpp_2m])
def test_a_switch_is_the_same_split_or_selected(sampler):
    """With known λ only one side is computed; the states of both sides wait while the other is in use."""
    switched = Switched(counting(0.01), counting(0.02), -1.0, 2.0)
    split = sampler(switched, Z, GRID, clip_x=False)
    selected = jax.jit(lambda grid: sampler(switched, Z, grid, clip_x=False))(GRID)
    np.testing.assert_allclose(split, selected, rtol=1e-5)


def test_a_switch_selects_for_each_image():
    switched = Switched(lambda z, logsnr: Prediction(z), lambda z, logsnr: Prediction(-z), -1.0, 2.0)
    logsnr = jnp.array([-5.0, -1.0, 0.0, 2.0, 3.0, 9.0])
    signs = jnp.array([-1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    np.testing.assert_array_equal(switched(Z, logsnr).eps, signs[:, None] * Z)


def test_a_switch_takes_what_only_one_side_predicts():
    inside = lambda z, logsnr: Prediction(z, renoise_eps=3.0 * z)  # noqa: E731
    found = Switched(inside, plain, -1.0, 1.0)(Z, jnp.array([0.0, 5.0] * 3))
    np.testing.assert_allclose(found.renoise_eps[::2], 3.0 * Z[::2])
    np.testing.assert_allclose(found.renoise_eps[1::2], 0.5 * Z[1::2])


def test_parts_of_a_grid():
    switched = Switched(plain, plain, -1.0, 2.0)
    assert [(part.start, part.stop) for part, _ in denoisers.parts(switched, GRID)[1]] == [(0, 4), (4, 8), (8, 11)]
    assert [part.stop for part, _ in denoisers.parts(plain, GRID)[1]] == [11]
    ends = Switched(plain, plain, -5.0, 5.0 - 5e-4)  # given in fewer digits than the grid has
    assert len(denoisers.parts(ends, GRID)[1]) == 1


def test_mapped_keeps_state_and_switch():
    double = lambda prediction, z, logsnr: prediction._replace(eps=2.0 * prediction.eps)  # noqa: E731
    for denoise in (plain, counting(0.1), Switched(counting(0.01), plain, -1.0, 2.0)):
        mapped = denoisers.mapped(denoise, double)
        assert type(mapped) is type(denoise)
        np.testing.assert_allclose(mapped(Z, jnp.zeros(6)).eps, 2.0 * denoise(Z, jnp.zeros(6)).eps, rtol=1e-6)
    with pytest.raises(ValueError, match='must return a cfg_jax'):
        denoisers.mapped(lambda z, logsnr: z, double)(Z, jnp.zeros(6))
