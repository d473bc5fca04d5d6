import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfg_jax import denoisers, diffusion, guidance, losses, samplers, schedules
from cfg_jax.diffusion import Prediction
from tests import mixture
from tests.tiny import ROOT

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


# ---------------------------------------------------------------- the algebra

REFERENCE = dict(np.load(ROOT / 'tests' / 'data' / 'guiders_solvers.npz'))
STRONG, WEAK = REFERENCE['cond'], REFERENCE['uncond']  # [3 steps, 4, 8, 8, 3]


def assert_close(found, expected, relative=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.mark.parametrize(
    ('name', 'parameters', 'key'),
    [
        ('linear', {}, 'cfg'),
        ('rescale', {'factor': 0.7}, 'rescale_0.7'),
        ('apg', {'norm_threshold': 5.0, 'eta': 0.0}, 'apg_original_eta0_norm5'),
        ('zero_star', {}, 'zero_star'),
        ('tangential', {}, 'tcfg'),
        ('cfgpp', {}, 'cfg'),
    ],
)
def test_rules_are_the_references(name, parameters, key):
    assert_close(guidance.RULES[name](STRONG[0], WEAK[0], 2.0, **parameters), REFERENCE[key])
    weights = jnp.array([2.0, 0.0, 2.0, 0.0])
    each = guidance.RULES[name](STRONG[0], WEAK[0], weights, **parameters)
    assert_close(each[::2], REFERENCE[key][::2])
    assert_close(each[1::2], STRONG[0, 1::2])


@pytest.mark.parametrize(
    ('options', 'key'), [({'norm_threshold': 5.0}, 'apg_eta0_norm5'), ({'eta': 0.5}, 'apg_eta0.5_nonorm')]
)
def test_the_projected_difference_is_the_references(options, key):
    """The reference adds it to the weak prediction, with 1 + w; APG's paper to the strong one, with w."""
    found = guidance.project_difference(STRONG[0], STRONG[0] - WEAK[0], **options)
    assert_close(WEAK[0] + 3.0 * found, REFERENCE[key])


def test_momentum_is_the_references():
    rule = functools.partial(guidance.RULES['apg'].function, norm_threshold=5.0, eta=0.0)  # the reference's, on eps
    step_of = jnp.array([0.0, 1.0, 2.0])
    at = lambda values: lambda z, logsnr: Prediction(jnp.asarray(values)[jnp.searchsorted(step_of, logsnr[0])])  # noqa: E731
    guided = guidance.extrapolate(at(STRONG), at(WEAK), 2.0, rule=rule, momentum=-0.5)
    z, found = jnp.zeros_like(STRONG[0]), []
    state = guided.start(z)
    for logsnr in step_of:
        prediction, state = guided.step(z, jnp.full(len(z), logsnr), state)
        found.append(prediction.eps)
    assert_close(np.stack(found), REFERENCE['apg_original_momentum-0.5'])


def drawn(denoise, *, steps=12, sampler=samplers.ddim, z=Z, clip_x=False, **options):
    keys = samplers.image_keys(3, jnp.arange(len(z)))
    grid = schedules.logsnr_grid(functools.partial(schedules.cosine_logsnr, logsnr_min=-8.0, logsnr_max=8.0), steps)
    return np.asarray(sampler(denoise, z, np.asarray(grid), keys, clip_x=clip_x, **options))


@pytest.mark.parametrize('name', guidance.RULES)
def test_weight_zero_is_the_strong_denoiser_under_every_rule(name):
    """To the bit at each call, and so are the images, also with momentum and where a rule renoises."""
    rule = guidance.RULES[name]
    guided = guidance.extrapolate(conditional, unconditional, 0.0, rule=rule)
    for logsnr in (-10.0, 0.0, 10.0):
        np.testing.assert_array_equal(eps(guided, logsnr), eps(conditional, logsnr))
    np.testing.assert_allclose(drawn(guided), drawn(conditional), atol=2e-6)
    remembering = guidance.extrapolate(conditional, unconditional, 0.0, rule=rule, momentum=-0.5)
    np.testing.assert_allclose(drawn(remembering), drawn(conditional), atol=2e-6)


@pytest.mark.parametrize('name', guidance.RULES)
def test_a_weak_model_that_is_as_strong_changes_nothing(name):
    """Autoguidance with weak = strong; x lies within [-1, 1] here, so that no threshold acts."""
    tame = lambda z, logsnr: Prediction(diffusion.predict_eps(z, 0.3 * jnp.tanh(z), logsnr))  # noqa: E731
    guided = guidance.extrapolate(tame, tame, 3.0, rule=guidance.RULES[name])
    np.testing.assert_allclose(drawn(guided), drawn(tame), atol=1e-5)


def test_apg_without_projection_and_limit_is_linear():
    whole = functools.partial(guidance.RULES['apg'], eta=1.0, norm_threshold=0.0)
    for logsnr in (-6.0, 0.0, 6.0):
        guided = guidance.extrapolate(conditional, unconditional, 2.0, rule=whole)
        free = guidance.classifier_free(mixture.model, LABELS, 2.0, null_label=mixture.NULL)
        np.testing.assert_allclose(eps(guided, logsnr), eps(free, logsnr), rtol=1e-4, atol=1e-4)


def test_apg_works_on_x():
    """eta = 0 drops the part of x's difference that lies along x, whatever eps does."""
    guided = guidance.extrapolate(conditional, unconditional, 2.0, rule=guidance.RULES['apg'])
    logsnr = jnp.full(len(Z), 1.0)
    strong, moved = (diffusion.predict_x(Z, f(Z, logsnr).eps, logsnr) for f in (conditional, guided))
    along = ((moved - strong) * strong).sum(1) / jnp.linalg.norm(strong, axis=1)
    assert float(jnp.abs(along).max()) < 1e-5 < 1e-2 < float(jnp.abs(moved - strong).max())


def test_dynamic_threshold_limits_x():
    z = 4.0 * jax.random.normal(jax.random.key(1), (5, 100))
    far = lambda z, logsnr: Prediction(diffusion.predict_eps(z, 3.0 * z, logsnr))  # noqa: E731
    guided = guidance.extrapolate(
        far, lambda z, logsnr: Prediction(0.1 * z), 1.0, rule=guidance.RULES['dynamic_threshold']
    )
    x = diffusion.predict_x(z, guided(z, jnp.zeros(5)).eps, jnp.zeros(5))
    assert 1.0 - 1e-4 < float(jnp.abs(x).max()) < 1.0 + 1e-4
    inside = jnp.array([[0.5, -0.25, 0.125]])
    np.testing.assert_array_equal(diffusion.dynamic_threshold(inside), inside)
    np.testing.assert_allclose(
        diffusion.dynamic_threshold(jnp.array([[4.0, -2.0, 1.0]]), percentile=50.0), [[1, -1, 0.5]]
    )
    assert np.isnan(diffusion.dynamic_threshold(jnp.array([[jnp.inf, 0.5]]))).all()


def test_cfgpp_is_guidance_with_a_weight_that_depends_on_the_step():
    """By definition z_s = alpha_s x~ + sigma_s eps_weak, x~ = (z - sigma_t eps~) / alpha_t, eps~ = weak + g (strong -
    weak). The difference's coefficient is -g alpha_s sigma_t / alpha_t. CFG of scale s renoises with eps~ too: its
    coefficient is -s (alpha_s sigma_t / alpha_t - sigma_s). Equal for s = g / (1 - e^{-(λs - λt) / 2}), because
    alpha_t sigma_s / (alpha_s sigma_t) = e^{-(λs - λt) / 2}.
    """
    grid, scale = jnp.linspace(-6.0, 6.0, 12), 0.6
    keys, plusplus = samplers.image_keys(0, jnp.arange(len(Z))), guidance.RULES['cfgpp']
    found = samplers.ddim(
        guidance.extrapolate(conditional, unconditional, scale - 1.0, rule=plusplus), Z, grid, keys, clip_x=False
    )
    following = jnp.append(grid[1:], jnp.inf)  # the last step returns x: s = g

    def weight(logsnr):
        step = jnp.argmin(jnp.abs(grid - logsnr[0]))
        return jnp.full(len(Z), scale / -jnp.expm1(-0.5 * (following[step] - grid[step])) - 1.0)

    free = guidance.classifier_free(mixture.model, LABELS, weight, null_label=mixture.NULL)
    np.testing.assert_allclose(found, samplers.ddim(free, Z, grid, clip_x=False), atol=1e-4)
    plain = guidance.classifier_free(mixture.model, LABELS, scale - 1.0, null_label=mixture.NULL)
    assert np.abs(found - samplers.ddim(plain, Z, grid, clip_x=False)).max() > 0.1


# ---------------------------------------------------------------- what to move away from


def test_a_random_label_of_one_class_changes_nothing():
    keys = samplers.image_keys(0, jnp.arange(len(Z)))
    one = lambda z, logsnr, labels: mixture.model(z, logsnr, labels)  # noqa: E731
    guided = guidance.extrapolate_pair(
        guidance.with_random_label(one, jnp.zeros_like(LABELS), keys, num_classes=1), 5.0
    )
    alone = guidance.conditional(one, jnp.zeros_like(LABELS), 0.0, null_label=mixture.NULL)
    np.testing.assert_allclose(eps(guided, 0.5), eps(alone, 0.5), atol=1e-5)


def test_random_labels_are_uniform_and_depend_on_image_and_step_alone():
    seen = []

    def model(z, logsnr, labels):
        seen.append(np.asarray(labels))
        return Prediction(z)

    def labels_of(images, logsnr):
        seen.clear()
        keys, some = samplers.image_keys(7, jnp.asarray(images)), jnp.zeros(len(images), jnp.int32)
        guidance.with_random_label(model, some, keys, num_classes=4)(Z[: len(images)], jnp.full(len(images), logsnr))
        return seen[0][len(images) :]

    whole = labels_of(range(300), 0.5)
    np.testing.assert_array_equal(labels_of(range(100, 110), 0.5), whole[100:110])
    assert (np.bincount(whole, minlength=4) > 45).all() and (labels_of(range(300), 1.5) != whole).any()


def test_the_weak_network_is_told_another_time():
    told = []

    def model(z, logsnr, labels, *, network_logsnr):
        told.append(np.asarray(network_logsnr))
        return Prediction(z)

    keys = samplers.image_keys(0, jnp.arange(len(Z)))
    guidance.with_perturbed_time(model, LABELS, keys, scale=2.0)(Z, jnp.full(len(Z), 1.0))
    np.testing.assert_array_equal(told[0][:300], 1.0)
    assert abs(told[0][300:].mean() - 1.0) < 0.5 and 1.6 < told[0][300:].std() < 2.4


# ---------------------------------------------------------------- when


@pytest.mark.parametrize('sampler', [samplers.ddim, samplers.ancestral, samplers.heun, samplers.dpmpp_2m])
def test_an_interval_of_everything_is_no_interval(sampler):
    free = guidance.classifier_free(mixture.model, LABELS, 2.0, null_label=mixture.NULL)
    always = guidance.interval(free, conditional, -8.0, 8.0)
    np.testing.assert_array_equal(drawn(always, sampler=sampler), drawn(free, sampler=sampler))
    never = guidance.interval(free, conditional, 8.5, 9.0)
    np.testing.assert_array_equal(drawn(never, sampler=sampler), drawn(conditional, sampler=sampler))


@pytest.mark.parametrize('sampler', [samplers.ddim, samplers.dpmpp_2m, samplers.heun])
def test_no_doubled_batch_is_computed_outside_an_interval(sampler):
    """The scan is split in three; a traced grid cannot be split, and gives the same images at a higher cost."""
    sizes = []

    def model(z, logsnr, labels):
        sizes.append(len(z))
        return mixture.model(z, logsnr, labels)

    free = guidance.classifier_free(model, LABELS, 2.0, null_label=mixture.NULL)
    alone = guidance.conditional(model, LABELS, 0.0, null_label=mixture.NULL)
    guided = guidance.interval(free, alone, -2.0, 2.0)
    x = drawn(guided, sampler=sampler)
    assert len(sizes) == 3 and sorted(sizes) == [300, 300, 600]
    keys = samplers.image_keys(3, jnp.arange(len(Z)))
    grid = schedules.logsnr_grid(functools.partial(schedules.cosine_logsnr, logsnr_min=-8.0, logsnr_max=8.0), 12)
    traced = jax.jit(lambda grid: sampler(guided, Z, grid, keys, clip_x=False))(grid)
    np.testing.assert_allclose(x, traced, atol=1e-5)
    masked = lambda logsnr: jnp.where(jnp.abs(logsnr) <= 2.001, 2.0, 0.0)  # noqa: E731
    by_weight = guidance.classifier_free(mixture.model, LABELS, masked, null_label=mixture.NULL)
    np.testing.assert_allclose(x, drawn(by_weight, sampler=sampler), atol=1e-5)


def test_momentum_and_an_interval_go_together():
    """The running difference waits outside the interval."""
    apg = functools.partial(guidance.RULES['apg'], eta=0.0)
    free = guidance.extrapolate(conditional, unconditional, 2.0, rule=apg, momentum=-0.5)
    masked = lambda logsnr: jnp.where(jnp.abs(logsnr) <= 2.001, 2.0, 0.0)  # noqa: E731
    by_weight = guidance.extrapolate(conditional, unconditional, masked, rule=apg, momentum=-0.5)
    np.testing.assert_allclose(drawn(guidance.interval(free, conditional, -2.0, 2.0)), drawn(by_weight), atol=1e-5)
    without = guidance.extrapolate(conditional, unconditional, 2.0, rule=apg)
    assert np.abs(drawn(free) - drawn(without)).max() > 1e-2


def test_schedules_have_a_mean_of_one():
    u = (jnp.arange(4000) + 0.5) / 4000
    for name, multiplier in guidance.SCHEDULES.items():
        values = multiplier(u)
        assert abs(float(values.mean()) - 1.0) < 1e-3, name
        assert float(values.min()) >= -1e-6 and (name == 'constant' or float(values[0]) > 1.9)
    weight = guidance.scheduled(3.0, lambda logsnr: 2.0 * jnp.ones_like(logsnr))
    np.testing.assert_array_equal(weight(jnp.zeros(4)), jnp.full(4, 6.0))


def test_a_classifier_goes_on_top_of_a_state_and_an_interval():
    """Its gradient acts everywhere, the guidance below it in its interval."""
    free = guidance.extrapolate(conditional, unconditional, 1.0, momentum=0.3)
    both = guidance.classifier(guidance.interval(free, conditional, -2.0, 2.0), mixture.log_posterior, LABELS, 0.5)
    x = drawn(both)
    outside = guidance.classifier(conditional, mixture.log_posterior, LABELS, 0.5)
    np.testing.assert_allclose(eps(both, 5.0), eps(outside, 5.0), atol=1e-6)
    assert np.isfinite(x).all() and np.abs(x - drawn(outside)).max() > 1e-2


def test_two_denoisers_with_a_state_extrapolate():
    a = guidance.extrapolate(conditional, unconditional, 1.0, momentum=0.3)
    b = guidance.interval(conditional, unconditional, -2.0, 2.0)
    x = drawn(guidance.extrapolate(a, b, 0.0))
    np.testing.assert_allclose(x, drawn(a), atol=1e-5)
    assert np.abs(drawn(guidance.extrapolate(a, b, 1.0)) - x).max() > 1e-2


def test_cfgpp_at_weight_zero_is_off_also_below_a_classifier_and_with_clipping():
    """For the images whose weight is 0, what is added back is their eps as the classifier has moved it."""
    weights = jnp.where(jnp.arange(len(Z)) % 2 == 0, 0.0, -0.4)
    plusplus = guidance.extrapolate(conditional, unconditional, weights, rule=guidance.RULES['cfgpp'])
    for change in (
        lambda denoise: guidance.classifier(denoise, mixture.log_posterior, LABELS, 0.5),
        lambda denoise: denoisers.mapped(denoise, diffusion.clip_prediction),
    ):
        x, expected = drawn(change(plusplus)), drawn(change(conditional))
        np.testing.assert_allclose(x[::2], expected[::2], atol=1e-4)
        assert np.abs(x - expected)[1::2].max() > 0.1
