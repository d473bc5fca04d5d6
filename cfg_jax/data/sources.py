"""Data sets as random-access sources.

A source has a length, gives example i as {'image': uint8 [H, W, C], 'label': int32 scalar}, and knows its
`class_names` and `image_shape`. It pickles, for Grain's workers.
"""

import importlib.util

import numpy as np

from cfg_jax.errors import UserError


class ArraySource:
    """A source over arrays in memory: images uint8 [N, H, W, C], labels int [N]."""

    def __init__(self, images, labels, class_names):
        self.images, self.labels, self.class_names = images, labels.astype(np.int32), tuple(class_names)
        self.image_shape = images.shape[1:]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': self.labels[index]}


def digits():
    """scikit-learn's digits: 1,797 handwritten digits of the UCI test set, 8x8x1, ten classes; nothing to download."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # 17 grey levels, 0 to 16
    return ArraySource(images, bunch.target, [str(name) for name in bunch.target_names])


class TfdsSource:
    """A TFDS data set that lies prepared as ArrayRecord, opened without TensorFlow. Nothing is ever downloaded."""

    def __init__(self, name, split, data_dir, image_shape):
        if importlib.util.find_spec('importlib_resources') is None:
            raise UserError('tensorflow-datasets needs importlib_resources: pip install importlib_resources.')
        import tensorflow_datasets as tfds

        try:
            self._source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
        except Exception as error:  # TFDS raises a different kind for each way of not being there
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f'no data set {name!r}, split {split!r}, prepared as ArrayRecord under '
                f'{data_dir or "~/tensorflow_datasets"} '
                f'(config.data.name, config.data.split, config.data.data_dir): {first_line}'
            ) from error
        self.class_names = tuple(self._source.dataset_info.features['label'].names)
        self.image_shape = tuple(image_shape)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        example = self._source[int(index)]
        if example['image'].shape != self.image_shape:
            raise UserError(
                f'image {index} has shape {example["image"].shape}, not {self.image_shape} '
                '(config.data.image_size, config.data.image_channels).'
            )
        if not 0 <= example['label'] < len(self.class_names):
            raise UserError(
                f'image {index} has label {example["label"]}; this split has no labels (config.data.split).'
            )
        return {'image': example['image'], 'label': np.int32(example['label'])}
