import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import build, build_sampling, diffusion, losses, samplers
from cfg_jax.diffusion import Prediction
from cfg_jax.errors import UserError
from cfg_jax.evaluation import likelihood
from tests import tiny


class Images:
    """Nine images, whose label is their bound."""

    def __len__(self):
        return 9

    def batch(self, indices):
        return {'image': np.zeros((len(indices), 2, 2, 1), np.uint8), 'label': np.arange(9)[indices]}


def bound(images, labels, indices, seed):
    assert len(images) <= 9  # a batch is never larger than what is asked for
    labels = np.float32(labels)
    return {'total': labels, 'prior': 0 * labels, 'diffusion': labels / 4, 'reconstruction': labels * 3 / 4}


@pytest.mark.parametrize('batch_size', [2, 4, 9, 100])
def test_means_and_the_standard_error(batch_size):
    got, totals = likelihood.bits_per_dim(bound, Images(), num_images=20, batch_size=batch_size, seed=0)
    np.testing.assert_array_equal(totals, np.arange(9))
    assert got.pop('standard_error') == pytest.approx(np.std(np.arange(9), ddof=1) / 3)
    assert got == {'total': 4.0, 'prior': 0.0, 'diffusion': 1.0, 'reconstruction': 3.0, 'num_images': 9}


def test_one_image_has_no_standard_error():
    means, _ = likelihood.bits_per_dim(bound, Images(), num_images=1, batch_size=100, seed=0)
    assert means['standard_error'] is None


def test_a_bound_that_is_no_number_is_an_error_that_names_the_image():
    def broken(*arguments):
        parts = bound(*arguments)
        return parts | {'total': np.where(parts['total'] == 5, np.nan, parts['total'])}

    with pytest.raises(UserError, match='image 5 is nan, not a finite number'):
        likelihood.bits_per_dim(broken, Images(), num_images=9, batch_size=4, seed=0)


def test_a_bound_above_8_is_explained_and_one_below_is_not():
    result = {'total': 9.0, 'prior': 0.0, 'diffusion': 8.9, 'reconstruction': 0.1}
    assert 'equally likely' in likelihood.explanation(result, discrete=False)
    assert 'most of it is the diffusion part' in likelihood.explanation(result, discrete=False)
    assert 'config.sample.num_steps' in likelihood.explanation(result, discrete=True)
    assert not likelihood.explanation(result | {'total': 8.0}, discrete=True)


def test_a_model_on_a_table_keeps_the_bound_over_its_timesteps(monkeypatch):
    def model(z, logsnr, labels):
        return Prediction(0.9 * z + labels[:, None, None, None], jax.nn.sigmoid(z))

    monkeypatch.setattr(build, 'model', lambda config, params: model)
    config = tiny.config(diffusion__schedule='adm_linear', sample__spacing='10')
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    labels, indices, logsnrs = jnp.arange(3), jnp.arange(3), build_sampling.sampling_logsnrs(config)[::-1]
    got = build_sampling.bits_per_dim(config)(None, images, labels, indices, 0)
    assert build_sampling.bound_range(config) == (10, float(logsnrs[-1]), float(logsnrs[0]))
    x, keys = diffusion.to_unit_range(images), samplers.image_keys(0, indices)
    exact = losses.bits_per_dim_terms(lambda z, logsnr: model(z, logsnr, labels), x, keys, logsnrs=logsnrs)
    np.testing.assert_allclose(got['total'], exact['total'], rtol=1e-3)
    np.testing.assert_allclose(got['reconstruction'], exact['terms'][:, 0], rtol=1e-3)
    np.testing.assert_allclose(got['prior'] + got['diffusion'] + got['reconstruction'], got['total'], rtol=1e-4)


def test_one_timestep_is_too_few():
    with pytest.raises(UserError, match='at least 2 timesteps'):
        build_sampling.bound_range(tiny.config(diffusion__schedule='adm_linear', sample__num_steps=1))


@pytest.mark.parametrize('weight', [0.0, 2.0])
def test_the_bound_of_a_guided_model_is_that_of_its_denoiser(monkeypatch, weight):
    def model(z, logsnr, labels):
        return Prediction(0.9 * z + 0.01 * labels[:, None, None, None])

    monkeypatch.setattr(build_sampling.build, 'model', lambda config, params: model)
    config = tiny.config(eval__bound_evaluations=6)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    labels, indices = jnp.array([1, 2, 9]), np.arange(3, dtype=np.uint32)
    got = build_sampling.bits_per_dim(config, weight)(None, images, labels, indices, 0)

    def guided(z, logsnr):  # the null label is 10
        return Prediction((1 + weight) * model(z, logsnr, labels).eps - weight * model(z, logsnr, 0 * labels + 10).eps)

    x, keys = diffusion.to_unit_range(images), samplers.image_keys(0, indices)
    exact = losses.continuous_bound(guided, x, keys, logsnr_min=-20.0, logsnr_max=13.3, num_evaluations=6)
    np.testing.assert_allclose(got['total'], exact['total'], rtol=1e-4)


def test_guidance_with_a_memory_has_no_bound():
    config = tiny.config(guidance__rule='apg', guidance__momentum=-0.5)
    build_sampling.bits_per_dim(config)
    with pytest.raises(UserError, match=r'with a momentum or a weak checkpoint .*config\.eval\.bound_weights'):
        build_sampling.bits_per_dim(config, 1.0)


def test_the_bound_reads_values_where_the_network_was_trained():
    config = tiny.config(diffusion__logsnr_max=10.0, diffusion__logsnr_min=-15.0, eval__bound_evaluations=7)
    assert build_sampling.bound_range(config) == (7, -15.0, 10.0)
    assert build_sampling.bound_range(tiny.config()) == (100, -20.0, 13.3)
