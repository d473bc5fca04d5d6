"""The losses that a config chooses: what is predicted, at which times, with which weight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cfg_jax import build, diffusion, losses
from cfg_jax.checks import check_config
from cfg_jax.config import default
from cfg_jax.errors import UserError
from cfg_jax.models.mlp import MLP
from cfg_jax.training.checkpoints import as_json, config_differences, merged
from cfg_jax.training.fit import fit
from cfg_jax.training.train_state import TrainState
from tests import mixture, tiny

# Between them every prediction, every weighting and every law of the times, with the steps' loss falling.
RECIPES = {
    'EDM': {'diffusion__prediction': 'edm', 'loss__weighting': 'edm', 'loss__times': 'edm'},
    'SiD2': {'diffusion__prediction': 'v', 'loss__weighting': 'sigmoid'},
    'sigmoid of normal times': {'loss__weighting': 'sigmoid', 'loss__times': 'edm'},
    'min-SNR': {'diffusion__prediction': 'x', 'loss__weighting': 'min_snr'},
    'truncated SNR': {'diffusion__prediction': 'v', 'loss__weighting': 'truncated_snr'},
    'logit-normal': {'diffusion__prediction': 'v', 'loss__target': 'v', 'loss__times': 'logit_normal'},
}


def test_the_recipes_have_every_option():
    def used(field):
        return {recipe[field] for recipe in RECIPES.values() if field in recipe}

    assert used('diffusion__prediction') == {*diffusion.PARAMETERISATIONS} - {'eps'}
    assert used('loss__weighting') == {*losses.WEIGHTINGS}
    assert used('loss__times') == {*build.TIMES}


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_small_network_learns_the_exact_denoiser_of_a_mixture(recipe):
    """The loss falls, and eps of a network of each recipe comes near the mixture's, at the λ that samplers use most."""
    config = tiny.config(**RECIPES[recipe], diffusion__sigma_data=0.7)
    check_config(config)
    meaning = config.diffusion.prediction, config.diffusion.sigma_data
    network = MLP(2, mixture.NULL + 1, width=64)

    def apply(params, z, logsnr, labels):
        return network.apply(params, diffusion.network_input(z, logsnr, *meaning), logsnr, labels)

    def loss(params, key):
        data_key, loss_key = jax.random.split(key)
        x, labels = mixture._mixture.sample_with_labels(data_key, 256)
        return losses.diffusion_loss(
            partial(apply, params),
            x,
            labels,
            loss_key,
            schedule=build.training_schedule(config),
            null_label=mixture.NULL,
            p_uncond=0.1,
            prediction=config.diffusion.prediction,
            target=config.loss.target,
            sigma_data=config.diffusion.sigma_data,
            weighting=build.loss_weighting(config),
        ).loss.mean()

    x, labels = mixture._mixture.sample_with_labels(jax.random.key(1), 2000)
    logsnr = jnp.linspace(-4.0, 6.0, len(x))
    z = diffusion.q_sample(x, jax.random.normal(jax.random.key(2), x.shape), logsnr)

    @jax.jit
    def error(params):
        eps = diffusion.network_eps(apply(params, z, logsnr, labels), z, logsnr, *meaning)
        return jnp.mean(jnp.square(eps - mixture.model(z, logsnr, labels).eps))

    params = network.init(jax.random.key(0), z, logsnr, labels)
    trained, parts = fit(loss, params, num_steps=600, learning_rate=3e-3, key=jax.random.key(3), name=recipe, parts=4)
    assert np.isfinite(parts).all() and parts[-1] < parts[0]
    assert error(trained) < 0.15 * error(params)


@pytest.mark.parametrize('recipe', ['EDM', 'sigmoid of normal times'])
def test_training_steps_are_finite(recipe):
    config = tiny.config(**RECIPES[recipe])
    state = TrainState.create(build.init_params(config, jax.random.key(0)), build.optimizer(config))
    step = jax.jit(build.train_step(config))
    batch = {'image': np.arange(16 * 64, dtype=np.uint8).reshape(16, 8, 8, 1), 'label': np.arange(16) % 10}
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(1))
        assert all(np.isfinite(metrics[key]) and metrics[key] > 0 for key in ('loss', 'grad_norm'))
        # low-discrepancy u: a quarter of the images in each quarter of the λ in use
        np.testing.assert_array_equal(metrics['quarter_counts'], 4)


@pytest.mark.parametrize(('times', 'mean', 'deviation'), [('edm', 2.4, 2.4), ('logit_normal', 0.0, 2.0)])
def test_the_times_are_normal_and_evenly_spread(times, mean, deviation):
    schedule = build.training_schedule(tiny.config(loss__times=times))
    u = losses.sample_u(jax.random.key(0), 4000, low_discrepancy=True)
    logsnr = np.float64(schedule(u))
    np.testing.assert_allclose([logsnr.mean(), logsnr.std()], [mean, deviation], atol=0.02)
    edges = build.quarter_edges(tiny.config(loss__times=times))
    np.testing.assert_allclose(edges[1:4], mean + deviation * np.array([-0.67449, 0, 0.67449]), atol=1e-4)
    np.testing.assert_array_equal(np.histogram(logsnr, edges)[0], 1000)


class Seen:
    """In place of a network: keeps what it is called with, and returns z."""

    def apply(self, variables, z, logsnr, *_, **__):
        self.z, self.told = z, logsnr
        return z


def test_training_and_sampling_scale_the_networks_input_alike(monkeypatch):
    seen = Seen()
    monkeypatch.setattr(build, 'network', lambda config: seen)
    config = tiny.config(diffusion__prediction='edm', diffusion__sigma_data=0.3)
    x = 0.3 * jax.random.normal(jax.random.key(0), (64, 16, 16, 1))
    labels = jnp.zeros(64, jnp.int32)
    logsnr = build.loss(config)({}, x, labels, jax.random.key(1)).logsnr
    np.testing.assert_allclose(jnp.std(seen.z, axis=(1, 2, 3)), 1.0, atol=0.25)
    np.testing.assert_allclose(jnp.std(seen.z), 1.0, atol=0.02)
    np.testing.assert_array_equal(seen.told, logsnr)
    z = diffusion.q_sample(x, jax.random.normal(jax.random.key(2), x.shape), logsnr)
    prediction = build.model(config, {})(z, logsnr, labels, network_logsnr=logsnr + 1)
    scaled = diffusion.network_input(z, logsnr, 'edm', 0.3)
    np.testing.assert_array_equal(seen.z, scaled)
    np.testing.assert_array_equal(seen.told, logsnr + 1)
    np.testing.assert_array_equal(prediction.eps, diffusion.edm_eps(scaled, z, logsnr, 0.3))


LEARNED = {'diffusion__schedule': 'adm_cosine', 'model__learn_variance': True}
CLASSIFIER = {'model__kind': 'classifier'}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'loss__weighting': 'snr'},
            r"loss\.weighting is 'snr'; allowed: '', 'min_snr', 'truncated_snr', 'edm'",
        ),
        ({'loss__times': 'normal'}, r"loss\.times is 'normal'; allowed: 'uniform', 'edm', 'logit_normal'"),
        ({'loss__weighting': 'edm', 'loss__target': 'v'}, r"loss\.target is 'v'; it must be 'eps' because .*weighting"),
        ({'diffusion__sigma_data': 0.0}, r'diffusion\.sigma_data is 0\.0; it must be above 0'),
        ({'loss__min_snr_gamma': -1.0}, r'loss\.min_snr_gamma is -1\.0; it must be above 0'),
        ({'loss__sigmoid_bias': np.inf}, r'loss\.sigmoid_bias is inf; it must be a finite number'),
        ({**LEARNED, 'loss__weighting': 'min_snr'}, r"weighting is 'min_snr'; it must be '' because .*learn_variance"),
        ({**LEARNED, 'loss__times': 'edm'}, r"times is 'edm'; it must be 'uniform' because .*learn_variance is set"),
        ({**LEARNED, 'loss__target': 'v'}, r"target is 'v'; it must be 'eps' because .*learn_variance is set"),
        ({**CLASSIFIER, 'loss__target': 'x'}, r"target is 'x'; it must be 'eps' because .*kind is 'classifier'"),
        ({**CLASSIFIER, 'loss__weighting': 'edm'}, r"weighting is 'edm'; it must be '' because .*kind is 'classifier'"),
        ({**CLASSIFIER, 'loss__times': 'edm'}, r"times is 'edm'; it must be 'uniform' because .*kind is 'classifier'"),
        (
            {**CLASSIFIER, 'diffusion__prediction': 'edm'},
            r"prediction is 'edm'; it must be 'eps' because .*kind is",
        ),
        (
            {'diffusion__schedule': 'adm_linear', 'loss__weighting': 'sigmoid'},
            r"weighting is 'sigmoid'; it must be other than 'sigmoid', which needs dλ/du: a table has none",
        ),
    ],
)
def test_what_does_not_apply_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny.config(**changes))


@pytest.mark.parametrize('changes', [LEARNED, {**CLASSIFIER, 'loss__p_uncond': 0.0}])
def test_learned_variances_and_classifiers_spread_their_times_too(changes):
    images, labels = jnp.zeros((64, 8, 8, 1)), jnp.zeros(64, int)

    def quarters(**spread):
        config = tiny.config(**changes, **spread)
        check_config(config)
        params = build.init_params(config, jax.random.key(0))
        logsnr = jax.jit(build.loss(config))(params, images, labels, jax.random.key(1)).logsnr
        inner = np.asarray(build.quarter_edges(config))[1:-1]
        return np.bincount(np.searchsorted(inner, logsnr), minlength=4)

    assert np.abs(quarters() - 16).max() <= 1  # digits' config spreads them
    assert np.abs(quarters(loss__low_discrepancy=False) - 16).max() > 1


def test_a_weight_may_not_change_in_a_run_and_older_runs_have_none():
    older = tiny.config().to_dict()
    for field in ('weighting', 'min_snr_gamma', 'sigmoid_bias', 'times'):
        del older['loss'][field]
    del older['diffusion']['sigma_data']
    saved = merged(as_json(default().to_dict()), as_json(older))
    assert config_differences(as_json(build.run_identity(tiny.config())), saved) == []
    changed = tiny.config(loss__weighting='edm', loss__times='edm')
    assert sorted(config_differences(as_json(build.run_identity(changed)), saved)) == [
        "config.loss.times is 'edm' now and was 'uniform' when saved",
        "config.loss.weighting is 'edm' now and was '' when saved",
    ]


GFT = {'model__guidance_input': True, 'loss__guided': 'gft', 'guidance__function': 'learned'}


def test_guidance_free_training_of_a_tiny_unet():
    """Steps are finite, the embedding of w learns, and it is asked for the null label without dropout."""
    config = tiny.config(**GFT, model__dropout=0.5, loss__p_uncond=0.2)
    check_config(config)
    first = TrainState.create(build.init_params(config, jax.random.key(0)), build.optimizer(config))
    state, step = first, jax.jit(build.train_step(config))
    batch = {'image': np.arange(16 * 64, dtype=np.uint8).reshape(16, 8, 8, 1), 'label': np.arange(16) % 10}
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(1))
        assert np.isfinite(metrics['loss']) and metrics['grad_norm'] > 0
    before, after = (each.params['weight_out']['kernel'] for each in (first, state))
    assert float(jnp.abs(after - before).max()) > 0
    assert metrics['kind_counts'][1] > 0


class Calls:
    """In place of a network: keeps the labels, the weights and the mode of each call."""

    def __init__(self):
        self.calls = []

    def apply(self, variables, z, logsnr, labels, weight=None, *, train=False, **_):
        self.calls.append((labels, weight, train))
        self.logsnr = logsnr
        return z


@pytest.mark.parametrize('method', ['gft', 'guided'])
def test_the_weight_does_not_depend_on_the_time(monkeypatch, method):
    """Rank correlation of w and λ over the images of a batch: drawn from one key, it would be 1."""
    calls = Calls()
    monkeypatch.setattr(Calls, 'clone', lambda self, **_: Calls(), raising=False)
    monkeypatch.setattr(build, 'network', lambda config: calls)
    arguments = {}, jnp.zeros((2000, 8, 8, 1)), jnp.arange(2000) % 10, jax.random.key(0)
    if method == 'gft':
        build.loss(tiny.config(**GFT, loss__low_discrepancy=False))(*arguments)
    else:
        config = tiny.config(model__guidance_input=True, distill__method='guided', loss__low_discrepancy=False)
        build.distillation_loss(config)(*arguments, {}, 0)
    labels, weight, _ = calls.calls[-1]
    known = np.asarray(labels) < 10
    assert abs(stats.spearmanr(weight[known], calls.logsnr[known]).statistic) < 0.1


def test_guidance_free_training_asks_the_network_twice(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(build, 'network', lambda config: calls)
    config = tiny.config(**GFT)
    build.loss(config)({}, jnp.zeros((400, 8, 8, 1)), jnp.arange(400) % 10, jax.random.key(0))
    (null, no_weight, frozen_trains), (labels, weight, trains) = calls.calls
    assert (null == 10).all() and not no_weight.any() and not frozen_trains and trains
    dropped = labels == 10
    assert 0 < dropped.sum() < 100 and not weight[dropped].any() and (weight[~dropped] > 0).all()
    assert 3 < float(weight.max()) <= config.model.guidance_max


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'loss__guided': 'cfg'}, r"loss\.guided is 'cfg'; allowed: '', 'gft'"),
        (
            {'model__guidance_input': False, 'guidance__function': 'conditional'},
            r'guidance_input is False; .* True bec',
        ),
        (
            {'loss__p_uncond': 0.0},
            r'loss\.p_uncond is 0\.0; it must be above 0, so that the null label is trained, bec',
        ),
        ({'model__labels': 'classes', 'loss__p_uncond': 0.0}, r"model\.labels is 'classes'; it must be 'null' because"),
        ({'distill__method': 'guided'}, r"distill\.method is 'guided'; it must be '' because config\.loss\.guided is"),
    ],
)
def test_guidance_free_training_refuses_what_it_cannot_use(changes, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny.config(**{**GFT, **changes}))


def test_a_table_takes_normal_times_and_then_every_weight():
    check_config(tiny.config(diffusion__schedule='adm_linear', loss__times='edm', loss__weighting='sigmoid'))
