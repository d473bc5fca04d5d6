"""Mean images: those of the data by hand, and those of an exact model, which predicts the data's."""

import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import diffusion, samplers
from cfg_jax.data.sources import ArraySource
from cfg_jax.errors import UserError
from cfg_jax.evaluation import mean_images

MEANS = np.array([0.25, -0.5])  # of two classes of constant images


def test_means_of_the_data():
    images = np.array([0, 255, 100, 200], np.uint8).reshape(4, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
    source = ArraySource(images, np.array([0, 0, 2, 2]), ('a', 'b', 'c'))
    means = mean_images.data_means(source, 0)
    assert set(means) == {None, 0, 2}  # b has no image
    for label, level in ((None, 138.75), (0, 127.5), (2, 150.0)):
        np.testing.assert_allclose(means[label], np.full((2, 2, 3), level / 127.5 - 1))
    assert set(mean_images.data_means(source, 2)) == {None, 0, 2}  # the first and the last


def exact(label, logsnr, indices):
    """Predict x exactly for classes of one image each: E[x | z] is that image at any λ."""
    z = samplers.step_noise(samplers.image_keys(0, indices), 0, (4, 4, 1))
    x = jnp.full(z.shape, MEANS[label])
    return diffusion.predict_x(z, diffusion.predict_eps(z, x, jnp.float32(logsnr)), jnp.float32(logsnr))


def test_an_exact_model_predicts_the_means():
    found = mean_images.predicted_means(exact, [0, 1], [-6.0, -3.0], count=10, batch_size=4)
    assert set(found) == {(label, logsnr) for label in (0, 1) for logsnr in (-6.0, -3.0)}
    for (label, _), (mean, first) in found.items():
        assert mean_images.distance(mean, MEANS[label]) < 1e-4 and mean_images.distance(first, MEANS[label]) < 1e-4


def test_each_noise_counts_once():
    """10 noises in batches of 4: the filling of the last batch is not counted."""

    def index(label, logsnr, indices):
        return np.broadcast_to(indices[:, None, None, None], (len(indices), 2, 2, 1))

    mean, first = mean_images.predicted_means(index, [0], [0.0], count=10, batch_size=4)[0, 0.0]
    assert mean.mean() == 4.5 and first.mean() == 0


def test_what_is_not_finite_is_not_drawn():
    with pytest.raises(UserError, match='λ = -20 for label 1 holds NaN'):
        mean_images.predicted_means(lambda *_: np.full((4, 2, 2, 1), np.nan), [1], [-20.0], count=4, batch_size=4)


def test_the_picture():
    mean = np.zeros((8, 8, 1))
    rows = [('all', mean, [mean + 300.0, mean + 0.5], mean + 0.25), ('caf\udce9', mean, [mean, mean], mean)]
    drawn = mean_images.draw(rows, [-20.0, -3.0], title='title')
    assert drawn.png.startswith(b'\x89PNG') and '<svg' in drawn.svg
