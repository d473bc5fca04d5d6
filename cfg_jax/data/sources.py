"""Data sets as random-access sources of labelled images of one size."""

import importlib.util
import os
import re

import numpy as np

from cfg_jax.data import images, records
from cfg_jax.data.preparing import archives, raw_images
from cfg_jax.errors import UserError, first_line, printable, unusable
from cfg_jax.files import composed

_IDX = 'the folder of train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz'
# The archive from which --mode=prepare makes each data set, by the beginning of its name
_ARCHIVES = {
    'cifar10': 'cifar-10-python.tar.gz',
    'imagenet_resized': 'the folder of Imagenet64_train_part1_npz.zip and Imagenet64_train_part2_npz.zip',
    'imagenet2012': 'ILSVRC2012_img_train.tar',
    'mnist': _IDX,
    'fashion_mnist': f'{_IDX}, which is /usr/share/datasets/fashion-mnist after apt-get install dataset-fashion-mnist',
    'kmnist': _IDX,
    'emnist': 'the folder of emnist-*-images-idx3-ubyte.gz and emnist-*-labels-idx1-ubyte.gz',
}
# The fields to change if an image cannot be used as it is
_FIELDS = {
    images.TooSmall: 'config.data.image_size, config.data.upsample',
    images.HasColour: 'config.data.image_channels',
}


class Source:
    """A sequence of labelled images of one size. It pickles, for Grain's workers, and threads may share it.

    class_names: tuple of str, the name of each label. image_shape: (H, W, C) of every image.
    """

    def __len__(self):
        raise NotImplementedError

    def import_readers(self):
        """Import everything that `batch` needs; each process calls this once, before it starts reading threads.

        Threads that import for the first time, several of them at once, can wait for each other for ever.
        """

    def order_classes(self, class_names):
        """Label the classes in this order, if the source has just these classes and an order of its own making."""

    def batch(self, indices):
        """Return {'image': uint8 [b, H, W, C], 'label': int32 [b]}, new arrays that the caller may change.

        indices: int [b].
        """
        raise NotImplementedError

    def label(self, index):
        """Return the label of one image, an int, without decoding the image."""
        raise NotImplementedError

    def __getitem__(self, index):
        return {key: values[0] for key, values in self.batch(np.array([index])).items()}


class ArraySource(Source):
    """A source of arrays in memory: images uint8 [N, H, W, C], labels int [N]."""

    def __init__(self, images, labels, class_names):
        self.images, self.labels, self.class_names = images, labels.astype(np.int32), tuple(class_names)
        self.image_shape = images.shape[1:]

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return {'image': self.images[indices], 'label': self.labels[indices]}

    def label(self, index):
        return int(self.labels[index])


def digits():
    """Return scikit-learn's digits: 1,797 handwritten digits of the UCI test set, 8x8x1, ten classes; no download."""
    table = _digits_table()
    pixels = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)  # 17 grey levels, 0 to 16
    return ArraySource(pixels, table[:, -1], map(str, range(10)))


def _digits_table():
    """Return scikit-learn's digits as numbers, [1797, 65]: an image's 64 pixels and its label, from 0 to 9."""
    found = importlib.util.find_spec('sklearn')  # does not import it, which takes more than a second
    folder = os.path.dirname(found.origin) if found and found.origin else ''
    path = os.path.join(folder, 'datasets', 'data', 'digits.csv.gz')
    if os.path.isfile(path):
        return np.loadtxt(path, delimiter=',')
    from sklearn import datasets

    return np.column_stack(datasets.load_digits(return_X_y=True))


class EncodedSource(Source):
    """A source that decodes images on demand, and resamples those of another size.

    A subclass sets class_names and defines `read` and `name`. resampling: a name in `images.RESAMPLINGS`. Raises
    UserError, which names the image, if one cannot be decoded, is too small without `upsample`, or has no valid label.
    """

    def __init__(self, image_shape, *, resampling='box', upsample=False):
        self.image_shape, self._resampling, self._upsample = tuple(image_shape), resampling, upsample

    def import_readers(self):
        images.import_formats()

    def read(self, index):
        """Return (image, label) as stored: the file's bytes or uint8 [H, W, C], and an int."""
        raise NotImplementedError

    def name(self, index):
        """Return the name of an image for error messages."""
        raise NotImplementedError

    def batch(self, indices):
        pixels = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for row, index in enumerate(indices):
            try:
                image, labels[row] = self.read(int(index))
                if isinstance(image, bytes):
                    image = images.decode(image, self.image_shape[-1])
                if image.shape != self.image_shape:
                    image = images.resample(image, self.image_shape[0], self._resampling, upsample=self._upsample)
            except images.Unreadable as error:
                raise UserError(f'{self.name(index)}: {error} (config.data.data_dir).') from None
            except images.ImageError as error:
                fields = f' ({_FIELDS[type(error)]})' if type(error) in _FIELDS else ''
                raise UserError(
                    f'{self.name(index)}: {error}; --mode=prepare makes a data set without such images{fields}.'
                ) from None
            pixels[row] = image
            self._check_label(index, labels[row])
        return {'image': pixels, 'label': labels}

    def label(self, index):
        label = self.read(int(index))[1]
        self._check_label(index, label)
        return int(label)

    def _check_label(self, index, label):
        if not 0 <= label < len(self.class_names):
            raise UserError(
                f'{self.name(index)} has label {label}; allowed: 0 to {len(self.class_names) - 1}. Some splits have no '
                'labels, such as the test split of imagenet2012 (config.data.split).'
            )


class FolderSource(EncodedSource):
    """A folder of images or a zip file of one, as `preparing.folder` and `preparing.zip_file` read them.

    Prints possible mistakes: the classes that have no images, and the entries that were ignored.
    """

    def __init__(self, path, image_shape, **resampling):
        super().__init__(image_shape, **resampling)
        self._files = archives.open_plain_images(path, field='config.data.data_dir')
        self.class_names, self._labels, self._path = self._files.class_names, self._files.labels, path
        counts = np.bincount(self._labels, minlength=len(self.class_names))
        for line in raw_images.notes(self.class_names, counts, self._files.ignored):
            print(line, flush=True)

    def order_classes(self, class_names):
        ids = {composed(name): label for label, name in enumerate(class_names)}
        if len(ids) == len(class_names) and ids.keys() == set(map(composed, self.class_names)):
            new_ids = np.array([ids[composed(name)] for name in self._files.class_names], np.int32)
            self.class_names, self._labels = tuple(class_names), new_ids[self._files.labels]

    def __len__(self):
        return len(self._files)

    def read(self, index):
        return self._files.read(index), self._labels[index]

    def name(self, index):
        return printable(os.path.join(self._path, self._files.names[index]))

    def label(self, index):
        return int(self._labels[index])


class TfdsSource(EncodedSource):
    """A prepared TFDS data set, ArrayRecord or TFRecord, read without TensorFlow and never downloaded.

    name: as for `tfds.builder`, or '' if data_dir is the data set's own folder, with its dataset_info.json.
    split: in TFDS's syntax, such as 'train' or 'train[:10%]'.
    """

    def __init__(self, name, split, data_dir, image_shape, **resampling):
        super().__init__(image_shape, **resampling)
        info = _dataset_info(name, data_dir)
        self.class_names = _class_names(info)
        self._title = f'{info.full_name}, split {split!r}'
        fixed = info.features['image'].shape
        if None not in fixed and fixed != self.image_shape:
            raise UserError(
                f'the images of {info.full_name} are {fixed}, not {self.image_shape} '
                '(config.data.image_size, config.data.image_channels).'
            )
        try:
            instructions = info.splits[split].file_instructions
        except Exception as error:  # TFDS raises many kinds for a bad split
            raise UserError(
                f'{info.full_name} has no split {split!r}; allowed: {", ".join(map(repr, info.splits))} '
                f'(config.data.split): {first_line(error)}'
            ) from None
        if not instructions:
            raise UserError(f'{self._title} has no images (config.data.split).')
        self._records = _open_records(info, instructions)

    def __len__(self):
        return len(self._records)

    def import_readers(self):
        from tensorflow_datasets.proto import tf_example_generated_pb2

        super().import_readers()
        tf_example_generated_pb2.Example.FromString(b'')

    def read(self, index):
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_generated_pb2

        record = self._records[index]
        try:
            feature = tf_example_generated_pb2.Example.FromString(record).features.feature
            return feature['image'].bytes_list.value[0], feature['label'].int64_list.value[0]
        except (DecodeError, IndexError):
            what = f'{self.name(index)} is not an example with an image and a label'
            raise records.damaged(self._records.path(index), what) from None

    def name(self, index):
        return f'image {index} of {self._title}'


def _dataset_info(name, data_dir):
    """Return TFDS's DatasetInfo of a prepared data set; raises UserError, which says how to prepare it."""
    if importlib.util.find_spec('importlib_resources') is None:
        raise UserError('tensorflow-datasets needs importlib_resources: pip install importlib_resources.')
    import tensorflow_datasets as tfds

    data_dir = data_dir and os.path.expanduser(data_dir)
    where = data_dir or '~/tensorflow_datasets'
    fields = '(config.data.name, config.data.data_dir)'
    if not name and not data_dir:
        raise UserError(f'no data set is given {fields}.')
    try:
        builder = tfds.builder(name, data_dir=data_dir) if name else tfds.builder_from_directory(data_dir)
        exists = os.path.isfile(os.path.join(builder.data_dir, 'dataset_info.json'))
        reason = f'no dataset_info.json in {builder.data_dir}'
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise unusable(error.filename or where, f'cannot be read: {error.strerror}', fields[1:-1]) from error
        exists, reason = False, first_line(error)
    except Exception as error:  # TFDS raises many kinds for a missing data set
        exists, reason = False, first_line(error)
    if not exists:
        known = (archive for key, archive in _ARCHIVES.items() if re.match(rf'{key}(?![a-z0-9])', name))
        archive = next(known, 'a folder or zip of images, or ILSVRC2012_img_train.tar')
        raise UserError(
            f'no data set {name or "of TFDS"!r} is prepared under {where} {fields}; to prepare it, add --mode=prepare '
            f'--config.prepare.path=PATH to this command, where PATH is {archive}. ({reason})'
        )
    return builder.info


def _class_names(info):
    """Return the names of a data set's classes; raises UserError unless it has images and labels."""
    import tensorflow_datasets as tfds

    features = info.features
    if not {'image', 'label'} <= set(features) or not isinstance(features['label'], tfds.features.ClassLabel):
        raise UserError(
            f"{info.full_name} has the features {', '.join(features)}; needed are 'image', and 'label' as a ClassLabel "
            '(config.data.name).'
        )
    return tuple(features['label'].names)


def _open_records(info, instructions):
    """Return the serialised examples of TFDS's file instructions as a sequence; raises UserError."""
    missing = [i.filename for i in instructions if not os.path.isfile(i.filename)]
    if missing:
        raise UserError(
            f'{len(missing)} of the {len(instructions)} files of {info.full_name} are missing, '
            f'such as {os.fspath(missing[0])}; copy or prepare the data set again (config.data.data_dir).'
        )
    file_format = info.file_format.file_suffix
    if file_format == 'tfrecord':
        return records.TfRecordFiles(instructions)
    if file_format == 'array_record':
        return records.ArrayRecordFiles(instructions)
    raise UserError(
        f"{info.full_name} is prepared as {file_format!r}; allowed: 'array_record', 'tfrecord' (config.data.name)."
    )
