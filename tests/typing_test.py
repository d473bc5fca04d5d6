"""Annotated shapes: the tests check them, and the product does without jaxtyping."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import diffusion, guidance, samplers, schedules
from cfg_jax.diffusion import Prediction
from cfg_jax.models.unet import UNet
from tests.conftest import CHECKED
from tests.tiny import ROOT

X = jnp.zeros((4, 8, 8, 3))


def guided(z, logsnr):
    model = lambda z, logsnr, labels: Prediction(z)  # noqa: E731
    return guidance.classifier_free(model, jnp.zeros(4, jnp.int32), 1.0, null_label=1)(z, logsnr)


def network(z, logsnr):
    return jax.eval_shape(lambda: UNet(8, (1,), 1, num_groups=4).init(jax.random.key(0), z, logsnr))


@pytest.mark.parametrize(
    'wrong',
    [
        lambda: diffusion.q_sample(X, X[:2], 0.0),
        lambda: diffusion.predict_x(X, X, jnp.zeros(3)),
        lambda: diffusion.to_uint8(np.zeros((4, 8), np.int32)),
        lambda: schedules.logsnr_grid(lambda u: u[1:], 4),
        lambda: guided(X, jnp.zeros(3)),
        lambda: samplers.ddim(guided, X, jnp.zeros((2, 2))),
        lambda: network(X, jnp.zeros(3)),
        lambda: network(X[0], jnp.zeros(4)),
    ],
)
def test_wrong_shapes_are_refused(wrong):
    """If this fails, the import hook of conftest.py is not at work."""
    jaxtyping = pytest.importorskip('jaxtyping')
    pytest.importorskip('beartype')
    with pytest.raises(jaxtyping.TypeCheckError):
        wrong()


def test_right_shapes_are_not():
    guided(diffusion.q_sample(X, X, jnp.zeros(4)), jnp.zeros(4))
    network(X, np.zeros(4, np.float32))


def test_the_product_does_without_jaxtyping():
    modules = [f'cfg_jax.{path.stem}' for path in (ROOT / 'cfg_jax').glob('*.py') if path.stem in CHECKED]
    modules += [f'cfg_jax.models.{path.stem}' for path in (ROOT / 'cfg_jax' / 'models').glob('[a-z]*.py')]
    assert len(modules) == len(CHECKED) - 1 + 4
    code = f"""
import sys
sys.modules['jaxtyping'] = sys.modules['beartype'] = None
import {', '.join(modules)}
from cfg_jax import diffusion, guidance, samplers, schedules
from cfg_jax.models.unet import UNet
import jax, jax.numpy as jnp
z, labels = jnp.zeros((2, 4, 4, 3)), jnp.zeros(2, jnp.int32)
module = UNet(8, (1,), 1, num_groups=4, num_labels=2)
params = jax.eval_shape(module.init, jax.random.key(0), z, jnp.zeros(2), labels)

def sample(params, z):
    model = lambda z, logsnr, labels: diffusion.Prediction(module.apply(params, z, logsnr, labels))
    denoise = guidance.classifier_free(model, labels, 1.0, null_label=1)
    return samplers.ddim(denoise, z, schedules.logsnr_grid(schedules.cosine_logsnr, 2))

assert jax.eval_shape(sample, params, z).shape == z.shape
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
