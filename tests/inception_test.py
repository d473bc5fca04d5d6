"""The judge of the papers against torch-fidelity's vectors, with random weights; and checks of its weights file."""

import contextlib
import hashlib
import io
import json
import re
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from cfg_jax.errors import UserError
from cfg_jax.evaluation import pretrained
from cfg_jax.evaluation.judges import inception
from tests.convert_test import relative_error, tensor, torch_legacy, torch_zip

DATA = Path(__file__).parent / 'data'
VECTORS = np.load(DATA / 'inception.npz')
RESOLUTIONS = (8, 32, 64, 299)


def drawn_state_dict():
    """Return random tensors of the public network: the ones that the reference vectors were computed with."""
    reference = json.loads((DATA / 'inception_shapes.json').read_text())

    def draw(name, shape):
        key = [reference['seed'], zlib.crc32(name.encode())]
        n = np.random.default_rng(key).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            return n * np.float32(1.4 / np.sqrt(np.prod(shape[1:])))
        if name.endswith('num_batches_tracked'):
            return np.zeros(shape, np.int64)
        if name.endswith('running_var'):
            return 1 + 0.1 * np.abs(n)
        return (1 if name.endswith('bn.weight') else 0) + 0.1 * n

    return {name: draw(name, shape) for name, shape in reference['shapes'].items()}


def saved(state_dict, path, legacy):
    """Write a state dict as torch.save would, and return the path."""
    tensors, storages = {}, {}
    for key, (name, array) in enumerate(state_dict.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        kind = 'Long' if array.dtype == np.int64 else 'Float'
        tensors[name] = tensor(str(key), array.size, array.shape, strides, kind=kind, legacy=legacy)
        storages[str(key)] = (array.size, array.tobytes()) if legacy else array.tobytes()
    path.write_bytes((torch_legacy if legacy else torch_zip)(tensors, storages))
    return path


@pytest.fixture(scope='module')
def state_dict():
    return drawn_state_dict()


@pytest.fixture(scope='module')
def judge(state_dict, tmp_path_factory):
    """Return the judge of a whole weights file, with two images per batch."""
    path = saved(state_dict, tmp_path_factory.mktemp('weights') / 'drawn.pth', legacy=False)
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, 'BATCH_SIZE', 2)
        judge = inception.open_judge(None, 10, weights=str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()  # 95 MB
    assert f'sha256 {digest}, not the published file' in printed.getvalue()
    assert judge.identity == f'inception:sha256:{digest[:16]}'
    return judge


# ---------------------------------------------------------------- the same numbers as the original


@pytest.mark.parametrize('resolution', RESOLUTIONS)
def test_the_outputs_are_the_originals(judge, resolution):
    """The relative error is below 1e-5; 1e-4 would be enough."""
    outputs = judge.apply(VECTORS[f'images_{resolution}'])
    for ours, name in zip(outputs, ('feat2048', 'featlogits_unbiased', 'spatial')):
        assert ours.dtype == np.float32
        assert relative_error(ours, VECTORS[f'{name}_{resolution}']) < 1e-5, name
    assert not judge.classes_are_labels


def test_an_images_outputs_do_not_depend_on_its_batch(judge):
    images = VECTORS['images_8']
    many = judge.apply(images[[0, 1, 1, 0, 1]])
    few = judge.apply(images[:1])
    assert [len(output) for output in many] == [5, 5, 5]
    for outputs, single in zip(many, few):
        np.testing.assert_allclose(outputs[[0, 3]], np.resize(single, (2, single.shape[1])), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(outputs[[1, 2]], outputs[[4, 4]], rtol=1e-5, atol=1e-5)
        assert np.abs(outputs[0] - outputs[1]).max() > 1e-2
    assert [output.shape for output in judge.apply(images[:0])] == [(0, 2048), (0, 1008), (0, 2023)]


@pytest.mark.parametrize('shape', [(1, 1), (7, 5), (299, 299), (310, 600)])
def test_resize_is_tensorflows_of_old(shape):
    """Output pixel i samples the input at i · size / 299, computed in float32 as TensorFlow does."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    ours = np.asarray(inception.preprocess(image[None]))[0]
    assert ours.dtype == np.float32
    assert ours.shape == (299, 299, 3)
    for i, j in ((0, 0), (298, 298), (1, 297), (150, 31)):
        y, x = (float(np.float32(i_j) * np.float32(size / 299)) for i_j, size in zip((i, j), shape))
        corners = [
            (1 - abs(y - row)) * (1 - abs(x - column)) * image[min(row, shape[0] - 1), min(column, shape[1] - 1)]
            for row in (int(y), int(y) + 1)
            for column in (int(x), int(x) + 1)
        ]
        np.testing.assert_allclose(ours[i, j], (sum(corners) - 128) / 128, atol=1e-5)
    if shape == (299, 299):
        np.testing.assert_array_equal(ours, (image.astype(np.float32) - 128) / 128)


def test_grey_images_are_taken_as_colour():
    grey = VECTORS['images_8'][..., :1]
    as_colour = inception.preprocess(np.repeat(grey, 3, axis=3))
    np.testing.assert_array_equal(inception.preprocess(grey), as_colour)


@pytest.mark.parametrize(
    'images',
    [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)],
    ids=['floats', 'NCHW', 'one image'],
)
def test_other_images_are_refused(judge, images):
    with pytest.raises(UserError, match=r'takes uint8 images \[N, H, W, 1 or 3\].*config\.eval\.judge'):
        judge.apply(images)


# ---------------------------------------------------------------- the weights file


def test_the_legacy_format_and_a_hash_in_the_name(state_dict, tmp_path):
    """The public file's format is read, without the unused bias and the tensors that count training batches."""
    used = {name: array for name, array in state_dict.items() if 'num_batches' not in name and name != 'fc.bias'}
    path = saved(used, tmp_path / 'drawn.pth', legacy=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(tmp_path / f'drawn-{digest[:8]}.pth')
    params, ours = inception.PUBLISHED.read(str(path), inception.problems, inception.inception_params)
    path.unlink()  # 95 MB
    assert ours == digest
    expected = inception.inception_params(state_dict)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(expected)))


def test_tensors_that_do_not_fit_are_named(state_dict):
    assert inception.problems(state_dict) == []
    name = 'Mixed_6d.branch7x7_2.bn.running_var'
    without = {key: array for key, array in state_dict.items() if key != name}
    for changed, problem in (
        (without, f'{name} is missing'),
        ({**state_dict, name: np.zeros(3, np.float32)}, rf'{name} has the shape \(3,\), not \(160,\)'),
        ({**state_dict, name: np.zeros(160, np.int64)}, f'{name} holds int64'),
        ({**state_dict, 'fc.weight': np.zeros((1000, 2048), np.float32)}, r'fc\.weight .* not \(1008, 2048\)'),
        ({**state_dict, 'AuxLogits.fc.weight': np.zeros(3)}, 'AuxLogits.fc.weight is not part of this network'),
    ):
        (found,) = inception.problems(changed)
        assert re.search(problem, found)


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('fc.weight', np.nan, r'fc\.weight holds NaN or infinity \(1 of its 2,064,384 numbers\)'),
        ('Mixed_6d.branch7x7_2.bn.running_var', -1.0, r'Mixed_6d\.branch7x7_2\.kernel holds NaN or infinity'),
    ],
    ids=['NaN', 'a negative variance'],
)
def test_weights_that_are_not_finite_are_named(state_dict, tmp_path, monkeypatch, name, value, message):
    changed = {**state_dict, name: np.array(state_dict[name])}
    changed[name].flat[5] = value
    (tmp_path / 'inception.pth').touch()
    monkeypatch.setattr(pretrained, 'load_openai_state_dict', lambda path: changed)
    with pytest.raises(UserError, match=rf'{message}.*these weights are damaged \(config\.eval\.inception_weights\)'):
        inception.open_judge(None, 10, weights=str(tmp_path / 'inception.pth'))


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('inception.pth', (DATA / 'classifier.pt').read_bytes(), r'not the network of .*: .*\.weight is missing'),
        ('inception.pth', b'<html>', 'cannot be read'),
        (
            inception.PUBLISHED.name,
            b'<html>',
            'checksum mismatch: .* begins with b7d082ee, but its name says 6726825d',
        ),
        ('inception.pth', None, 'No such file'),
    ],
    ids=['another network', 'not of torch', 'another hash', 'missing'],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        inception.open_judge(None, 10, weights=str(path))
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith('(config.eval.inception_weights).')
    assert str(caught.value).isprintable()


def test_without_a_path_the_error_says_where_to_get_it():
    with pytest.raises(
        UserError, match=rf'{inception.PUBLISHED.name} .*torch-fidelity .*config\.eval\.inception_weights'
    ):
        inception.open_judge(None, 10)
