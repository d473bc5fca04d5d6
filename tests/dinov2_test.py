"""The judge of FD-DINOv2 against vectors of the original network with random weights; and checks of its weights file.

`features_R` are the original's at full size. `tiny_R` are those of a network of width 32, two blocks and four heads,
computed in PyTorch by a program that gives the full-size vectors too.
"""

import contextlib
import hashlib
import io
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest

from cfg_jax.errors import UserError
from cfg_jax.evaluation import pretrained
from cfg_jax.evaluation.dinov2_network import DinoV2
from cfg_jax.evaluation.judges import dinov2
from tests.convert_test import relative_error
from tests.inception_test import saved

DATA = Path(__file__).parent / 'data'
VECTORS = np.load(DATA / 'dinov2.npz')
RESOLUTIONS = (28, 64, 224, 256)
REFERENCE = json.loads((DATA / 'dinov2_vitl14_shapes.json').read_text())
TINY = DinoV2(width=32, depth=2, heads=4)


def drawn_state_dict(width=1024, depth=24):
    """Return random tensors of the public network, or of a narrower one with fewer blocks."""
    scaled = {factor * 1024: factor * width for factor in (1, 3, 4)}

    def draw(name, shape):
        n = np.random.default_rng([REFERENCE['seed'], zlib.crc32(name.encode())]).standard_normal(shape)
        n = n.astype(np.float32)
        if name in ('pos_embed', 'cls_token', 'mask_token'):
            return np.float32(0.5) * n
        if len(shape) > 1:
            return n / np.float32(np.sqrt(np.prod(shape[1:])))
        is_gain = name.endswith('gamma') or ('norm' in name and name.endswith('weight'))
        return np.float32(is_gain) + np.float32(0.1) * n

    return {
        name: draw(name, [scaled.get(size, size) for size in shape])
        for name, shape in REFERENCE['shapes'].items()
        if not name.startswith('blocks.') or int(name.split('.')[1]) < depth
    }


@pytest.fixture(scope='module')
def state_dict():
    return drawn_state_dict(TINY.width, TINY.depth)


@pytest.fixture
def tiny(monkeypatch):
    """Put the tiny network in the place of the public one, with two images per batch."""
    monkeypatch.setattr(dinov2, 'NETWORK', TINY)
    monkeypatch.setattr(dinov2, 'BATCH_SIZE', 2)


@pytest.fixture
def judge(state_dict, tiny, tmp_path):
    path = saved(state_dict, tmp_path / dinov2.PUBLISHED.name, legacy=False)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        judge = dinov2.open_judge(None, 10, weights=str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f'judge  dinov2 of {path}, sha256 {digest}, not the published file' in printed.getvalue()
    assert judge.identity == f'dinov2:sha256:{digest[:16]}'
    return judge


# ---------------------------------------------------------------- the same numbers as the original


@pytest.mark.slow
def test_the_features_are_the_originals(monkeypatch, tmp_path):
    """Needs 6 GiB of memory."""
    drawn = drawn_state_dict()
    path = tmp_path / dinov2.PUBLISHED.name
    path.touch()
    monkeypatch.setattr(pretrained, 'load_openai_state_dict', lambda path: drawn)
    monkeypatch.setattr(dinov2, 'BATCH_SIZE', 2)
    judge = dinov2.open_judge(None, 10, weights=str(path))
    for resolution in RESOLUTIONS:
        features = judge.apply(VECTORS[f'images_{resolution}']).features
        assert features.dtype == np.float32
        assert relative_error(features, VECTORS[f'features_{resolution}']) < 1e-5


@pytest.mark.parametrize('resolution', RESOLUTIONS)
def test_a_tiny_networks_features_are_pytorchs(judge, resolution):
    features, logits, spatial = judge.apply(VECTORS[f'images_{resolution}'])
    assert relative_error(features, VECTORS[f'tiny_{resolution}']) < 1e-5
    assert logits is None and spatial is None and not judge.classes_are_labels


def test_an_images_features_do_not_depend_on_its_batch(judge):
    images = VECTORS['images_28']
    many, few = (judge.apply(images[chosen]).features for chosen in ([0, 1, 1, 0, 1], [0]))
    np.testing.assert_allclose(many[[0, 3]], few[[0, 0]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(many[[1, 2]], many[[4, 4]], rtol=1e-5, atol=1e-5)
    assert np.abs(many[0] - many[1]).max() > 1e-2
    assert judge.apply(images[:0]).features.shape == (0, 32)


def test_grey_images_are_taken_as_colour(judge):
    grey = VECTORS['images_28'][..., :1]
    expected = judge.apply(np.repeat(grey, 3, axis=3)).features
    np.testing.assert_allclose(judge.apply(grey).features, expected, rtol=1e-6, atol=1e-6)


def test_other_images_are_refused(judge):
    with pytest.raises(UserError, match=r"'dinov2' takes uint8 images \[N, H, W, 1 or 3\].*config\.eval\.judge"):
        judge.apply(np.zeros((2, 8, 8, 3), np.float32))


def test_cubic_resampling_keeps_constants_and_lines():
    matrix = dinov2.cubic_matrix(37, 16, 0.1)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    inside = slice(1, 15)  # the ends repeat the last input
    expected = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    assert np.abs(matrix @ np.arange(37.0) - expected)[inside].max() < 0.12  # Keys' a = -0.75 bends a line that much
    np.testing.assert_array_equal(dinov2.cubic_matrix(5, 5, 0), np.eye(5))


# ---------------------------------------------------------------- the weights file


def test_the_public_files_tensors_are_those_expected():
    """The shapes alone: arrays without memory of their own."""
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in REFERENCE['shapes'].items()}
    assert len(tensors) == 343 and dinov2.problems(tensors) == []
    assert dinov2.problems({**tensors, 'register_tokens': np.zeros(3)}) == [
        'register_tokens is not part of this network'
    ]
    name = 'blocks.23.mlp.fc1.weight'
    (found,) = dinov2.problems({**tensors, name: np.zeros((1024, 4096), np.float32)})
    assert found == f'{name} has the shape (1024, 4096), not (4096, 1024)'


def damaged(state_dict):
    name = 'blocks.1.ls2.gamma'
    return {**state_dict, name: np.full_like(state_dict[name], np.nan)}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (damaged, r'blocks\.1\.ls2\.gamma holds NaN or infinity \(32 of its 32 numbers\): these weights are damaged'),
        (lambda state_dict: {'a': np.zeros(3, np.float32)}, r'not the network of .* is missing'),
        (lambda state_dict: None, 'No such file'),
    ],
    ids=['NaN', 'another network', 'missing'],
)  # fmt: skip
def test_other_files_are_refused(state_dict, tiny, tmp_path, change, message):
    path = tmp_path / 'dinov2.pth'
    if (changed := change(state_dict)) is not None:
        saved(changed, path, legacy=False)
    with pytest.raises(UserError, match=f'^{re.escape(str(path))}: .*{message}') as caught:
        dinov2.open_judge(None, 10, weights=str(path))
    assert str(caught.value).endswith('(config.eval.dinov2_weights).')


def test_a_file_cut_short_is_refused(state_dict, tiny, tmp_path):
    path = saved(state_dict, tmp_path / 'dinov2.pth', legacy=False)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r'cannot be read: .*\(config\.eval\.dinov2_weights\)\.$'):
        dinov2.open_judge(None, 10, weights=str(path))


def test_without_a_path_the_error_says_where_to_get_it():
    with pytest.raises(UserError, match=r'download dinov2_vitl14_pretrain\.pth from .* \(config\.eval\.dinov2_weights'):
        dinov2.open_judge(None, 10)
