import math
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax.models import blocks
from cfg_jax.models.unet import UNet

TINY = {'channels': 8, 'channel_mult': (1, 2), 'num_blocks': 1, 'attention_resolutions': (4,), 'num_groups': 4}


def shapes(module, size, labels=True):
    arguments = jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32) if labels else None
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


ADM = partial(UNet, attention_resolutions=(32, 16, 8))
SIZES = {
    64: partial(ADM, 192, (1, 2, 3, 4), 3, head_channels=64),
    128: partial(ADM, 256, (1, 1, 2, 3, 4), 2, num_heads=4),
    256: partial(ADM, 256, (1, 1, 2, 2, 4, 4), 2, head_channels=64),
}


@pytest.mark.parametrize(
    ('size', 'learned_variance', 'null_label'),
    [(64, 295_904_454, 295_900_035), (128, 421_529_606, 421_523_715), (256, 553_838_086, 553_832_195)],
)
def test_parameter_counts_are_adms(size, learned_variance, null_label):
    """To the parameter: ADM's own (six output channels, 1000 labels), and the paper's (three, and a null label)."""
    assert count(shapes(SIZES[size](num_labels=1000, out_channels=6), size)) == learned_variance
    assert count(shapes(SIZES[size](num_labels=1001, out_channels=3), size)) == null_label


@pytest.fixture(scope='module')
def random_net():
    """A tiny UNet with every parameter random, also those that training starts at zero."""
    module = UNet(**TINY, num_labels=11, out_channels=2, head_channels=8)
    random = np.random.default_rng(0)
    draw = lambda leaf: np.float32(0.2 * random.standard_normal(leaf.shape) + (leaf.ndim == 1))  # noqa: E731
    return module, jax.tree.map(draw, shapes(module, 8))


@partial(jax.jit, static_argnames=('module', 'train'))
def apply(module, params, z, logsnr, labels=None, *, train=False, seed=0):
    return module.apply(params, z, logsnr, labels, train=train, rngs={'dropout': jax.random.key(seed)})


Z = jax.random.normal(jax.random.key(1), (5, 8, 8, 3))
LOGSNR, LABELS = jnp.linspace(-20, 20, 5), jnp.arange(5)


def test_everything_matters(random_net):
    """The output depends on z, λ and the label of its own image, and on no other image."""
    module, params = random_net
    out = apply(module, params, Z, LOGSNR, LABELS)
    assert out.shape == (5, 8, 8, 2) and out.dtype == jnp.float32
    for changed in (
        (Z.at[2].add(0.1), LOGSNR, LABELS),
        (Z, LOGSNR.at[2].add(1.0), LABELS),
        (Z, LOGSNR, LABELS.at[2].set(10)),
    ):
        difference = jnp.abs(apply(module, params, *changed) - out).max((1, 2, 3))
        assert float(difference[2]) > 1e-4
        assert float(jnp.delete(difference, 2).max()) < 1e-5


def test_every_parameter_gets_a_gradient(random_net):
    module, params = random_net
    gradients = jax.grad(lambda p: jnp.square(apply(module, p, Z, LOGSNR, LABELS)).sum())(params)
    # a bias in front of a norm with one channel a group would be dead; these groups have two
    dead = [jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(gradients) if not jnp.abs(g).max() > 0]
    assert dead == []


@pytest.mark.slow
def test_remat_changes_no_number(random_net):
    module, params = random_net
    remat = module.clone(remat=True)
    assert jax.tree.structure(shapes(remat, 8)) == jax.tree.structure(params)

    def loss(module):
        return lambda p: jnp.square(apply(module, p, Z, LOGSNR, LABELS, train=True)).sum()

    plain, again = (jax.grad(loss(m.clone(dropout=0.3)))(params) for m in (module, remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), plain, again)


def test_remat_stores_less(random_net):
    """Bytes that the forward pass keeps for the backward pass (the leaves of what `jax.vjp` returns)."""

    def stored(remat):
        module = random_net[0].clone(remat=remat)
        arguments = jnp.zeros((8, 8, 8, 3)), jnp.zeros(8), jnp.zeros(8, jnp.int32)
        backward = jax.eval_shape(lambda p: jax.vjp(lambda p: module.apply(p, *arguments), p)[1], random_net[1])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    parameters = 4 * count(random_net[1])
    assert stored(True) - parameters < 0.3 * (stored(False) - parameters)


def test_bfloat16_is_close_and_parameters_stay_float32(random_net):
    module, params = random_net
    half = module.clone(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(half, 8))} == {jnp.dtype('float32')}
    out, exact = apply(half, params, Z, LOGSNR, LABELS), apply(module, params, Z, LOGSNR, LABELS)
    assert out.dtype == jnp.float32
    assert float(jnp.abs(out - exact).max() / jnp.abs(exact).max()) < 0.05


def test_the_untrained_output_is_zero():
    module = UNet(**TINY, num_labels=11)
    params = jax.jit(module.init)(jax.random.key(0), Z, LOGSNR, LABELS)
    assert float(jnp.abs(apply(module, params, Z, LOGSNR, LABELS)).max()) == 0


def plain_convolution(x, kernel, *options):
    return jax.lax.conv_general_dilated(x, kernel, *options, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@pytest.mark.parametrize(('size', 'options'), [(3, ((1, 1), 'SAME')), (1, ((1, 1), 'SAME')), (3, ((2, 2), 'VALID'))])
def test_convolutions_and_their_derivatives_are_lax(size, options):
    """All modes: values, gradients, directional derivatives, second derivatives, and gradients of each image alone."""
    random = np.random.default_rng(0)
    x, kernel, dx, dkernel = (
        jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in 2 * [(4, 6, 5, 3), (size, size, 3, 2)]
    )

    def derivatives(convolve):
        def total(x, kernel):
            return jnp.sin(convolve(x, kernel, *options)).sum()

        gradient = jax.grad(total, (0, 1))
        return (
            jax.jvp(lambda *operands: convolve(*operands, *options), (x, kernel), (dx, dkernel)),
            gradient(x, kernel),
            jax.jvp(gradient, (x, kernel), (dx, dkernel))[1],
            jax.grad(lambda x, kernel: jnp.vdot(gradient(x, kernel)[1], dkernel), (0, 1))(x, kernel),
            jax.vmap(lambda x: gradient(x[None], kernel))(x),
        )

    jax.tree.map(
        lambda ours, lax: np.testing.assert_allclose(ours, lax, rtol=1e-4, atol=1e-5),
        derivatives(blocks.convolve),
        derivatives(plain_convolution),
    )


def convolutions_axes(program):
    return set(re.findall(r'stablehlo\.convolution.*dim_numbers = (.*?),? window', program))


def test_gradients_convolve_in_the_order_that_cpus_compute_fast_in_loops(random_net):
    """In a loop XLA for CPUs computes convolutions of another order of the axes ten times as slowly, or worse."""
    module, params = random_net

    def gradients(params, z):
        return jax.grad(lambda *arguments: apply(module, *arguments, LOGSNR, LABELS).sum(), (0, 1))(params, z)

    program = jax.jit(gradients).lower(params, Z).as_text()
    assert convolutions_axes(program) == {'[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]'}


def test_dropout_is_flax_dropout():
    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            return blocks.Dropout(0.3)(x, train=True)

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.3, deterministic=False)(x)

    rngs = {'dropout': jax.random.key(3)}
    for dtype in (jnp.float32, jnp.bfloat16):
        ours, flax = (module().apply({}, Z.astype(dtype), rngs=rngs) for module in (Ours, Flax))
        assert ours.dtype == flax.dtype == dtype
        np.testing.assert_array_equal(ours, flax)


def test_dropout_only_in_training(random_net):
    module, params = random_net
    module = module.clone(dropout=0.5)
    first, second = (apply(module, params, Z, LOGSNR, LABELS, train=True, seed=seed) for seed in (0, 1))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(
        apply(module, params, Z, LOGSNR, LABELS), apply(random_net[0], params, Z, LOGSNR, LABELS)
    )


def test_without_labels():
    module = UNet(**TINY)
    params = jax.jit(module.init)(jax.random.key(0), Z, LOGSNR)
    assert 'label' not in params['params']
    assert apply(module, params, Z, LOGSNR).shape == Z.shape


def test_heads_by_number_are_heads_by_width(random_net):
    module, params = random_net  # 16 channels at the attention: two heads of eight
    by_number = module.clone(head_channels=None, num_heads=2)
    np.testing.assert_array_equal(apply(by_number, params, Z, LOGSNR, LABELS), apply(module, params, Z, LOGSNR, LABELS))


def test_the_number_of_heads(random_net):
    module, _ = random_net
    assert [module.num_heads_at(channels) for channels in (8, 16, 64)] == [1, 2, 8]
    assert module.clone(head_channels=None, num_heads=4).num_heads_at(16) == 4
    with pytest.raises(ValueError, match='12 channels do not divide into heads'):
        module.num_heads_at(12)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'num_heads': 3, 'head_channels': None}, 'heads'),
        ({'head_channels': 5}, 'heads'),
        ({'num_groups': 3}, 'groups'),
        ({'channel_mult': (1, 1, 1, 1, 1)}, 'halved'),
    ],
)
def test_sizes_that_do_not_fit(random_net, change, message):
    with pytest.raises(ValueError, match=message):
        shapes(random_net[0].clone(**change), 8)


def test_group_norm_against_its_definition():
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (4, 5, 6, 12))
    scale, shift = jax.random.normal(jax.random.key(1), (2, 4, 12))
    norm = blocks.GroupNorm(num_groups=3)
    params = {'params': {'scale': jnp.linspace(0.5, 2, 12), 'bias': jnp.linspace(-1, 1, 12)}}
    groups = np.float64(x).reshape(4, 30, 3, 4)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    expected = expected * params['params']['scale'] + params['params']['bias']
    np.testing.assert_allclose(norm.apply(params, x), expected, atol=2e-5)
    adaptive = expected * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(norm.apply(params, x, scale, shift), adaptive, atol=5e-5)


def test_resampling():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(blocks.downsample(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(blocks.downsample(blocks.upsample(x)), x)
    np.testing.assert_array_equal(blocks.upsample(x)[0, :2, :2, 0], 0)


def test_the_embedding_has_the_cosine_first():
    embedding = blocks.sinusoidal_embedding(jnp.array([0.0, 1.0, 500.0]), 8)
    np.testing.assert_allclose(embedding[0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(embedding[1, jnp.array([0, 1, 4])], [np.cos(1), np.cos(0.1), np.sin(1)], rtol=1e-5)
