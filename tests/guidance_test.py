import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfg_jax import diffusion, guidance, losses, schedules
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


@pytest.mark.parametrize('logsnr', [-2.0, 0.0, 2.0])
def test_the_implicit_classifier_guides_as_classifier_free_does(logsnr):
    """eps~ = eps_c - w sigma ∇ log p^i(c | z) for any model (paper, section 3.2)."""
    implicit = guidance.implicit_classifier_score(mixture.model, LABELS, null_label=mixture.NULL)
    gradient, weights = implicit(Z, jnp.full(len(Z), logsnr)), jnp.linspace(0.0, 4.0, len(Z))
    _, sigma = diffusion.alpha_sigma(logsnr)
    free = eps(guidance.classifier_free(mixture.model, LABELS, weights, null_label=mixture.NULL), logsnr)
    np.testing.assert_allclose(
        eps(conditional, logsnr) - weights[:, None] * sigma * gradient, free, rtol=1e-5, atol=1e-5
    )


def test_with_exact_scores_the_implicit_classifier_is_the_real_one():
    implicit = guidance.implicit_classifier_score(mixture.model, LABELS, null_label=mixture.NULL)
    logsnr = jnp.full(len(Z), 0.5)
    exact = jax.grad(lambda z: mixture.log_posterior(z, logsnr, LABELS).sum())(Z)
    np.testing.assert_allclose(implicit(Z, logsnr), exact, rtol=1e-4, atol=1e-4)


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


class SmallClassifier(nn.Module):
    """z [B, 2], λ [B] -> logits [B, 3]."""

    @nn.compact
    def __call__(self, z, logsnr):
        h = jnp.concatenate([z, logsnr[:, None] / 10.0], axis=1)
        for _ in range(3):
            h = nn.silu(nn.Dense(64)(h))
        return nn.Dense(3)(h)


def test_a_trained_classifiers_gradient_points_the_exact_way():
    """Trained by `losses.classifier_loss` on the mixture for 2,000 steps; the median angle is below 15 degrees."""
    module, optimizer = SmallClassifier(), optax.adam(optax.cosine_decay_schedule(3e-3, 2000))

    def batch(key):
        label_key, x_key, loss_key = jax.random.split(key, 3)
        labels = jax.random.randint(label_key, (512,), 0, 3)
        return mixture.MEANS[labels] + mixture.SCALE * jax.random.normal(x_key, (512, 2)), labels, loss_key

    def step(carry, key):
        params, opt_state = carry
        x, labels, loss_key = batch(key)

        def loss(params):
            schedule = functools.partial(schedules.cosine_logsnr, logsnr_min=-6.0, logsnr_max=6.0)
            network = functools.partial(module.apply, params)
            return losses.classifier_loss(network, x, labels, loss_key, schedule=schedule).loss.mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    params = module.init(jax.random.key(0), Z, jnp.zeros(len(Z)))
    keys = jax.random.split(jax.random.key(1), 2000)
    params = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])(params)

    def learned(z, logsnr, labels):
        log_p = jax.nn.log_softmax(module.apply(params, z, logsnr))
        return jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]

    x, labels, key = batch(jax.random.key(2))
    # of a class that the image is not of: where it is, both gradients vanish and have no direction
    other = (labels + 1) % 3

    def gradient(log_prob, z, logsnr):
        return jax.grad(lambda z: log_prob(z, logsnr, other).sum())(z)

    for logsnr in (-2.0, 0.0, 2.0):
        z, at = diffusion.q_sample(x, jax.random.normal(key, x.shape), logsnr), jnp.full(len(x), logsnr)
        ours, exact = gradient(learned, z, at), gradient(mixture.log_posterior, z, at)
        cosine = (ours * exact).sum(1) / jnp.linalg.norm(ours, axis=1) / jnp.linalg.norm(exact, axis=1)
        assert float(jnp.median(jnp.degrees(jnp.arccos(jnp.clip(cosine, -1, 1))))) < 15.0


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


@pytest.mark.parametrize('form', ['classifier_free', 'conditional', 'unconditional', 'classifier', 'implicit'])
def test_a_model_that_returns_an_array_is_refused(form):
    def model(z, logsnr, labels):
        return z

    guided = {
        'classifier': lambda: guidance.classifier(lambda z, logsnr: z, mixture.log_posterior, LABELS, 1.0),
        'implicit': lambda: guidance.implicit_classifier_score(model, LABELS, null_label=mixture.NULL),
    }.get(form) or (lambda: getattr(guidance, form)(model, LABELS, 1.0, null_label=mixture.NULL))
    with pytest.raises(
        ValueError, match=r'an array of shape \(.00, 2\); it must return a cfg_jax.diffusion.Prediction'
    ):
        jax.jit(lambda z: guided()(z, jnp.zeros(len(Z))))(Z)


def test_a_classifier_that_returns_logits_is_refused():
    """Their sum would guide towards no class in particular."""
    logits = lambda z, logsnr, labels: jnp.concatenate([z, z], axis=1)  # noqa: E731
    guided = guidance.classifier(conditional, logits, LABELS, 1.0)
    with pytest.raises(ValueError, match=r'log_prob returned shape \(300, 4\) for 300 images'):
        guided(Z, jnp.zeros(len(Z)))
    with pytest.raises(ValueError, match='one number per image'):
        guidance.classifier_mean_shift(logits, LABELS, 1.0)(Z, jnp.zeros(len(Z)), 1.0)
