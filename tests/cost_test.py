"""What the config switches off costs nothing in the program that is compiled.

Most tests count FLOPs before XLA optimises, which never adds any: XLA's own count of the lowered program, or, where a
scan's turns matter, the products counted from their shapes. Tests of single operations count the compiled program's.
"""

import functools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfg_jax import build, build_sampling, guidance, losses, trained
from cfg_jax.config import default
from cfg_jax.denoisers import Stateful, Switched
from cfg_jax.diffusion import Prediction
from cfg_jax.training import optim
from tests import tiny

product_flops = runpy.run_path(str(tiny.ROOT / 'benchmarks' / 'accelerator_parts.py'))['product_flops']
BATCH, STEPS = 6, 12
LABELS = np.arange(BATCH, dtype=np.int32)
# Settings under which a field that is off by default would show, and its value when on.
ON = {
    'model.learn_variance': ({'diffusion__schedule': 'adm_cosine'}, True),
    'model.attention_resolutions': ({}, (8,)),
    'model.dropout': ({}, 0.5),
    'model.remat': ({}, True),
    'model.guidance_input': ({}, True),
    'train.accumulation_steps': ({}, 2),
    'loss.weighting': ({}, 'sigmoid'),
    'loss.guided': ({'model__guidance_input': True}, 'gft'),
    'optim.ema_lengths': ({}, (0.05, 0.1)),
}
# Fields that are off by default and that this file, or no program, has to do with.
TESTED = {
    *ON,
    *('optim.weight_decay', 'optim.clip_norm', 'optim.ema_decay', 'optim.warmup_steps', 'loss.p_uncond'),
    *('guidance.weak', 'guidance.apg_norm_threshold', 'guidance.momentum', 'guidance.interval', 'guidance.schedule'),
    *('guidance.classifier_workdir', 'guidance.classifier_weight', 'guidance.clip_first'),
    *('sample.eta', 'sample.churn', 'sample.clip_percentile', 'train.fsdp'),
}
NO_SWITCH = {
    'loss.low_discrepancy': 'another way to draw the same numbers',
    'optim.decay': 'one number a step',
    'optim.ema_snapshot_every': 'no program',
    'train.keep_every': 'no program',
    'guidance.function': 'a choice',
    'guidance.weak_workdir': 'a place',
    'guidance.attention_resolutions': 'all of them, for one weak prediction',
    'guidance.apg_eta': 'a factor',
    'sample.spacing': 'a choice of steps',
    'sample.churn_interval': 'all steps',
    'sample.labels': 'all labels',
    'sample.seed': 'a number',
}


def test_every_field_that_is_off_is_looked_at():
    config, found = default().to_dict(), set()
    for section in ('model', 'loss', 'optim', 'train', 'guidance', 'sample'):
        for name, value in config[section].items():
            if value in (False, '', (), 'constant') or (isinstance(value, int | float) and value == 0):
                found.add(f'{section}.{name}')
    assert found <= TESTED | NO_SWITCH.keys()


def shapes_of(config):
    return jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))


def compiled_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis().get('flops', 0.0)


# ---------------------------------------------------------------- training


@functools.cache
def traced_step(**changes):
    """Return the training step of the tiny config, traced."""
    config = tiny.config(**changes)

    def init():
        return build.first_state(config, build.init_params(config, jax.random.key(0)))

    images = jax.ShapeDtypeStruct((config.train.batch_size, *build.image_shape(config)), np.uint8)
    batch = {'image': images, 'label': jax.ShapeDtypeStruct(images.shape[:1], np.int32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(build.train_step(config)).trace(jax.eval_shape(init), batch, key)


def primitives(jaxpr):
    """Return the names of all primitives of a jaxpr, each as often as it occurs."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        for value in equation.params.values():
            inner = getattr(value, 'jaxpr', value)
            found += primitives(inner) if hasattr(inner, 'eqns') else []
    return found


@pytest.mark.parametrize('field', ON)
def test_a_training_step_is_cheaper_without(field):
    others, value = ON[field]
    off, on = traced_step(**others), traced_step(**others, **{field.replace('.', '__'): value})
    costs = [
        (
            traced.lower().cost_analysis()['flops'],
            product_flops(traced.jaxpr.jaxpr),
            len(primitives(traced.jaxpr.jaxpr)),
        )
        for traced in (off, on)
    ]
    if field == 'train.accumulation_steps':  # the same products, in a loop of which XLA counts one turn
        assert costs[0][1] == costs[1][1] and costs[0][2] < costs[1][2]
    else:
        assert costs[0][0] < costs[1][0] and costs[0][1] <= costs[1][1]


def test_the_plain_step_has_no_loop_no_recomputation_and_three_draws():
    """Draws: of u, eps and the dropped labels."""
    found = primitives(traced_step().jaxpr.jaxpr)
    assert not {'checkpoint', 'remat2', 'sharding_constraint', 'shard_map'} & set(found)
    assert found.count('random_bits') == 3
    assert primitives(traced_step(model__dropout=0.5).jaxpr.jaxpr).count('random_bits') > 3
    assert primitives(traced_step(train__accumulation_steps=2).jaxpr.jaxpr).count('scan') == found.count('scan') + 1


def test_a_network_without_dropout_is_the_same_program_in_training():
    config = tiny.config()
    z = jax.ShapeDtypeStruct((BATCH, *build.image_shape(config)), np.float32)

    def program(dropout, train):
        network = build.network(tiny.config(model__dropout=dropout))
        apply = functools.partial(network.apply, train=train, rngs={'dropout': jax.random.key(0)})
        arguments = {'params': shapes_of(config)}, z, jax.ShapeDtypeStruct((BATCH,), np.float32), LABELS
        return jax.jit(apply).lower(*arguments).as_text()

    plain = program(0.0, False)
    assert program(0.0, True) == program(0.5, False) == plain != program(0.5, True)


PARAMS = {'a': jnp.ones((64, 64)), 'b': jnp.ones(64)}
NUMBERS = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))


def update_flops(optimizer):
    return compiled_flops(optimizer.update, PARAMS, jax.eval_shape(optimizer.init, PARAMS), PARAMS)


def test_clipping_and_decay_that_are_off_are_not_computed():
    plain = update_flops(optax.adam(1e-3))
    make = functools.partial(optim.make_optimizer, optim.learning_rate(1e-3))
    assert update_flops(make()) == pytest.approx(plain, abs=8)
    assert update_flops(make(name='adamw')) == pytest.approx(plain, abs=8)
    assert update_flops(make(clip_norm=1.0)) > plain + 2 * NUMBERS
    assert update_flops(make(name='adamw', weight_decay=0.1)) >= plain + NUMBERS


def test_a_rate_that_is_constant_costs_nothing():
    assert compiled_flops(optim.learning_rate(1e-3), 5) == 0
    assert compiled_flops(optim.learning_rate(1e-3, warmup_steps=10), 5) > 0


def test_clipping_can_be_switched_on_when_a_run_is_resumed():
    states = [optim.make_optimizer(1e-3, clip_norm=norm).init(PARAMS) for norm in (0.0, 1.0)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_an_average_costs_three_operations_a_parameter_at_most():
    """Also at a decay of 0: the state keeps its copy of the parameters."""
    for decay in (0.0, 0.9999):
        flops = compiled_flops(functools.partial(optim.ema, decay=decay), PARAMS, PARAMS)
        assert flops <= 3 * NUMBERS


def test_labels_that_are_never_dropped_cost_a_trifle():
    drop = functools.partial(losses.drop_labels, null_label=10)
    key = jax.random.key(0)
    never, sometimes = (
        compiled_flops(lambda key, labels, p=p: drop(key, labels, p_uncond=p), key, LABELS) for p in (0.0, 0.1)
    )
    assert never <= sometimes < 1e-3 * traced_step().lower().cost_analysis()['flops']


# ---------------------------------------------------------------- sampling


def traced_sampler(config, weight=1.0, classifier=None):
    """Return the sampler that draws at this weight, traced, for a batch of `BATCH`."""
    config = build_sampling.at_weight(config, weight)
    arguments = [shapes_of(config), np.uint32(0), np.arange(BATCH), LABELS, np.float32(weight)]
    arguments += [shapes_of(classifier), np.float32(1.0)] if classifier else []
    return jax.jit(build_sampling.sampler(config, classifier)).trace(*arguments)


def on_grid(**changes):
    """Return the tiny config with 12 steps at λ from -6 to 6."""
    grid = {'sample__grid': 'logsnr', 'sample__logsnr_min': -6.0, 'sample__logsnr_max': 6.0}
    return tiny.config(sample__num_steps=STEPS, **grid, **changes)


@functools.cache
def evaluation_products(count):
    """Return the FLOPs of products of one evaluation of the network, of `count` images."""
    config = tiny.config()
    z = jax.ShapeDtypeStruct((count, *build.image_shape(config)), np.float32)
    vectors = [jax.ShapeDtypeStruct((count,), kind) for kind in (np.float32, np.int32)]
    apply = jax.jit(lambda params, *inputs: build.network(config).apply({'params': params}, *inputs))
    return product_flops(apply.trace(shapes_of(config), z, *vectors).jaxpr.jaxpr)


@pytest.mark.parametrize(
    ('changes', 'weight', 'doubled'),
    [
        ({}, 1.0, STEPS),
        ({}, 0.0, 0),
        ({'guidance__function': 'conditional'}, 1.0, 0),
        ({'guidance__weak': 'attention', 'guidance__rule': 'apg', 'guidance__momentum': -0.5}, 0.0, 0),
        ({'guidance__interval': (-2.0, 2.0)}, 1.0, 4),
        ({'guidance__interval': (-2.0, 2.0)}, 0.0, 0),
        ({'guidance__interval': (50.0, 60.0)}, 1.0, 0),
        ({'guidance__interval': (-100.0, 100.0)}, 1.0, STEPS),
    ],
    ids=str,
)
def test_only_guided_steps_evaluate_the_network_twice(changes, weight, doubled):
    found = product_flops(traced_sampler(on_grid(**changes), weight).jaxpr.jaxpr)
    single, double = evaluation_products(BATCH), evaluation_products(2 * BATCH)
    assert found == doubled * double + (STEPS - doubled) * single


def test_without_guidance_the_program_is_the_conditional_one():
    texts = {
        traced_sampler(config, weight).lower().as_text()
        for config, weight in (
            (tiny.config(), 0.0),
            (tiny.config(guidance__function='conditional'), 1.0),
            (tiny.config(guidance__interval=(-2.0, 2.0), guidance__rule='rescale'), 0.0),
        )
    }
    assert len(texts) == 1


def test_the_compiled_sampler_computes_little_but_the_network():
    """XLA counts one turn of the loop, which is one step: at w = 0 of the batch, else of twice the batch."""
    config = tiny.config()
    plain, guided = (traced_sampler(config, weight).lower().compile().cost_analysis()['flops'] for weight in (0.0, 1.0))
    assert 1.8 < guided / plain < 2.05
    z = jnp.zeros((BATCH, *build.image_shape(config)))
    network = jax.jit(lambda params: build.network(config).apply({'params': params}, z, jnp.zeros(BATCH), LABELS))
    assert plain < 1.1 * network.lower(shapes_of(config)).compile().cost_analysis()['flops']


def test_a_plain_denoiser_has_no_memory_and_no_switch():
    config = tiny.config()

    def kind(**changes):
        model = lambda z, logsnr, labels: Prediction(z)  # noqa: E731
        return build_sampling.guide(tiny.config(**changes), model, LABELS, 1.0)

    assert not isinstance(kind(), Stateful | Switched)
    assert isinstance(kind(guidance__momentum=-0.5), Stateful)
    assert isinstance(kind(guidance__interval=(-1.0, 1.0)), Switched)
    assert build_sampling.weight_function(config, 1.0) == 1.0  # no schedule


@pytest.mark.parametrize(
    ('sampler', 'on', 'draws'),
    [
        ('ddim', {'sample__eta': 1.0}, 1),
        ('heun', {'sample__churn': 40.0}, 1),
        ('dpmpp_2m', {}, 1),
        ('ancestral', {}, 2),
    ],
)
def test_a_sampler_without_noise_draws_the_start_alone(sampler, on, draws):
    found = primitives(traced_sampler(tiny.config(sample__sampler=sampler), 0.0).jaxpr.jaxpr)
    assert found.count('random_bits') == draws
    if on:
        noisy = primitives(traced_sampler(tiny.config(sample__sampler=sampler, **on), 0.0).jaxpr.jaxpr)
        assert noisy.count('random_bits') > draws


def test_no_limit_of_x_is_not_computed():
    flops = [
        traced_sampler(tiny.config(**changes), 0.0).lower().cost_analysis()['flops']
        for changes in ({'sample__clip_x': False}, {}, {'sample__clip_percentile': 99.5})
    ]
    assert flops == sorted(set(flops))


def test_no_largest_norm_is_not_computed():
    difference = jnp.ones((BATCH, 8, 8, 1))
    off, on = (
        compiled_flops(functools.partial(guidance.project_difference, norm_threshold=norm), difference, difference)
        for norm in (0.0, 1.0)
    )
    assert on > off + 2 * difference.size


# ---------------------------------------------------------------- a classifier


def classifier_config():
    return tiny.config(model__kind='classifier', loss__p_uncond=0.0, loss__low_discrepancy=False)


def test_a_classifier_costs_where_it_guides():
    config = tiny.config()
    without, with_it = (
        product_flops(traced_sampler(config, 0.0, classifier).jaxpr.jaxpr) for classifier in (None, classifier_config())
    )
    assert without == config.sample.num_steps * evaluation_products(BATCH) < with_it


@pytest.mark.parametrize('clip_first', [False, True])
def test_a_classifier_of_weight_0_is_not_computed(monkeypatch, clip_first):
    """From the jobs, whose program has no classifier then, and from a denoiser in Python."""
    asked = []

    def sampler(config, classifier=None, weak=None):
        asked.append(classifier)
        return lambda params, seed, indices, *_: jnp.zeros((len(indices), 8, 8, 1))

    monkeypatch.setattr(build_sampling, 'sampler', sampler)
    config = tiny.config(guidance__classifier_workdir='somewhere', guidance__clip_first=clip_first)
    guide = trained.Trained(classifier_config(), params={}, step=1, class_names=(), digest='a')
    batches = trained.image_batches(config, guide, batch_size=BATCH)
    for weight in (0.0, 0.0, 2.0, 3.0):
        next(batches({}, LABELS, 1.0, 0, weight))
    assert asked == [None, guide.config]
    counts = [build_sampling.count_evaluations(config, 1.0, weight)['classifier_gradients'] for weight in (0.0, 2.0)]
    assert counts == [0, config.sample.num_steps]

    def refuse(*_):
        raise AssertionError('the classifier was asked')

    z, params = jnp.zeros((BATCH, 8, 8, 1)), shapes_of(config)
    draw = lambda params: build_sampling.denoiser(config, params, LABELS, 0.0, refuse, 0.0)(z, jnp.zeros(BATCH))  # noqa: E731
    jax.eval_shape(draw, params)
