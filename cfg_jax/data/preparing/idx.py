"""IDX files, one of images and one of labels a split: MNIST, Fashion-MNIST, KMNIST and the sets of EMNIST.

The layout (LeCun's, http://yann.lecun.com/exdb/mnist): two zero bytes, the type of the values, the number of axes, the
sizes of the axes as big-endian int32, and the values. Any file may be compressed by gzip.
"""

import contextlib
import gzip
import math
import os
import re
import string
import struct
import zlib

import numpy as np

from cfg_jax.data.preparing.raw_images import RawImages, check_split, counted, stamp
from cfg_jax.errors import UserError, first_line, unusable

_NAME = re.compile(r'(?:(.+)-)?(\w+)-(images|labels)[-.]idx\d-ubyte(?:\.gz)?')
_TYPES = {8: 'unsigned bytes', 9: 'signed bytes', 11: 'int16', 12: 'int32', 13: 'float32', 14: 'float64'}
_AXES = {'images': 3, 'labels': 1}
_GZIP = b'\x1f\x8b'

_DIGITS, _CAPITALS = string.digits, string.ascii_uppercase
_MERGED = _DIGITS + _CAPITALS + 'abdefghnqrt'  # the other small letters count as capitals
_EMNIST = 'emnist_'
# data set -> its class names
_CLASSES = {
    'mnist': _DIGITS,
    'fashion_mnist': (
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
    ),
    'kmnist': ('o', 'ki', 'su', 'tsu', 'na', 'ha', 'ma', 'ya', 're', 'wo'),
    f'{_EMNIST}byclass': _DIGITS + _CAPITALS + string.ascii_lowercase,
    f'{_EMNIST}bymerge': _MERGED,
    f'{_EMNIST}balanced': _MERGED,
    f'{_EMNIST}letters': _CAPITALS,
    f'{_EMNIST}digits': _DIGITS,
    f'{_EMNIST}mnist': _DIGITS,
}  # fmt: skip
_UNNAMED = ('fashion_mnist', 'kmnist', 'mnist')  # as published, their files do not say what they are of
_FIRST_LABELS = {f'{_EMNIST}letters': 1}


def is_idx_name(name):
    """Return True if a file is an IDX file of images or labels by its name."""
    return _NAME.fullmatch(name) is not None


def holds_idx_files(folder):
    """Return True if the folder holds an IDX file of images or labels."""
    return any(is_idx_name(name) and os.path.isfile(os.path.join(folder, name)) for name in os.listdir(folder))


class Idx(RawImages):
    """One split of a data set in IDX files: HxWx1. EMNIST's images, which are stored transposed, are turned upright.

    Reading is quick in the order of index; a step back in a gzip file decompresses it from its start.
    """

    def __init__(self, path, split, field, name):
        """name: config.data.name, which chooses among several data sets in a folder and decides the class names."""
        data_set, splits = _choose(path, name, field)
        check_split(split, splits, path)
        files = splits[split]
        for content, other in (('images', 'labels'), ('labels', 'images')):
            if content not in files:
                raise unusable(files[other], f'has no file of {content} beside it', field)
        self._files = files['images'], files['labels']
        self._pixels, labels = _Values(files['images'], 'images', field), _Values(files['labels'], 'labels', field)
        num_images, (num_labels,) = self._pixels.shape[0], labels.shape
        if num_images != num_labels:
            raise unusable(files['labels'], f'holds {num_labels} labels for {num_images} images', field)
        labels = np.frombuffer(labels.read(0, num_labels), np.uint8).astype(np.int32)
        first = _FIRST_LABELS.get(data_set, 0)
        class_names = _CLASSES.get(data_set) or [str(label) for label in range(labels.max() + 1)]
        last = first + len(class_names) - 1
        if labels.min() < first or labels.max() > last:
            raise unusable(files['labels'], f'has labels outside {first} to {last}', field)
        self._is_transposed = data_set.startswith(_EMNIST)
        names = [f'{split}-images/{row}' for row in range(num_images)]
        super().__init__('idx', class_names, names, labels - first)

    def read(self, index):
        _, *shape = self._pixels.shape
        size = math.prod(shape)
        image = np.frombuffer(self._pixels.read(index * size, size), np.uint8).reshape(*shape, 1)
        return np.ascontiguousarray(image.swapaxes(0, 1)) if self._is_transposed else image

    def stamps(self):
        return map(stamp, self._files)


class _Values:
    """The values of one IDX file, checked to its end. It pickles without the open file.

    Each process reads the file as a stream and holds none of it: gzip has no random access, and the images of EMNIST's
    largest set take 547 MB. Raises UserError for whatever is wrong with the file.
    """

    def __init__(self, path, content, field):
        """content: 'images' or 'labels'."""
        self._path, self._field, self._file = path, field, None
        with self._errors(), _open(path) as file:
            self.shape = self._read_header(file, content)
            pieces = iter(lambda: file.read(1 << 20), b'')  # to the end, where gzip compares its checksum
            size = sum(map(len, counted(pieces, path, 'MiB read')))
        self._start, expected = _header_size(len(self.shape)), math.prod(self.shape)
        if size < expected:
            raise self._unusable(f'is truncated: it holds {size} bytes of {content} instead of {expected}')
        if size > expected:
            raise self._unusable(f'holds {size - expected} bytes after its last value')
        if not size:
            raise self._unusable(f'holds no {content}')

    def __getstate__(self):
        return {**self.__dict__, '_file': None}

    def __del__(self):
        if self._file is not None:
            self._file.close()

    def read(self, offset, size):
        """Return values `offset` to `offset + size` as bytes."""
        with self._errors():
            if self._file is None:
                self._file = _open(self._path)
            self._file.seek(self._start + offset)
            data = self._file.read(size)
        if len(data) < size:
            raise self._unusable('is truncated')
        return data

    def _unusable(self, what):
        return unusable(self._path, what, self._field)

    @contextlib.contextmanager
    def _errors(self):
        """Turn the errors of gzip and of the system into UserError."""
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._unusable(f'is damaged: {first_line(error)}') from error
        except OSError as error:
            raise self._unusable(f'cannot be read: {error.strerror or first_line(error)}') from error

    def _read_header(self, file, content):
        """Return the sizes of the axes, and leave the file where the values begin."""
        num_axes = _AXES[content]
        header = file.read(_header_size(num_axes))
        if len(header) < 4 or header[:2] != b'\0\0' or header[2] not in _TYPES:
            raise self._unusable('is not an IDX file')
        if (header[2], header[3]) != (8, num_axes):
            raise self._unusable(
                f'holds {header[3]}-dimensional {_TYPES[header[2]]}; {content} are {num_axes}-dimensional {_TYPES[8]}'
            )
        if len(header) < _header_size(num_axes):
            raise self._unusable('is truncated in its header')
        return struct.unpack(f'>{num_axes}I', header[4:])


def _header_size(num_axes):
    return 4 + 4 * num_axes


def _open(path):
    """Open a file for reading bytes, decompressed if gzip compressed it, whatever its name."""
    with open(path, 'rb') as file:
        is_gzip = file.read(2) == _GZIP
    return gzip.open(path) if is_gzip else open(path, 'rb')


def _choose(path, name, field):
    """Return (data set, {split: {'images' or 'labels': path}}) of a folder or file. Raises UserError.

    data set: one of `_CLASSES`, by the files' names or else by config.data.name; any other string if neither says.
    """
    found = _find(path)
    named = _data_set(name, {*_CLASSES, *found} - {''})
    if name.split('/')[0] == 'emnist':
        raise UserError(
            f"config.data.name is {name!r}, TFDS's own data set, whose images are stored transposed; call yours, with "
            f'upright images, {named or "emnist_letters"!r} (config.data.name).'
        )
    if named in found:
        chosen = named
    elif len(found) == 1:
        (chosen,) = found
    elif '' in found and named in _UNNAMED:
        chosen = ''
    else:
        choices = sorted({*found, *(_UNNAMED if '' in found else ())} - {''})
        raise UserError(
            f'{path} holds several data sets: set config.data.name to one of {", ".join(choices)}, or give one of its '
            f'files of images ({field}).'
        )
    if named and chosen in _CLASSES and chosen != named:
        raise UserError(f'{path} is {chosen}, but config.data.name is {name!r} ({field}, config.data.name).')
    return (chosen if chosen in _CLASSES else named or chosen), found[chosen]


def _data_set(name, known):
    """Return the longest of the known names that config.data.name is or begins with, as in mnist_32, or None."""
    name = f'{name.replace("/", "_")}_'
    return max((each for each in known if name.startswith(f'{each}_')), key=len, default=None)


def _find(path):
    """Return {data set or '': {split: {'images' or 'labels': path}}} of a folder, or of a file and its companion."""
    folder, given = (path, None) if os.path.isdir(path) else (os.path.dirname(path), _parts(os.path.basename(path)))
    found = {}
    for name in sorted(os.listdir(folder or '.')):  # a file before the same one with .gz
        parts, file = _parts(name), os.path.join(folder, name)
        if parts and os.path.isfile(file) and (given is None or parts[:2] == given[:2]):
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
