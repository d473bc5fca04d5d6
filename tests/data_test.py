import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image
from sklearn.datasets import load_digits

from cfg_jax.data import pipeline, sources
from cfg_jax.errors import UserError


class Numbered:
    """Source whose image i is filled with i, but for a bright left column."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        image = np.full((4, 4, 1), index, np.uint8)
        image[:, 0] = 255
        return {'image': image, 'label': np.int32(index)}


def labels_of(iterator, batches):
    return np.concatenate([next(iterator)['label'] for _ in range(batches)])


def make(**changes):
    return pipeline.train_batches(Numbered(), **{'batch_size': 10, 'seed': 0, 'flip': False, **changes})


def test_digits_are_sklearns():
    source, bunch = sources.digits(), load_digits()
    assert len(source) == 1797 and source.image_shape == (8, 8, 1) and source.class_names == tuple('0123456789')
    example = source[100]
    assert example['image'].dtype == np.uint8 and example['label'] == bunch.target[100]
    np.testing.assert_allclose(
        example['image'][..., 0] / 255 * 16, bunch.images[100], atol=0.04
    )  # half a grey level of 255
    assert source.images.max() == 255 and source.images.min() == 0


def test_each_epoch_sees_everything_once_in_another_order():
    iterator = make()
    first, second = labels_of(iterator, 5), labels_of(iterator, 5)
    np.testing.assert_array_equal(np.sort(first), np.arange(50))
    np.testing.assert_array_equal(np.sort(second), np.arange(50))
    assert not np.array_equal(first, second)


def test_the_order_depends_on_the_seed_alone():
    np.testing.assert_array_equal(labels_of(make(), 7), labels_of(make(num_threads=4), 7))
    assert not np.array_equal(labels_of(make(), 5), labels_of(make(seed=1), 5))


@pytest.mark.parametrize('reading', [{}, {'num_threads': 2}, {'num_workers': 1}], ids=str)
def test_the_position_resumes_whatever_reads(reading):
    """In the middle of an epoch, with random flips and crops; the first reader has neither threads nor workers."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(['pytest'])  # Grain's workers ask them
    iterator = make(flip=True, random_crop=True)
    labels_of(iterator, 3)
    assert iterator.position == 3
    expected = [next(iterator) for _ in range(4)]
    resumed = make(flip=True, random_crop=True, **reading)
    resumed.seek(3)
    for batch in expected:
        again = next(resumed)
        np.testing.assert_array_equal(again['image'], batch['image'])
        np.testing.assert_array_equal(again['label'], batch['label'])


def test_random_crops_keep_the_size_and_most_of_the_image():
    settings = {'batch_size': 400, 'seed': 0}
    images = next(pipeline.train_batches(sources.digits(), **settings))['image']
    crops = next(pipeline.train_batches(sources.digits(), random_crop=True, **settings))['image']
    assert crops.shape == images.shape and crops.dtype == np.uint8
    # a side of 7 or of 8 pixels, one as likely as the other; a crop of all 8 is the image itself
    changed = (images != crops).any((1, 2, 3))
    assert abs(changed.mean() - 0.5) < 4 * 0.5 / np.sqrt(400)
    similar = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images[changed], crops[changed])]
    assert np.median(similar) > 0.5


def test_processes_share_an_epoch():
    parts = [labels_of(make(batch_size=5, process_index=i, process_count=2), 5) for i in range(2)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(50))


def test_half_the_images_are_flipped():
    iterator = make(flip=True, batch_size=50)
    images = np.concatenate([next(iterator)['image'] for _ in range(20)])[..., 0]
    flipped = images[:, 0, -1] == 255
    np.testing.assert_array_equal(images[:, 0, 0] == 255, ~flipped)
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(1000)


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Ten 8x8 PNG images of two classes."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {'image': tfds.features.Image(shape=(8, 8, 3)), 'label': tfds.features.ClassLabel(names=['cat', 'dog'])}
            )
        )

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            # TFDS encodes PIL images without TensorFlow, arrays with it
            yield i, {'image': Image.fromarray(np.full((8, 8, 3), i, np.uint8)), 'label': i % 2}


def test_a_tfds_data_set_is_read_without_tensorflow(tmp_path):
    TinyImages(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    source = sources.TfdsSource('tiny_images', 'train', str(tmp_path), (8, 8, 3))
    assert len(source) == 10 and source.class_names == ('cat', 'dog')
    seen = sorted((int(source[i]['image'][0, 0, 0]), int(source[i]['label'])) for i in range(10))
    assert seen == [(i, i % 2) for i in range(10)]
    assert 'tensorflow' not in sys.modules
    with pytest.raises(UserError, match=r'shape \(8, 8, 3\), not \(16, 16, 3\)'):
        sources.TfdsSource('tiny_images', 'train', str(tmp_path), (16, 16, 3))[0]


def test_a_data_set_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no data set 'imagenet_resized/64x64'.*config\.data\.data_dir"):
        sources.TfdsSource('imagenet_resized/64x64', 'train', str(tmp_path), (64, 64, 3))
