"""Data sets in TFDS's own layout, written as ArrayRecord files without TensorFlow, for TFDS and anyone else to read.

DATA_DIR/<name>[/<config>]/<version>/ holds <name>-<split>.array_record-00000-of-00010 and so on, dataset_info.json,
features.json and label.labels.txt.
"""

import contextlib
import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from cfg_jax import files
from cfg_jax.errors import UserError

_NAME = re.compile(r'([a-z][a-z0-9_]*)(?:/([\w+.-]+))?')
_SPLIT = re.compile(r'(?!all$)[a-z]\w*')  # 'all' means every split to TFDS
_TEXTS = ('id', 'file_name')  # what an example may hold beside its image and label
_VERSION = '1.0.0'  # of a data set that TFDS does not know


@dataclasses.dataclass(frozen=True)
class Target:
    """A data set of TFDS, whether it is there yet or not.

    name: without the config. folder: of its version. features: TFDS's FeaturesDict. info: TFDS's DatasetInfo of what
    lies in the folder or, where nothing does, of what is going to.
    """

    name: str
    folder: Path
    features: object
    info: object

    @property
    def class_names(self):
        return tuple(self.features['label'].names)

    def prepared_splits(self):
        """The names of the splits that lie there."""
        return tuple(self.info.splits) if (self.folder / 'dataset_info.json').exists() else ()

    def label_ids(self, class_names):
        """int64 [len(class_names)]: the label, here, of each of these classes. UserError where one is unknown."""
        ids = {name: label for label, name in enumerate(self.class_names)}
        if unknown := [name for name in class_names if name not in ids]:
            raise UserError(
                f'{len(unknown)} of the {len(class_names)} classes of config.prepare.path, {unknown[0]!r} among them, '
                f'are not in the data set {self.info.full_name} ({", ".join(self.class_names[:3])}, ...); the same '
                'images can be prepared under another config.data.name.'
            )
        return np.array([ids[name] for name in class_names], np.int64)


def locate(name, data_dir, class_names, image_shape):
    """The `Target` called `name` under `data_dir` (None: TFDS's default), for images of this shape and these classes.

    What lies there already, or TFDS knows by that name, decides version, features and the order of the classes; any
    other name is new. Raises UserError where images of that shape do not fit.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.constants import get_default_data_dir

    if not (match := _NAME.fullmatch(name)):
        raise UserError(
            f"config.data.name is {name!r}; allowed are names such as 'my_images' and 'my_images/64x64': lower-case "
            'letters, digits and _.'
        )
    name, config = match[1], match[2] or ''
    data_dir = Path(data_dir or get_default_data_dir()).expanduser().absolute()
    builder = _known_builder(name, config, data_dir)
    folder = Path(builder.data_dir) if builder else data_dir / name / config / _VERSION
    if (folder / 'dataset_info.json').exists():
        info = tfds.builder_from_directory(folder).info
        if info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            raise UserError(
                f'{folder} holds a data set of another file format, {info.file_format.value}; give another '
                'config.data.data_dir or config.data.name.'
            )
    else:
        info = _new_info(name, config, folder, builder, class_names, image_shape)
    _check_features(info, folder, image_shape)
    return Target(name, folder, info.features, info)


def _known_builder(name, config, data_dir):
    """TFDS's own builder of that name and config, or None where it has none."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        known = tfds.builder_cls(name)
    except DatasetNotFoundError:
        return None
    if config and config not in known.builder_configs:
        return None
    return known(data_dir=str(data_dir), **({'config': config} if config else {}))


def _new_info(name, config, folder, builder, class_names, image_shape):
    """A DatasetInfo without splits: of TFDS's builder, or of a data set that TFDS does not know."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    odd = [each for each in class_names if each != each.strip() or not each or not each.isprintable()]
    if odd:
        raise UserError(
            f'a class of the images is called {odd[0]!r}, which TFDS cannot store: rename it (config.prepare.path).'
        )
    if builder:
        identity, features = DatasetIdentity.from_builder(builder), builder.info.features
        description = builder.info.description
        label = dict(features).get('label')
        if isinstance(label, tfds.features.ClassLabel) and label.names == [str(i) for i in range(label.num_classes)]:
            with contextlib.suppress(ValueError):  # these numbers are the names, or there are as many as classes
                label.names = class_names
    else:
        identity = DatasetIdentity(
            name=name, version=tfds.core.Version(_VERSION), data_dir=str(folder), module_name='', config_name=config
        )
        image = tfds.features.Image(shape=image_shape, encoding_format='png')
        features = tfds.features.FeaturesDict({'image': image, 'label': tfds.features.ClassLabel(names=class_names)})
        description = 'Images prepared by cfg_jax.'
    info = tfds.core.DatasetInfo(
        builder=identity, features=features, supervised_keys=('image', 'label'), description=description
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    return info


def _check_features(info, folder, image_shape):
    import tensorflow_datasets as tfds

    features, kinds = dict(info.features), tfds.features
    texts = [key for key in features if key not in ('image', 'label')]
    fitting = (
        isinstance(features.get('image'), kinds.Image)
        and isinstance(features.get('label'), kinds.ClassLabel)
        and all(key in _TEXTS and isinstance(features[key], kinds.Text) for key in texts)
    )
    if not fitting:
        raise UserError(
            f'the data set {info.full_name} has the features {", ".join(features)}, which cannot be prepared from '
            'images and labels alone; give another config.data.name.'
        )
    expected = features['image'].shape
    if any(size not in (None, ours) for size, ours in zip(expected, image_shape)):
        raise UserError(
            f'the images of {info.full_name} ({folder}) are {expected}, not {tuple(image_shape)} '
            '(config.data.image_size, config.data.image_channels, config.data.name).'
        )


def check_split(split):
    """UserError where a split cannot be called so."""
    if not _SPLIT.fullmatch(split):
        raise UserError(f"config.data.split is {split!r}; to prepare one, give its whole name, such as 'train'.")


def shard_name(name, split, index, count):
    """TFDS's name of one file of a split."""
    return f'{name}-{split}.array_record-{index:05d}-of-{count:05d}'


def example_serializer(features):
    """A function from {'image': bytes, 'label': int, ...} to a serialised tf.train.Example.

    Values beyond `features` are left out. The same values always give the same bytes.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())

    def serialize(values):
        return serializer.get_tf_example(values).SerializeToString(deterministic=True)

    return serialize


def write_shard(path, records):
    """Writes an iterable of bytes to an ArrayRecord file, whole or not at all; returns (their number, their bytes).

    Raises OSError where it cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    count = size = 0
    with files.whole(path) as temporary:
        with _write_errors():
            writer = ArrayRecordWriter(str(temporary), 'group_size:1')  # as TFDS: an image is read by itself
        for record in records:
            with _write_errors():
                writer.write(record)
            count, size = count + 1, size + len(record)
        with _write_errors():
            writer.close()
        _sync(temporary)
    return count, size


@contextlib.contextmanager
def _write_errors():
    try:
        yield
    except RuntimeError as error:  # the library's only kind; its text says what and where
        raise OSError(str(error).split(';')[0]) from None


def write_metadata(target, folder, split, shard_lengths, num_bytes, description):
    """Writes the files that make a data set of shards into `folder`, with what `target` holds already, and syncs them.

    description: how this split was prepared. Features are written only where `target` is new.
    """
    import tensorflow_datasets as tfds

    new = tfds.core.SplitInfo(name=split, shard_lengths=shard_lengths, num_bytes=num_bytes)
    info, splits = target.info, target.info.splits
    info.as_proto.description = f'{info.description}\n{split}: {description}'.strip()
    info.set_splits(tfds.core.splits.SplitDict([*(splits[name] for name in splits), new]))
    if not target.prepared_splits():
        info.write_to_directory(folder)
    else:
        info.write_dataset_info_json(folder)
    sync_folder(folder)


def sync_folder(folder):
    """Waits until the disk has the folder's files and their names."""
    for path in folder.iterdir():
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
