import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import build, build_sampling, samplers, trained
from cfg_jax.diffusion import Prediction
from cfg_jax.errors import UserError
from cfg_jax.sampling import generate
from cfg_jax.training import sharding
from tests import tiny

IMAGES = 64
# Run with --devices, this file prints the images of `draw` on that many devices; the tests compare them.


def random_params(config):
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: np.float32(0.2 * random.standard_normal(leaf.shape)), shapes)


def draw(indices):
    """(start noise, noise of step 3, images in [-1, 1]) of these images, over all devices if these divide them."""
    config = tiny.config(sample__num_steps=16)
    mesh = sharding.make_mesh()
    fits = len(indices) % mesh.size == 0
    split = sharding.batch_sharding(mesh) if fits else sharding.replicated(mesh)
    indices = jax.device_put(np.uint32(indices), split)

    @jax.jit
    def noise(indices):
        keys = samplers.image_keys(7, indices)
        return samplers.step_noise(keys, 0, (8, 8, 1)), samplers.step_noise(keys, 3, (8, 8, 1))

    images = jax.jit(build_sampling.sampler(config))(random_params(config), 7, indices, jnp.int32(indices % 10), 2.0)
    return [np.asarray(a) for a in (*noise(indices), images)]


@pytest.fixture(scope='module')
def whole():
    return draw(range(IMAGES))


def assert_same_images(part, whole):
    np.testing.assert_array_equal(part[0], whole[0])
    np.testing.assert_array_equal(part[1], whole[1])
    np.testing.assert_allclose(part[2], whole[2], atol=1e-4)


@pytest.mark.parametrize('indices', [range(9, 10), range(20, 27)])
def test_an_image_is_the_same_in_a_batch_of_one_of_seven_and_of_64(whole, indices):
    """Its noise to the bit, the image to 1e-4, after 16 guided steps with random weights."""
    assert_same_images(draw(indices), [a[indices.start : indices.stop] for a in whole])


def test_an_image_is_the_same_on_eight_devices(whole, tmp_path):
    environment = tiny.environment(devices=8)
    subprocess.run(
        [sys.executable, '-m', 'tests.sampling_test', tmp_path / 'x.npz'], check=True, env=environment, cwd=tiny.ROOT
    )
    with np.load(tmp_path / 'x.npz') as eight:
        assert eight['devices'] == 8
        assert_same_images([eight['arr_0'], eight['arr_1'], eight['arr_2']], whole)


def test_weights_labels_and_seeds_share_one_compilation(monkeypatch):
    """And w = 0, which computes no guidance, has another."""
    traces = []
    original = build_sampling.sampler

    def counting(*arguments):
        sample = original(*arguments)
        return lambda *a: traces.append(1) or sample(*a)

    monkeypatch.setattr(build_sampling, 'sampler', counting)
    config = tiny.config()
    batches = trained.image_batches(config)
    params = random_params(config)
    for labels, weight, seed in (([1] * 30, 1.0, 0), ([2, 3] * 10, 4.0, 1), ([5], 0.5, 2)):
        images = np.concatenate(list(batches(params, np.array(labels), weight, seed)))
        assert images.shape == (len(labels), 8, 8, 1) and images.dtype == np.uint8
    assert len(traces) == 1
    for seed in (0, 1):
        next(batches(params, np.array([5]), 0.0, seed))
    assert len(traces) == 2


def test_images_are_rounded_to_the_nearest_of_256_values():
    """Cut off instead, they are half a value darker: FID of the digits changes by up to 0.1 (docs/evaluation.md)."""

    def sample(params, seed, indices, labels, weight, *helpers):
        level = 20.0 * labels[:, None, None, None] + jnp.array([-0.49, -0.3, 0.0, 0.3, 0.49])[:, None]
        return level / 127.5 - 1.0

    batches = generate.image_batches(sample, sharding.local_mesh(), batch_size=5, num_classes=12)
    images = np.concatenate(list(batches({}, np.arange(12), 0.0, 0)))
    np.testing.assert_array_equal(images, np.broadcast_to(20 * np.arange(12)[:, None, None, None], images.shape))


def overflowing(number):
    """Return a guidance whose eps of label 3 is this number in one pixel, where λ is above 0."""

    def guide(model, labels, weight, *, null_label):
        def denoise(z, logsnr):
            pixel = jnp.arange(z[0].size).reshape(z[0].shape) == 5
            here = pixel & ((labels == 3) & (logsnr > 0))[:, None, None, None]
            return Prediction(jnp.where(here, number, model(z, logsnr, labels).eps))

        return denoise

    return guide


@pytest.mark.parametrize(
    ('number', 'sampler', 'clip_x'),
    [(np.nan, 'ancestral', True), (np.inf, 'ddim', True), (-np.inf, 'ancestral', False), (1e38, 'ddim', True)],
)
def test_a_guidance_that_is_not_finite_draws_no_pixel(number, sampler, clip_x):
    """An infinite x that was clipped would be an ordinary black or white pixel."""
    name = build_sampling.given_function(overflowing(np.float32(number)))
    config = tiny.config(
        guidance__function=name,
        sample__sampler=sampler,
        sample__clip_x=clip_x,
        sample__num_steps=4,
        sample__batch_size=4,
    )
    batches = trained.image_batches(config)
    params = random_params(config)
    if number == 1e38:  # large, but finite: it is clipped
        assert len(next(batches(params, np.array([3] * 4), 0.0, 0))) == 4
        return
    drawn = batches(params, np.array([0, 1, 2, 4, 5, 3, 6]), 0.0, 0)
    assert len(next(drawn)) == 4  # the images before it are good
    with pytest.raises(UserError, match=r'^image 5 \(label 3\) holds NaN or infinity: .*config\.guidance\.function'):
        list(drawn)


@pytest.mark.parametrize(
    ('count', 'devices', 'unit'), [(9, 1, 9), (20, 1, 20), (50, 1, 20), (9, 4, 3), (1, 4, 1), (21, 4, 20)]
)
def test_no_more_images_are_drawn_than_asked_for(tmp_path, monkeypatch, count, devices, unit):
    """A batch is at most the images of the set, rounded up to the devices; and it is part of the set's identity."""
    monkeypatch.setattr(jax, 'device_count', lambda: devices)
    config = tiny.config()
    assert config.sample.batch_size == 20 and trained.unit_size(config, count) == unit
    model = trained.Trained(config, params=None, step=1, class_names=(), digest='a')
    wanted = trained.Wanted(tuple(range(10)), count, 1.0, 0.0)
    assert trained.open_set(model, tmp_path, wanted).batch_size == unit == trained.identity(model, wanted)['batch_size']


def test_image_i_is_the_same_image_in_a_smaller_batch(tmp_path):
    """To one of 255, in few values; the two programs round otherwise."""
    config, drawn = tiny.config(), []
    params, labels = random_params(config), np.arange(20) % 10
    for count in (9, 20):
        batches = trained.image_batches(config, batch_size=trained.unit_size(config, count))
        drawn.append(np.concatenate(list(batches(params, labels[:count], 1.0, 0))))
    difference = np.abs(drawn[0] - drawn[1][:9].astype(int))
    assert len(drawn[0]) == 9 and difference.max() <= 1 and (difference > 0).mean() < 0.01


if __name__ == '__main__':
    np.savez(sys.argv[1], *draw(range(IMAGES)), devices=jax.device_count())
