"""IDX files, one of images and one of labels a split: MNIST, Fashion-MNIST, KMNIST and the sets of EMNIST.

The layout is that of http://yann.lecun.com/exdb/mnist: two zero bytes, the type of the values, the number of axes, the
sizes of the axes as big-endian int32, and the values. Any file may be compressed by gzip.
"""

import contextlib
import gzip
import os
import re
import string
import struct
import zlib

import numpy as np

from cfg_jax.data.images import ImageError, Unreadable
from cfg_jax.data.preparing.raw_images import RawImages, check_split, stamp
from cfg_jax.errors import UserError, first_line, unusable

_NAME = re.compile(r'(?:(.+)-)?(\w+)-(images|labels)[-.]idx\d-ubyte(?:\.gz)?')
_UNSIGNED_BYTES, _GZIP = 8, b'\x1f\x8b'
_DIGITS, _CAPITALS = string.digits, string.ascii_uppercase
_47_CLASSES = _DIGITS + _CAPITALS + 'abdefghnqrt'  # the other small letters count as capitals
_EMNIST = 'emnist_'
# The class names of each data set, by the name that config.data.name or the names of files begin with
_CLASSES = {
    'mnist': _DIGITS,
    'fashion_mnist': (
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
    ),
    'kmnist': ('o', 'ki', 'su', 'tsu', 'na', 'ha', 'ma', 'ya', 're', 'wo'),
    f'{_EMNIST}byclass': _DIGITS + _CAPITALS + string.ascii_lowercase,
    f'{_EMNIST}bymerge': _47_CLASSES,
    f'{_EMNIST}balanced': _47_CLASSES,
    f'{_EMNIST}letters': _CAPITALS,
    f'{_EMNIST}digits': _DIGITS,
    f'{_EMNIST}mnist': _DIGITS,
}  # fmt: skip
_FIRST_LABELS = {f'{_EMNIST}letters': 1}


def is_idx_name(name):
    """Return True if a file is an IDX file of images or labels by its name."""
    return _NAME.fullmatch(name) is not None


def holds_idx_files(folder):
    """Return True if the folder holds an IDX file of images or labels."""
    return any(is_idx_name(name) and os.path.isfile(os.path.join(folder, name)) for name in os.listdir(folder))


class Idx(RawImages):
    """One split of a data set in IDX files: HxWx1.

    Each process reads the images' file as a stream and holds none of it, for gzip has no random access and EMNIST's
    images take 547 MB. Reading is quick in the order of index; a step back in a gzip file reads it from its start.
    """

    def __init__(self, path, split, field, name):
        """name: config.data.name, which chooses among several data sets and gives the classes their names."""
        known = _known(name)
        chosen, splits = _choose(path, known, name, field)
        check_split(split, splits, path)
        files = splits[split]
        if 'images' not in files:
            raise unusable(path, f'holds labels but no images of the split {split!r}', field)
        if 'labels' not in files:
            raise unusable(files['images'], 'has no file of labels beside it', field)
        self._path, self._labels_path, self._field, self._file = files['images'], files['labels'], field, None
        kind = chosen if chosen in _CLASSES else known
        self._is_turned = (kind or '').startswith(_EMNIST)
        (num_images, *self._shape), _ = self._read_whole(self._path, 3, keep=False)
        (num_labels,), labels = self._read_whole(self._labels_path, 1, keep=True)
        if num_images != num_labels:
            raise unusable(self._labels_path, f'has {num_labels} labels for {num_images} images', field)
        labels = np.frombuffer(labels, np.uint8).astype(np.int32)
        first = _FIRST_LABELS.get(kind, 0)
        class_names = _CLASSES[kind] if kind else [str(label) for label in range(labels.max() + 1)]
        last = first + len(class_names) - 1
        if labels.min() < first or labels.max() > last:
            raise unusable(self._labels_path, f'has labels outside {first} to {last}', field)
        stem = re.sub(r'[-.]idx.*', '', os.path.basename(self._path))
        super().__init__('idx', class_names, [f'{stem}/{row}' for row in range(num_images)], labels - first)

    def __getstate__(self):
        return {**self.__dict__, '_file': None}

    def read(self, index):
        height, width = self._shape
        try:
            with self._damage(self._path):
                if self._file is None:
                    self._file = _open(self._path)
                self._file.seek(_header_size(3) + index * height * width)
                data = self._file.read(height * width)
        except OSError as error:
            raise Unreadable(f'unreadable: {error.strerror or first_line(error)}') from error
        if len(data) < height * width:
            raise ImageError('truncated')
        image = np.frombuffer(data, np.uint8).reshape(height, width, 1)
        return np.ascontiguousarray(image.swapaxes(0, 1)) if self._is_turned else image

    def stamps(self):
        return [stamp(self._path), stamp(self._labels_path)]

    @contextlib.contextmanager
    def _damage(self, path):
        """Turn gzip's errors into UserError."""
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise unusable(path, f'is damaged: {first_line(error)}', self._field) from error

    def _read_whole(self, path, num_axes, *, keep):
        """Return (the sizes of the axes, the values as bytes or, without `keep`, none) after checking the whole file."""
        with self._damage(path), _open(path) as file:
            shape = self._read_header(path, file, num_axes)
            expected, size, values = int(np.prod(shape, dtype=object)), 0, b''
            while piece := file.read(1 << 20):  # to the end, where gzip compares its checksum
                size += len(piece)
                values += piece if keep and size <= expected else b''
        if not expected:
            raise unusable(
                path, f'holds no {"images" if num_axes == 3 else "labels"}: {"x".join(map(str, shape))}', self._field
            )
        if size != expected:
            what = 'is truncated' if size < expected else 'goes on after its last value'
            raise unusable(path, f'{what}: it holds {size} bytes of values instead of {expected}', self._field)
        return shape, values

    def _read_header(self, path, file, num_axes):
        """Return the sizes of the axes, and leave the file where the values begin."""
        needed = f'needed are {"images" if num_axes == 3 else "labels"}, unsigned bytes with {num_axes} axes'
        header = file.read(_header_size(num_axes))
        if header[:2] != b'\0\0' or len(header) < 4:
            raise unusable(path, f'is not an IDX file; {needed}', self._field)
        if tuple(header[2:4]) != (_UNSIGNED_BYTES, num_axes):
            raise unusable(
                path, f'holds values of the IDX type 0x{header[2]:02x} with {header[3]} axes; {needed}', self._field
            )
        if len(header) < _header_size(num_axes):
            raise unusable(path, 'is truncated in its header', self._field)
        return struct.unpack(f'>{num_axes}I', header[4:])


def _header_size(num_axes):
    return 4 + 4 * num_axes


def _open(path):
    """Open a file for reading bytes, decompressed if it is gzip's, whatever its name."""
    with open(path, 'rb') as file:
        is_gzip = file.read(2) == _GZIP
    return gzip.open(path) if is_gzip else open(path, 'rb')


def _known(name):
    """Return the key of `_CLASSES` that the name of a data set begins with, or None."""
    name = name.replace('/', '_').replace('-', '_')
    return next((key for key in _CLASSES if f'{name}_'.startswith(f'{key}_')), None)


def _choose(path, known, name, field):
    """Return (a data set's name by its files or '', {split: {'images' or 'labels': path}}) of the one to be read."""
    found = _find(path)
    if known in found:
        chosen = known
    elif len(found) == 1:
        (chosen,) = found
    elif known and not known.startswith(_EMNIST) and '' in found:
        chosen = ''
    else:
        chosen = None
    if chosen is None or (known and chosen in _CLASSES and chosen != known):
        names = ', '.join(sorted(key or 'one without a name' for key in found))
        raise UserError(
            f'{path} holds {names}, and config.data.name is {name!r}: begin it with the name of one of them, or give '
            f'one file of images ({field}).'
        )
    return chosen, found[chosen]


def _find(path):
    """Return {data set or '': {split: {'images' or 'labels': path}}} of a folder, or of a file and its companion."""
    is_file = os.path.isfile(path)
    folder = os.path.dirname(path) if is_file else path
    given = _parts(os.path.basename(path)) if is_file else None
    found = {}
    for name in sorted(os.listdir(folder or '.')):  # uncompressed files before the same ones as .gz
        parts, file = _parts(name), os.path.join(folder, name)
        if parts is None or not os.path.isfile(file) or (given and parts[:2] != given[:2]):
            continue
        data_set, split, content = parts
        found.setdefault(data_set, {}).setdefault(split, {}).setdefault(content, file)
    if given:
        data_set, split, content = given
        found[data_set][split][content] = path
    return found


def _parts(name):
    """Return (data set or '', split, 'images' or 'labels') of the name of an IDX file, or None."""
    if not (match := _NAME.fullmatch(name)):
        return None
    data_set, split, content = match.groups()
    return (data_set or '').replace('-', '_'), {'t10k': 'test'}.get(split, split), content
