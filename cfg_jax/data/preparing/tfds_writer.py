"""Write data sets in TFDS's own layout, as ArrayRecord files, without TensorFlow; stock TFDS reads them.

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
_TEXTS = ('id', 'file_name')  # features that an example may have beside its image and label
_VERSION = '1.0.0'  # of a data set that TFDS does not know


@dataclasses.dataclass(frozen=True)
class Target:
    """A data set of TFDS, which may not exist yet.

    name: without the config. folder: of its version. features: TFDS's FeaturesDict. info: TFDS's DatasetInfo of the
    data set in the folder or, if there is none, of the one to be written.
    """

    name: str
    folder: Path
    features: object
    info: object

    @property
    def class_names(self):
        """A tuple of str, in the order of the labels."""
        return tuple(self.features['label'].names)

    def prepared_splits(self):
        """Return the names of the splits that exist."""
        return tuple(self.info.splits) if (self.folder / 'dataset_info.json').exists() else ()

    def label_ids(self, class_names):
        """Return this data set's label of each of these classes, int64 [len(class_names)]. Raises UserError."""
        ids = {files.composed(name): label for label, name in enumerate(self.class_names)}
        if unknown := [name for name in class_names if files.composed(name) not in ids]:
            raise UserError(
                f'{len(unknown)} of the {len(class_names)} classes of config.prepare.path, {unknown[0]!r} among them, '
                f'are not in the data set {self.info.full_name} ({", ".join(self.class_names[:3])}, ...); prepare '
                'these images under another config.data.name.'
            )
        return np.array([ids[files.composed(name)] for name in class_names], np.int64)


def locate(name, data_dir, class_names, image_shape):
    """Return the `Target` called `name` under `data_dir` (None: TFDS's default), for images of this shape and classes.

    If the data set exists, or if TFDS knows its name, that decides version, features and the order of the classes; any
    other name is a new data set. Raises UserError if images of this shape do not fit.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.constants import get_default_data_dir

    if not (match := _NAME.fullmatch(name)):
        raise UserError(
            f"config.data.name is {name!r}; allowed: lower-case letters, digits and _, as in 'my_images' or "
            "'my_images/64x64'."
        )
    name, config = match[1], match[2] or ''
    try:
        data_dir = Path(data_dir or get_default_data_dir()).expanduser().absolute()
    except RuntimeError:  # no HOME, and a user that the machine does not know
        raise UserError('the home folder is not known; set config.data.data_dir.') from None
    builder = _known_builder(name, config, data_dir)
    folder = Path(builder.data_dir) if builder else data_dir / name / config / _VERSION
    if (folder / 'dataset_info.json').exists():
        info = tfds.builder_from_directory(folder).info
        if info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            raise UserError(
                f'{folder} holds a data set in the file format {info.file_format.value}, not array_record; give '
                'another config.data.data_dir or config.data.name.'
            )
    else:
        info = _new_info(name, config, folder, builder, class_names, image_shape)
    _check_features(info, folder, image_shape)
    return Target(name, folder, info.features, info)


def _known_builder(name, config, data_dir):
    """Return TFDS's own builder of that name and config, or None."""
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
    """Return a DatasetInfo without splits: of TFDS's builder, or if that is None of a data set that TFDS lacks."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    odd = [each for each in class_names if each != each.strip() or not each or not each.isprintable()]
    if odd:
        raise UserError(f'a class is called {odd[0]!r}, which TFDS cannot store; rename it (config.prepare.path).')
    if builder:
        identity, features = DatasetIdentity.from_builder(builder), builder.info.features
        description = builder.info.description
        label = dict(features).get('label')
        if isinstance(label, tfds.features.ClassLabel) and label.names == [str(i) for i in range(label.num_classes)]:
            with contextlib.suppress(ValueError):  # names are set already, or their number differs
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
    """Raise UserError unless the data set holds images of this shape with labels, and no more than `_TEXTS` besides."""
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
            f'the data set {info.full_name} has the features {", ".join(features)}; only images with labels can be '
            'prepared: give another config.data.name.'
        )
    expected = features['image'].shape
    if any(size not in (None, given) for size, given in zip(expected, image_shape)):
        raise UserError(
            f'the images of {info.full_name} ({folder}) are {expected}, not {tuple(image_shape)} '
            '(config.data.image_size, config.data.image_channels, config.data.name).'
        )


def check_split(split):
    """Raise UserError if this cannot be the name of a whole split."""
    if not _SPLIT.fullmatch(split):
        raise UserError(f"config.data.split is {split!r}; --mode=prepare takes the name of a split, such as 'train'.")


def shard_name(name, split, index, count):
    """Return TFDS's name of one file of a split."""
    return f'{name}-{split}.array_record-{index:05d}-of-{count:05d}'


def example_serializer(features):
    """Return a function from {'image': bytes, 'label': int, ...} to a serialised tf.train.Example.

    Values beyond `features` are dropped. The same values always give the same bytes.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())

    def serialize(values):
        return serializer.get_tf_example(values).SerializeToString(deterministic=True)

    return serialize


def write_shard(path, records):
    """Write an iterable of bytes to an ArrayRecord file, whole or not at all; return (their number, total bytes).

    Raises OSError.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    count = size = 0
    with files.whole(path) as temporary:
        with _write_errors():
            # as TFDS writes: every image is read by itself
            writer = ArrayRecordWriter(os.fsencode(temporary), 'group_size:1')
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
    """Turn the library's errors into OSError."""
    try:
        yield
    except RuntimeError as error:  # the only kind it raises; its text says what and where
        raise OSError(str(error).split(';')[0]) from None


def write_metadata(target, folder, split, shard_lengths, num_bytes, description):
    """Write the files that make shards a data set into `folder`, the splits of `target` included, and sync the folder.

    description: how this split was prepared. Features are written only if `target` is new.
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
    """Wait until the folder's files and their names are on the disk."""
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
