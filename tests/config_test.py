import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import build, build_sampling
from cfg_jax.checks import check_config
from cfg_jax.config import default, imagenet, needs_much_memory, of_saved
from cfg_jax.errors import UserError
from tests import tiny

CONFIGS = sorted(path.stem for path in (tiny.ROOT / 'configs').glob('*.py'))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_only_overrides_the_default(name):
    config, every = tiny.load_config(name), default()
    assert config.to_dict().keys() == every.to_dict().keys()
    for section, fields in every.to_dict().items():
        if isinstance(fields, dict):
            assert config[section].to_dict().keys() == fields.keys()
    check_config(config)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_says_how_to_use_it(name):
    text = (tiny.ROOT / 'configs' / f'{name}.py').read_text().split('"""')[1]
    assert f'python -m cfg_jax.main --config=configs/{name}.py' in text
    assert 'Hardware:' in text and 'Expect' in text and 'TODO' not in text


PARAMETERS = {
    'imagenet64': 295_900_035,
    'imagenet128': 421_523_715,
    'imagenet256': 553_832_195,
    'adm64': 295_904_454,
    'adm128': 421_529_606,
    'adm256': 553_838_086,
    'imagenet64_classifier': 65_438_568,
    'imagenet128_classifier': 42_568_040,
    'imagenet256_classifier': 54_096_360,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameter_counts_are_the_originals(name):
    config = tiny.load_config(name)
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]


# So shrunk they are much as others here, or other tests run them.
# Here they are only traced, which shows wrong shapes and options; `-m slow` compiles and runs them as well.
TRACED = ('adm256_uncond', 'imagenet128', 'imagenet128_classifier', 'imagenet256_classifier')
LIKE_OTHERS = ('adm128', 'adm256', 'digits', 'digits_classifier', 'folder', 'imagenet64', 'imagenet256')


@pytest.mark.parametrize(
    ('name', 'compiled'),
    [
        *(pytest.param(name, False, id=f'{name}, traced') for name in TRACED),
        *(
            pytest.param(name, True, id=name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS + TRACED))
            for name in CONFIGS
            if name != 'mixture2d'
        ),
    ],
)
def test_a_shrunk_config_trains_a_step_and_samples(name, compiled):
    """One narrow level of one block (adm64: with attention), small images, few steps; the rest of the config stays."""
    config = tiny.load_config(name)
    with config.unlocked():
        config.model.channels = 8
        # A level takes half of the time to compile, and the tests of models have more of them.
        config.model.channel_mult = (1,)
        config.model.num_groups = 4
        config.model.num_blocks = 1
        config.model.num_heads = min(config.model.num_heads, 2)
        if config.model.head_channels is not None:
            config.model.head_channels = 4
        config.data.image_size = 8
        config.model.attention_resolutions = (8,) if name == 'adm64' else ()
        config.train.batch_size = 8
        config.sample.num_steps = 2
    check_config(config)
    shape = build.image_shape(config)
    batch = {
        'image': np.random.default_rng(0).integers(0, 256, (8, *shape), dtype=np.uint8),
        'label': np.arange(8, dtype=np.int32) % config.data.num_classes,
    }

    # Random everywhere: compiling the real initialisation would take as long as compiling the step.
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.float32(0.1 * random.standard_normal(leaf.shape)), shapes)
    before, train_step = build.first_state(config, params), build.train_step(config)
    if not compiled:
        after, metrics = jax.eval_shape(train_step, before, batch, jax.random.key(1))
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before) and metrics['loss'].shape == ()
        if config.model.kind == 'unet':
            arguments = after.ema_params, 0, jnp.arange(2), jnp.arange(2), 1.0
            assert jax.eval_shape(build_sampling.sampler(config), *arguments).shape == (2, *shape)
        return
    after, metrics = jax.jit(train_step)(before, batch, jax.random.key(1))
    assert np.isfinite(metrics['loss']) and metrics['grad_norm'] > 0
    changed = [bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params))]
    assert any(changed)
    if config.model.kind == 'classifier':
        assert metrics['quarter_correct'].shape == (4,)
        return
    arguments = after.ema_params, 0, jnp.arange(2), jnp.arange(2), 1.0
    if not name.endswith(('digits', '64')):  # the larger ones, so shrunk, sample as the 64s do: only traced
        assert jax.eval_shape(build_sampling.sampler(config), *arguments).shape == (2, *shape)
        return
    x = jax.jit(build_sampling.sampler(config))(*arguments)
    assert x.shape == (2, *shape) and float(jnp.abs(x).max()) <= 1


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('loss.p_uncond', 1.5),
        ('model.dropout', 1.0),
        ('model.num_groups', 3),
        ('sample.v', -0.1),
        ('sample.eta', 2.0),
        ('optim.weight_decay', 0.1),
        ('optim.decay', 'square'),
        ('train.log_every', 0),
        ('eval.nearest_k', 0),
        ('eval.coverage_k', 0),
        ('eval.split_images', 0),
        ('eval.num_samples', 3),
        ('eval.bound_evaluations', 0),
        ('eval.bound_logsnr_max', -20.0),
        ('eval.bound_logsnr_max', float('inf')),
        ('eval.guidance_weights', ()),
        ('eval.guidance_weights', (0.0, float('nan'))),
        ('sample.guidance_weight', float('inf')),
        ('sample.seed', -1),
        ('seed', 2**32),
        ('model.num_heads', 3),
        ('model.head_channels', 5),
        ('model.num_groups', 0),
        ('model.channels', 0),
        ('model.channel_mult', (0,)),
        ('model.attention_resolutions', (5,)),
        ('model.learn_variance', True),
        ('model.labels', 'some'),
        ('optim.learning_rate', -1.0),
        ('optim.clip_norm', -1.0),
        ('optim.b1', 2.0),
        ('sample.spacing', 'ddim25'),
        ('diffusion.logsnr_min', 30.0),
        ('model.dtype', 'float16'),
        ('plan.utilisation', 0.0),
        ('plan.price', -1.0),
    ],
)
def test_a_wrong_value_is_named(field, value):
    config = tiny.config(**{field.replace('.', '__'): value})
    with pytest.raises(UserError, match=rf'config\.{field} is {re.escape(repr(value))}; (it must be|allowed)'):
        check_config(config)


def test_a_saved_config_knows_older_names_and_newer_fields():
    found = of_saved({'eval': {'judge': 'digits'}, 'train': {'num_steps': 7}})
    assert (found.eval.judge, found.train.num_steps) == ('trained', 7)
    assert found.eval.coverage_k == default().eval.coverage_k


def test_what_needs_much_memory():
    """The digits' training step has 25 MB of temporary memory, which malloc keeps anyway."""
    digits = tiny.config()
    digits.train.batch_size, digits.data.image_size, digits.model.channels = 64, 8, 16
    assert not needs_much_memory(digits)
    assert needs_much_memory(imagenet(64))
