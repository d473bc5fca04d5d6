import csv
import io
import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cfg_jax import build
from cfg_jax.errors import UserError
from cfg_jax.jobs import inspect as inspect_job
from tests import tfds_layout, tiny


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Class folders of 30 cats of 20x30 and 10 dogs of 16x16."""
    root = tmp_path_factory.mktemp('pets')
    for name, count, (height, width) in (('cat', 30, (20, 30)), ('dog', 10, (16, 16))):
        (root / name).mkdir()
        for number in range(count):
            picture = tfds_layout.picture(number, width)[:height]
            Image.fromarray(picture).save(root / name / f'{number:02d}.png')
    return root


def config(folder, **changes):
    fields = {
        'data__source': 'folder',
        'data__data_dir': str(folder),
        'data__image_size': 16,
        'data__image_channels': 3,
        'data__num_classes': 2,
        'inspect__seconds': 0.2,
        **changes,
    }
    return tiny.config(**fields)


def test_inspect_says_what_a_folder_holds(folder, tmp_path, capsys):
    inspect_job.run(config(folder), tmp_path)
    printed = capsys.readouterr().out
    for line in ('40 images of 16x16x3, 2 classes', 'images a class: 10 to 30, median 20', 'images/s'):
        assert line in printed
    rows = list(csv.DictReader((tmp_path / 'inspect' / 'classes.csv').open()))
    assert rows == [{'label': '0', 'class': 'cat', 'images': '30'}, {'label': '1', 'class': 'dog', 'images': '10'}]

    summary = json.loads((tmp_path / 'inspect' / 'statistics.json').read_text())
    data = build.source(config(folder))
    pixels = data.batch(np.arange(40))['image'].reshape(-1, 3)
    np.testing.assert_allclose(summary['pixels']['mean'], pixels.mean(0))
    np.testing.assert_allclose(summary['pixels']['std'], pixels.std(0))
    assert summary['pixels']['min'] == pixels.min(0).tolist() and summary['pixels']['max'] == pixels.max(0).tolist()
    assert summary['pixels']['gray_images'] == 0 and summary['pixels']['images'] == 40
    assert summary['pipeline']['images_per_second'] > 0

    # ten rows of at most twelve images: five of each class, of which the dogs have ten images
    grid = Image.open(tmp_path / 'inspect' / 'images.png')
    assert grid.width > 12 * 32 and grid.height == pytest.approx((3 + 1) * 2 * 18, abs=8)
    assert Image.open(tmp_path / 'inspect' / 'statistics.png').width > 800


def test_the_rows_show_each_class_and_only_it(folder):
    data = build.source(config(folder))
    rows, names = inspect_job.class_rows(data, np.array([data.label(i) for i in range(40)]), seed=0)
    assert [len(row) for row in rows] == [12, 12, 6, 10] and names == ['0 cat', '', '', '1 dog']
    dogs = {data[i]['image'].tobytes() for i in range(30, 40)}
    assert {image.tobytes() for image in rows[3]} == dogs


@pytest.mark.filterwarnings('error::UserWarning')
def test_class_names_of_all_kinds(tmp_path):
    """Names may hold TeX, letters that fonts lack, control characters, and bytes that are not text."""
    root = tmp_path / 'Prices in $ and $ \\x'
    picture = io.BytesIO()
    Image.fromarray(tfds_layout.picture(0, 16)).save(picture, 'png')
    for name in (b'$\\frac{ $', '猫'.encode(), b'caf\xe9', b'a\x07'):
        folder = os.fsencode(root) + b'/' + name
        os.makedirs(folder)
        with open(folder + b'/1.png', 'wb') as file:
            file.write(picture.getvalue())
    inspect_job.run(config(root, data__num_classes=4), tmp_path)
    rows = list(csv.DictReader((tmp_path / 'inspect' / 'classes.csv').open()))
    assert [row['class'] for row in rows] == ['$\\frac{ $', 'a\x07', 'caf\\udce9', '猫']
    for name in ('statistics.png', 'images.png'):
        assert Image.open(tmp_path / 'inspect' / name).width > 100


@pytest.mark.parametrize('source', ['folder', 'tfds'])
def test_classes_without_images_are_named_once(tmp_path, capsys, source):
    if source == 'folder':
        Image.fromarray(tfds_layout.picture(0, 16)).save(tmp_path / '1.png')
        (tmp_path / 'labels.json').write_text('{"1.png": 1}')
    else:
        features = {'image': tfds.features.Image(shape=(16, 16, 3)), 'label': tfds.features.ClassLabel(num_classes=2)}
        examples = [{'image': tfds_layout.picture(0, 16), 'label': 1}]
        tfds_layout.write(tmp_path, 'mine', examples, version='1.0.0', features=features)
    name = '' if source == 'folder' else 'mine'
    inspect_job.run(config(tmp_path, data__source=source, data__name=name), tmp_path / 'runs')
    assert capsys.readouterr().out.count('1 of 2 classes have no images: 0\n') == 1


def test_a_split_without_labels(tmp_path):
    features = {'image': tfds.features.Image(shape=(16, 16, 3)), 'label': tfds.features.ClassLabel(num_classes=2)}
    examples = [{'image': tfds_layout.picture(0, 16), 'label': -1}]
    tfds_layout.write(tmp_path, 'unlabelled', examples, version='1.0.0', features=features)
    with pytest.raises(UserError, match=r'has label -1; allowed: 0 to 1\..*config\.data\.split'):
        inspect_job.run(config(tmp_path, data__source='tfds', data__name='unlabelled'), tmp_path / 'runs')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data__num_classes': 3}, r'has 2 classes, not 3 \(config\.data\.num_classes\)'),
        ({'data__data_dir': None}, r'config\.data\.data_dir is not set; give a folder'),
        ({'data__data_dir': '/nowhere'}, r'/nowhere.*config\.data\.data_dir'),
        ({'data__image_size': 32}, r'smaller than 32x32.*config\.data\.upsample'),
        ({'data__image_channels': 1}, r'has colour.*config\.data\.image_channels'),
        ({'data__resampling': 'nearest'}, r"config\.data\.resampling is 'nearest'; allowed: 'box'"),
        ({'data__image_channels': 2}, r'config\.data\.image_channels is 2; it must be 1 or 3'),
    ],
)
def test_a_folder_that_does_not_fit_the_config(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        inspect_job.run(config(folder, **changes), tmp_path)
    assert not (tmp_path / 'inspect').exists()


def test_small_images_are_enlarged_where_asked(folder):
    enlarged = build.source(config(folder, data__image_size=32, data__upsample=True))
    assert enlarged[0]['image'].shape == (32, 32, 3)
