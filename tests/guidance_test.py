import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import guidance
from cfg_jax.diffusion import Prediction
from tests import mixture

LABELS = jnp.arange(300) % 3
Z = jax.random.normal(jax.random.key(0), (300, 2))
WEIGHTS = [0.0, 0.1, 1.0, 4.0]


def conditional(z, logsnr):
    return mixture.model(z, logsnr, LABELS)


def unconditional(z, logsnr):
    return mixture.model(z, logsnr, jnp.full_like(LABELS, mixture.NULL))


def eps(denoise, logsnr):
    return denoise(Z, jnp.full(len(Z), logsnr)).eps


@pytest.mark.parametrize('logsnr', [-10.0, -2.0, 0.0, 2.0, 5.0])
@pytest.mark.parametrize('weight', WEIGHTS)
def test_classifier_free_is_classifier_guidance_with_the_exact_posterior(weight, logsnr):
    """With exact scores the implicit classifier is the real one (paper, section 3.2), from either starting point."""
    free = eps(guidance.classifier_free(mixture.model, LABELS, weight, null_label=mixture.NULL), logsnr)
    of_conditional = guidance.classifier(conditional, mixture.log_posterior, LABELS, weight)
    of_unconditional = guidance.classifier(unconditional, mixture.log_posterior, LABELS, weight + 1.0)
    scale = float(jnp.max(jnp.abs(free)))
    np.testing.assert_allclose(eps(of_conditional, logsnr), free, atol=1e-5 * max(scale, 1.0))
    np.testing.assert_allclose(eps(of_unconditional, logsnr), free, atol=1e-5 * max(scale, 1.0))


def test_weight_zero_is_the_conditional_model():
    free = guidance.classifier_free(mixture.model, LABELS, 0.0, null_label=mixture.NULL)
    np.testing.assert_allclose(eps(free, 1.0), eps(conditional, 1.0), atol=1e-6)


def test_weight_minus_one_is_the_unconditional_model():
    free = guidance.classifier_free(mixture.model, LABELS, -1.0, null_label=mixture.NULL)
    np.testing.assert_allclose(eps(free, 1.0), eps(unconditional, 1.0), atol=1e-6)


def test_one_forward_of_a_doubled_batch():
    calls = []

    def model(z, logsnr, labels):
        calls.append((z.shape, np.asarray(labels)))
        return mixture.model(z, logsnr, labels)

    eps(guidance.classifier_free(model, LABELS, 1.0, null_label=mixture.NULL), 0.0)
    ((shape, labels),) = calls
    assert shape == (600, 2)
    np.testing.assert_array_equal(labels[:300], LABELS)
    np.testing.assert_array_equal(labels[300:], mixture.NULL)


def test_a_weight_per_image():
    weights = jnp.linspace(0.0, 4.0, len(LABELS))
    each = eps(guidance.classifier_free(mixture.model, LABELS, weights, null_label=mixture.NULL), 0.5)
    expected = (1 + weights)[:, None] * eps(conditional, 0.5) - weights[:, None] * eps(unconditional, 0.5)
    np.testing.assert_allclose(each, expected, atol=1e-6)


def test_the_learned_variance_is_the_conditional_half():
    def model(z, logsnr, labels):
        return Prediction(z, v=jnp.broadcast_to(labels[:, None] / 10.0, z.shape))

    prediction = guidance.classifier_free(model, LABELS, 2.0, null_label=9)(Z, jnp.zeros(len(Z)))
    np.testing.assert_allclose(prediction.v, jnp.broadcast_to(LABELS[:, None] / 10.0, Z.shape))


def test_guidance_composes():
    """Classifier guidance around classifier-free guidance: the weights add where both are exact."""
    free = guidance.classifier_free(mixture.model, LABELS, 1.0, null_label=mixture.NULL)
    both = guidance.classifier(free, mixture.log_posterior, LABELS, 2.0)
    alone = guidance.classifier_free(mixture.model, LABELS, 3.0, null_label=mixture.NULL)
    np.testing.assert_allclose(eps(both, 0.5), eps(alone, 0.5), atol=2e-5)


def test_a_sweep_over_weights_compiles_once():
    traces = []

    @jax.jit
    def guided(weight, labels):
        traces.append(1)
        denoise = guidance.classifier_free(mixture.model, labels, weight, null_label=mixture.NULL)
        return denoise(Z, jnp.zeros(len(Z))).eps

    for weight in WEIGHTS:
        guided(weight, LABELS[::-1])
    assert len(traces) == 1
