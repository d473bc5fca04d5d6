"""Guidance and samplers as a config names them: what is drawn, what it costs, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import build, build_sampling, diffusion, samplers, schedules, trained
from cfg_jax.checks import check_config
from cfg_jax.diffusion import Prediction
from cfg_jax.errors import UserError
from cfg_jax.models import blocks
from tests import tiny

LABELS = np.arange(6) % 10
FEW_STEPS = {  # unclipped, and within λ at which a network of random parameters does not overflow
    'sample__sampler': 'ddim', 'sample__num_steps': 3, 'sample__clip_x': False,
    'sample__grid': 'logsnr', 'sample__logsnr_min': -4.0, 'sample__logsnr_max': 4.0,
}  # fmt: skip


def random_params(config, seed=0):
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: np.float32(0.2 * random.standard_normal(leaf.shape)), shapes)


def drawing(weak=False, indices=range(6), **changes):
    """Return the function w -> x of a tiny config with these changes, compiled once, and the config."""
    config = tiny.config(**{**FEW_STEPS, **changes})
    check_config(config)
    params, weak_params = random_params(config), random_params(config, seed=1) if weak else None
    sample = jax.jit(build_sampling.sampler(config, weak_config=config if weak else None))
    labels = jnp.asarray(LABELS[list(indices)])

    def draw(weight):
        return np.asarray(sample(params, 0, jnp.array(list(indices)), labels, weight, None, 0.0, weak_params))

    return draw, config


# ---------------------------------------------------------------- each word of config.guidance does something


@pytest.fixture(scope='module')
def plain():
    draw, _ = drawing()
    return {weight: draw(weight) for weight in (0.0, 2.0)}


@pytest.mark.parametrize(
    'changes',
    [
        {'weak': 'random_label'},
        {'weak': 'time'},
        {'weak': 'attention'},
        {'weak': 'attention', 'attention_resolutions': (8,)},
        {'weak': 'checkpoint', 'weak_step': 2},
        {'rule': 'rescale'},
        {'rule': 'apg', 'apg_norm_threshold': 1.0, 'momentum': -0.5},
        {'rule': 'zero_star'},
        {'rule': 'tangential'},
        {'rule': 'cfgpp'},
        {'rule': 'dynamic_threshold', 'dynamic_percentile': 50.0},
        {'schedule': 'cosine'},
        {'interval': (-3.0, 3.0)},
        {'schedule': 'linear'},
        {'schedule': 'power', 'schedule_power': 3.0},
        {'rule': 'tests.build_sampling_test:own_rule'},
        {'schedule': 'tests.build_sampling_test:own_schedule'},
    ],
    ids=str,
)
def test_each_choice_changes_the_images_and_not_those_of_weight_zero(plain, changes):
    named = {f'guidance__{key}': value for key, value in changes.items()}
    draw, config = drawing(changes.get('weak') == 'checkpoint', **named)
    x = draw(2.0)
    assert np.isfinite(x).all() and np.abs(x - plain[2.0]).max() > 1e-3 * np.abs(x).max()
    np.testing.assert_allclose(draw(0.0), plain[0.0], atol=1e-4 * np.abs(plain[0.0]).max())
    off = build_sampling.at_weight(config, 0.0)
    assert off is not config and off == build_sampling.at_weight(tiny.config(**FEW_STEPS), 0.0)


@pytest.mark.parametrize('weak', ['random_label', 'time'])
def test_image_i_is_the_same_image_in_any_batch(weak):
    changes = {'guidance__weak': weak, 'guidance__interval': (-3.0, 3.0), 'sample__sampler': 'ancestral'}
    whole, part = (drawing(indices=indices, **changes)[0](2.0) for indices in (range(6), (2, 3)))
    np.testing.assert_allclose(whole[2:4], part, rtol=1e-4, atol=1e-4)


def own_rule(strong, weak, weight):
    return strong + 2.0 * weight * (strong - weak)


def own_schedule(logsnr):
    return jnp.where(logsnr > 0, 2.0, 0.5)


def own_guidance(model, labels, weight, *, null_label, weak_model):
    return lambda z, logsnr: Prediction(model(z, logsnr, labels).eps - weight * weak_model(z, logsnr, labels).eps)


def test_a_guidance_of_ones_own_gets_the_weak_model():
    name = 'tests.build_sampling_test:own_guidance'
    draw, config = drawing(True, guidance__function=name, guidance__weak='checkpoint', guidance__weak_step=2)
    assert np.abs(draw(1.0) - draw(0.0)).max() > 1e-2
    assert build_sampling.at_weight(config, 0.0) is config  # what it does at w = 0 is its own business
    assert len(build_sampling.guidance_digest(config)) == 64


@pytest.mark.parametrize(
    ('labels', 'function', 'weak'),
    [
        ('classes', 'conditional', 'random_label'),
        ('classes', 'conditional', 'time'),
        ('none', 'unconditional', 'attention'),
    ],
)
def test_models_without_a_null_label_are_guided(labels, function, weak):
    draw, _ = drawing(model__labels=labels, loss__p_uncond=0.0, guidance__function=function, guidance__weak=weak)
    assert np.abs(draw(2.0) - draw(0.0)).max() > 1e-2


def test_identity_attention_is_the_value_projection():
    """Of a layer alone: x + out(v) for the flagged images; of the network: only their predictions change."""
    layer, x = blocks.SelfAttention(num_heads=2, num_groups=4), jax.random.normal(jax.random.key(0), (4, 4, 4, 8))
    params = jax.tree.map(lambda leaf: leaf + 0.3, layer.init(jax.random.key(1), x)['params'])
    flags = jnp.array([False, True, False, True])
    found = layer.apply({'params': params}, x, flags)
    np.testing.assert_allclose(found[::2], layer.apply({'params': params}, x)[::2], atol=1e-5)
    normed = blocks.GroupNorm(4).apply({'params': params['norm']}, x)
    values = (normed @ params['qkv']['kernel'] + params['qkv']['bias'])[..., 16:]
    expected = x + values @ params['out']['kernel'] + params['out']['bias']
    np.testing.assert_allclose(found[1::2], expected[1::2], rtol=1e-4, atol=1e-4)

    config = tiny.config()
    predict = build.model(config, random_params(config))
    z, logsnr = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.zeros(4)
    usual, flagged = predict(z, logsnr, LABELS[:4]).eps, predict(z, logsnr, LABELS[:4], identity_attention=flags).eps
    np.testing.assert_allclose(flagged[::2], usual[::2], atol=1e-5)
    assert float(jnp.abs(flagged - usual)[1::2].max()) > 1e-3


@pytest.mark.parametrize('prediction', ['eps', 'x', 'v'])
def test_a_network_told_another_time_is_read_at_its_own(prediction):
    """Only the network's input changes: x and v become eps at the λ of z."""
    config = tiny.config(diffusion__prediction=prediction, model__labels='none', loss__p_uncond=0.0)
    params = random_params(config)
    z, logsnr, told = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.zeros(4), jnp.full(4, 3.0)
    output = build.network(config).apply({'params': params}, z, told, None)
    expected = diffusion.network_eps(output, z, logsnr, prediction)
    np.testing.assert_allclose(
        build.model(config, params)(z, logsnr, None, network_logsnr=told).eps, expected, rtol=1e-5
    )


# ---------------------------------------------------------------- grids


def test_grids():
    def grid(**changes):
        config = tiny.config(sample__num_steps=9, **{f'sample__{key}': value for key, value in changes.items()})
        check_config(config)
        return np.asarray(build_sampling.sampling_logsnrs(config))

    np.testing.assert_allclose(grid(grid='logsnr'), np.linspace(-20, 20, 9))
    np.testing.assert_allclose(grid(grid='logsnr', logsnr_min=-6.0, logsnr_max=8.0), np.linspace(-6, 8, 9))
    np.testing.assert_allclose(grid(grid='karras'), schedules.karras_grid(9), atol=2e-3)
    ends = grid(grid='karras', logsnr_min=-5.0, logsnr_max=9.0, rho=3.0)
    np.testing.assert_allclose(ends[[0, -1]], [-5, 9], rtol=1e-5)
    adm = tiny.config(
        sample__num_steps=9, sample__grid='karras', diffusion__schedule='adm_linear', sample__sampler='heun',
        model__learn_variance=True,
    )  # fmt: skip
    check_config(adm)
    grid = np.asarray(build_sampling.sampling_logsnrs(adm))
    low, high = build.logsnr_range(adm)
    assert grid[0] >= -8.77 and low < grid[0] and abs(grid[-1] - high) < 1e-3


# ---------------------------------------------------------------- costs


def counted(config, weight=2.0):
    """Return the images that the network sees for one image drawn, counted at run time."""
    seen = []

    def model(z, logsnr, labels, **_):
        jax.debug.callback(lambda: seen.append(len(z)))
        return Prediction(z)

    config = build_sampling.at_weight(config, weight)
    keys = samplers.image_keys(0, jnp.arange(1))
    denoise = build_sampling.guide(config, model, jnp.zeros(1, jnp.int32), weight, keys=keys, weak_model=model)
    walk, _ = build_sampling.SAMPLERS[config.sample.sampler]
    options = build_sampling.sampler_options(config)
    walk(denoise, jnp.zeros((1, 8, 8, 1)), build_sampling.sampling_logsnrs(config), keys, **options).block_until_ready()
    jax.effects_barrier()
    return sum(seen)


@pytest.mark.parametrize(
    ('changes', 'weight', 'expected'),
    [
        ({}, 1.0, 24),
        ({}, 0.0, 12),
        ({'guidance__interval': (-2.0, 2.0)}, 1.0, 16),
        ({'sample__sampler': 'heun'}, 1.0, 46),
        ({'sample__sampler': 'heun', 'guidance__interval': (-2.0, 2.0)}, 1.0, 31),
        ({'guidance__weak': 'checkpoint', 'guidance__weak_step': 2}, 1.0, 24),
        ({'guidance__rule': 'apg', 'guidance__momentum': -0.5}, 1.0, 24),
        ({'guidance__function': 'conditional'}, 1.0, 12),
    ],
    ids=str,
)
def test_costs_are_those_of_the_program(changes, weight, expected):
    config = tiny.config(
        sample__num_steps=12, sample__grid='logsnr', sample__logsnr_min=-6.0, sample__logsnr_max=6.0, **changes
    )
    check_config(config)
    assert (
        build_sampling.count_evaluations(config, weight)['network_evaluations'] == expected == counted(config, weight)
    )


# ---------------------------------------------------------------- the weak model


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weak')
    for name, changes in {
        'run': {'train__keep_every': 2, 'train__keep_checkpoints': 1},
        'small': {'model__channels': 4, 'train__num_steps': 2},
    }.items():
        done = tiny.forked_main(*tiny.flags(**changes), '--mode=train', f'--workdir={folder / name}')
        assert done.returncode == 0, done.stderr
    return folder


def test_earlier_checkpoints_are_kept(workdirs):
    steps = {path.name for path in (workdirs / 'run' / 'checkpoints').iterdir() if path.name.isdigit()}
    assert steps == {'2', '4'}


def test_a_weak_model_may_be_smaller_earlier_or_not_averaged(workdirs):
    plain = trained.load(tiny.config(), workdirs / 'run')
    wanted = trained.Wanted(tuple(range(10)), 6, 3.0, 0.0)
    for changes in ({'weak_workdir': str(workdirs / 'small')}, {'weak_step': 2}, {'weak_ema': False}):
        named = {f'guidance__{key}': value for key, value in changes.items()}
        config = tiny.config(guidance__weak='checkpoint', **named)
        model = trained.with_helpers(dataclasses.replace(plain, config=config))
        assert model.weak.digest != model.digest and model.weak.step == (4 if 'weak_ema' in changes else 2)
        assert trained.identity(model, wanted) != trained.identity(plain, wanted)
        off = dataclasses.replace(wanted, weight=0.0)
        assert trained.identity(model, off) == trained.identity(plain, off)
    changed = tiny.config(guidance__weak='checkpoint', guidance__weak_ema=False, guidance__weak_conditional=False)
    again = trained.with_helpers(dataclasses.replace(plain, config=changed), former=model)
    assert again.weak is model.weak  # read once, with the labels or without
    classes = dataclasses.replace(model.weak, config=tiny.config(model__labels='classes', loss__p_uncond=0.0))
    with pytest.raises(UserError, match='has not learned a null label and can only be asked with the labels'):
        trained.with_helpers(
            dataclasses.replace(plain, config=changed), former=dataclasses.replace(model, weak=classes)
        )
    batches = trained.image_batches(config, None, model.weak, batch_size=6)
    drawn = {weight: next(batches(model.params, LABELS, weight, 0)) for weight in (0.0, 3.0, 9.0)}
    assert (drawn[9.0] != drawn[3.0]).any() and drawn[0.0].dtype == np.uint8


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({}, 'the parameters of the model itself, step 4, .*; set config.guidance.weak_workdir'),
        ({'weak_step': 3}, 'no checkpoint of step 3'),
        ({'weak_workdir': '/nowhere'}, 'no checkpoint in /nowhere'),
    ],
)
def test_a_weak_model_that_is_not_there(workdirs, changes, message):
    named = {f'guidance__{key}': value for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        trained.load(tiny.config(guidance__weak='checkpoint', **named), workdirs / 'run')


def test_a_weak_model_of_other_data(workdirs):
    config = tiny.config(
        guidance__weak='checkpoint', guidance__weak_workdir=str(workdirs / 'small'), data__image_size=4
    )
    with pytest.raises(
        UserError, match=r'config\.data\.image_size 8, the model has 4 \(config\.guidance\.weak_workdir\)'
    ):
        trained.load_weak(config, workdirs / 'run')


# ---------------------------------------------------------------- bad input


CONDITIONAL = {'loss__p_uncond': 0.0, 'guidance__function': 'conditional'}


@pytest.mark.parametrize(
    ('field', 'value', 'changes'),
    [
        ('guidance.rule', 'lineer', {}),
        ('guidance.rule', 'no_such_module:rule', {}),
        ('guidance.schedule', 'up', {}),
        ('guidance.weak', 'other', {}),
        ('guidance.interval', (3.0, -3.0), {}),
        ('guidance.interval', (-3.0,), {}),
        ('guidance.interval', (-30.0, 3.0), {}),
        ('guidance.interval', (1.0, 2.0), {}),
        ('guidance.interval', (0.005, 0.5), {}),  # its end is near a step, at 0
        ('guidance.interval', ('a', 'b'), {}),
        ('guidance.interval', ((1, 2), (3, 4)), {}),
        ('guidance.attention_resolutions', ([4],), {}),
        ('guidance.weak_workdir', 'runs/other', {}),
        ('guidance.weak_step', 2, {}),
        ('guidance.weak_step', -1, {'guidance__weak': 'checkpoint'}),
        ('guidance.weak_ema', False, {}),
        ('guidance.rule', 'cfgpp', {'sample__sampler': 'heun'}),
        ('guidance.rule', 'cfgpp', {'sample__sampler': 'unipc_2'}),
        ('guidance.function', 'unconditional', {'model__labels': 'classes', 'loss__p_uncond': 0.0}),
        ('guidance.weak', '', {'guidance__function': 'tests.build_sampling_test:own_guidance'}),
        ('guidance.weak', 'checkpoint', {'guidance__function': 'cfg_jax.guidance:conditional'}),
        ('sample.churn', 3.0, {}),
        ('sample.rho', 0.001, {'sample__grid': 'karras'}),
        ('sample.clip_percentile', 99.0, {'sample__clip_x': False}),
        ('train.keep_every', 3, {}),
        ('guidance.interval', (-11.0, 3.0), {'diffusion__schedule': 'adm_linear'}),
        ('guidance.attention_resolutions', (3,), {'guidance__weak': 'attention'}),
        ('guidance.attention_resolutions', (8, 2), {'guidance__weak': 'attention', 'model__channel_mult': (1, 2)}),
        ('guidance.function', 'classifier_free', {'model__labels': 'classes', 'loss__p_uncond': 0.0}),
        ('guidance.weak', 'null', {'model__labels': 'classes', **CONDITIONAL}),
        ('guidance.weak', 'random_label', {'model__labels': 'none', **CONDITIONAL}),
        ('guidance.weak', 'null', {'guidance__function': 'unconditional'}),
        ('guidance.rule', 'apg', {'guidance__function': 'conditional'}),
        ('guidance.momentum', float('nan'), {}),
        ('guidance.time_scale', float('inf'), {}),
        ('guidance.rescale_factor', 1.5, {}),
        ('guidance.dynamic_percentile', 101.0, {}),
        ('guidance.rule', 'apg', {'guidance__function': 'cfg_jax.guidance:conditional'}),
        ('guidance.weak', 'time', {'guidance__function': 'tests.build_sampling_test:own_guidance'}),
        ('sample.sampler', 'euler', {}),
        ('sample.grid', 'exp', {}),
        ('sample.rho', 0.0, {'sample__grid': 'karras'}),
        ('sample.logsnr_min', -5.0, {}),
        ('sample.logsnr_min', -25.0, {'sample__grid': 'logsnr'}),
        ('sample.churn', -1.0, {'sample__sampler': 'heun'}),
        ('sample.churn_interval', (2.0, 1.0), {'sample__sampler': 'heun'}),
        ('sample.clip_percentile', 120.0, {}),
        ('train.keep_every', -1, {}),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(field, value, changes):
    config = tiny.config(**{field.replace('.', '__'): value}, **changes)
    with pytest.raises(
        UserError, match=rf'^config\.{field} is {re.escape(repr(value))}; (it must be|allowed)[^\n]*\.$'
    ):
        check_config(config)


TABLE = {'diffusion__schedule': 'adm_linear'}


@pytest.mark.parametrize(('grid', 'most'), [('u', 1000), ('u_open', 999)])
def test_a_table_has_no_more_steps_than_timesteps(grid, most):
    for num_steps in (most, most + 1):
        config = tiny.config(**TABLE, sample__grid=grid, sample__num_steps=num_steps)
        if num_steps == most:
            check_config(config)
            assert (np.diff(build_sampling.sampling_logsnrs(config)) > 0).all()
            continue
        named = rf"^config\.sample\.num_steps is {num_steps}; it must be at most {most} on the grid '{grid}' "
        with pytest.raises(UserError, match=named):
            check_config(config)


def test_steps_that_float32_cannot_tell_apart_are_named():
    ends = {'sample__logsnr_min': 10.0, 'sample__logsnr_max': 10.0001}
    check_config(tiny.config(sample__grid='logsnr', **ends, sample__num_steps=10))
    with pytest.raises(UserError, match=r"num_steps is 256; it must be less: two steps of the grid 'logsnr' have the"):
        check_config(tiny.config(sample__grid='logsnr', **ends, sample__num_steps=256))


def test_a_grid_without_length_is_named():
    for changes in ({'sample__logsnr_min': 9.0, 'sample__logsnr_max': 8.0}, {'diffusion__logsnr_max': -9.0}):
        with pytest.raises(UserError, match=r"^the grid 'karras' would go from λ = .* \(config\.sample\.logsnr_min, "):
            check_config(tiny.config(sample__grid='karras', **changes))


def test_a_schedule_is_finite_beyond_its_ends():
    """Churn calls the network at λ below the grid's first."""
    config = tiny.config(guidance__schedule='power', guidance__schedule_power=2.5)
    weight = build_sampling.weight_function(config, 2.0)(jnp.array([-21.0, -20.01, 20.01]))
    np.testing.assert_allclose(weight, [0.0, 0.0, 7.0], atol=1e-3)


def test_two_functions_of_one_name_are_two():
    rule, schedule = (lambda strong, weak, weight: strong), (lambda logsnr: logsnr)
    names = build_sampling.given_function(rule, 'rule'), build_sampling.given_function(schedule, 'schedule')
    config = tiny.config(guidance__rule=names[0], guidance__schedule=names[1])
    assert build_sampling.own_functions(config) == {'rule': rule, 'schedule': schedule}
    assert len(build_sampling.guidance_digest(config)) == 64


def test_a_set_depends_on_what_is_read_alone():
    model = trained.Trained(tiny.config(), params=None, step=1, class_names=(), digest='a')
    wanted = trained.Wanted(tuple(range(10)), 6, 1.0, 0.0)

    def identity(**changes):
        return trained.identity(dataclasses.replace(model, config=tiny.config(**changes)), wanted)

    plain = identity()
    for unread in (
        {'guidance__rescale_factor': 0.1},
        {'sample__churn_noise': 2.0},
        {'guidance__time_scale': 3.0},
        {'sample__rho': 3.0},
    ):
        assert identity(**unread) == plain
    for read in (
        {'guidance__rule': 'rescale'}, {'guidance__interval': (-1.0, 2.0)}, {'sample__sampler': 'heun'},
        {'sample__grid': 'karras'},
        {'guidance__momentum': 0.1}, {'guidance__schedule': 'linear'}, {'sample__v': 0.7}, {'guidance__weak': 'time'},
    ):  # fmt: skip
        assert identity(**read) != plain
    rescale = identity(guidance__rule='rescale')
    assert identity(guidance__rule='rescale', guidance__rescale_factor=0.1) != rescale


def test_churns_calls_are_counted():
    """An interval's end lies between a step and the call after its noise is added."""
    changes = {'sample__sampler': 'heun', 'sample__churn': 20.0, 'guidance__interval': (-2.0, 2.0)}
    config = tiny.config(**{**FEW_STEPS, **changes, 'sample__num_steps': 12})
    found = build_sampling.count_evaluations(config, 2.0)['network_evaluations']
    assert found == counted(config)
