"""The archives that data sets come in, opened as `RawImages`: recognised by what lies there, read at any place."""

import contextlib
import gzip
import io
import os
import pickle
import re
import tarfile
import zlib

import numpy as np

from cfg_jax.data.images import first_line
from cfg_jax.data.preparing.raw_images import (
    RECOGNISED,
    ImageFolder,
    ImageZip,
    RawImages,
    check_split,
    holds_class_folders,
    stamp,
    unusable,
)
from cfg_jax.data.preparing.imagenet_npz import ImagenetNpz, ImagenetTar, holds_batches, is_npz_name, npz_members
from cfg_jax.errors import UserError

CIFAR_BATCHES = {'train': [f'data_batch_{number}' for number in range(1, 6)], 'test': ['test_batch']}
CIFAR_SHAPE = (3, 32, 32)


def open_images(path, *, split='train', field='config.prepare.path'):
    """`RawImages` of what lies at `path`, which the config's `field` gave: a folder or archive named in `RECOGNISED`.

    split: of CIFAR-10 'train' or 'test', of ImageNet 'train' or 'validation'; folders and zip files have none.
    Raises UserError.
    """
    where = os.path.expanduser(path)
    with _reading(path, where, field):
        kind = _recognise(where, field)
        return kind(where, field) if kind in (ImageFolder, ImageZip) else kind(where, split, field)


def open_plain_images(path, *, field):
    """`RawImages` of a folder of images or a zip file of one, alone. Raises UserError."""
    where = os.path.expanduser(path)
    with _reading(path, where, field):
        kind = _recognise(where, field)
        if kind not in (ImageFolder, ImageZip):
            raise UserError(
                f'{where} is no folder or zip file of images ({field}, config.data.source); an archive is prepared '
                f'first: --mode=prepare --config.prepare.path={where} --config.data.source=tfds.'
            )
        return kind(where, field)


@contextlib.contextmanager
def _reading(path, where, field):
    """UserError where there is nothing, or something that the system does not let us read."""
    if not os.path.exists(where):
        raise UserError(f'no such file or folder: {path!r} ({field}).')
    try:
        yield
    except OSError as error:
        what = f'cannot be read: {error.strerror or first_line(error)}'
        raise unusable(error.filename or where, what, field) from error


def _recognise(path, field):
    """The class, of those that `open_images` opens, that a folder or file looks like."""
    if os.path.isdir(path):
        batches = [name for names in CIFAR_BATCHES.values() for name in names]
        cifar10 = _any_file(path, batches) and _any_file(path, ['batches.meta'])
        if (cifar10 or holds_batches(path)) and not holds_class_folders(path):
            return Cifar10 if cifar10 else ImagenetNpz
        return ImageFolder
    start = b''
    if os.path.isfile(path):  # not a pipe, which may never end
        with open(path, 'rb') as file:
            start = file.read(512)
    suffix = os.path.splitext(path)[1].lower()
    if is_npz_name(path):
        return ImagenetNpz
    if start.startswith(b'PK') or suffix == '.zip':
        return ImagenetNpz if npz_members(path, field) else ImageZip
    if start.startswith(b'\x1f\x8b'):
        return Cifar10
    if start[257:262] == b'ustar' or suffix == '.tar':
        return ImagenetTar
    raise unusable(path, f'is nothing that is recognised: {RECOGNISED}', field)


def _any_file(folder, names):
    """Whether any of the names is a file's in the folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


# CIFAR-10: pickled batches of pixels.


class Cifar10(RawImages):
    """CIFAR-10 for Python, packed or unpacked: 32x32x3. Each process that reads holds a split's pixels, 150 MB."""

    def __init__(self, path, split, field):
        check_split(split, CIFAR_BATCHES, path)
        self._path, self._batches, self._field = path, CIFAR_BATCHES[split], field
        contents = self._load()
        class_names = [name.decode() for name in contents.pop('batches.meta')[b'label_names']]
        labels = np.concatenate([batch[b'labels'] for batch in contents.values()])
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise unusable(path, f'has labels outside 0 to {len(class_names) - 1}', field)
        names = [f'{name}/{row}' for name, batch in contents.items() for row in range(len(batch[b'labels']))]
        super().__init__('cifar10', class_names, names, labels)
        self._pixels = _stack(contents)

    def __getstate__(self):
        return {**self.__dict__, '_pixels': None}

    def read(self, index):
        if self._pixels is None:
            contents = self._load()
            del contents['batches.meta']
            self._pixels = _stack(contents)
        return np.ascontiguousarray(self._pixels[index].reshape(CIFAR_SHAPE).transpose(1, 2, 0))

    def stamps(self):
        if os.path.isdir(self._path):
            return [stamp(os.path.join(self._path, name)) for name in self._batches]
        return [stamp(self._path)]

    def _load(self):
        """{file name: its dictionary}, the split's batches in their order and then batches.meta."""
        wanted = [*self._batches, 'batches.meta']
        files = self._read_folder(wanted) if os.path.isdir(self._path) else self._read_tar(wanted)
        lacking = [name for name in wanted if name not in files]
        if lacking:
            raise unusable(self._path, f'is damaged or not all of CIFAR-10: it lacks {lacking[0]}', self._field)
        return {name: self._unpickle(name, files[name]) for name in wanted}

    def _read_folder(self, wanted):
        files = {}
        for name in wanted:
            if _any_file(self._path, [name]):
                with open(os.path.join(self._path, name), 'rb') as file:
                    files[name] = file.read()
        return files

    def _read_tar(self, wanted):
        files, is_cifar = {}, False
        try:
            with gzip.open(self._path) as file, tarfile.open(fileobj=file) as archive:
                for member in archive:
                    folder, name = os.path.split(member.name)
                    is_cifar |= folder.endswith('cifar-10-batches-py')
                    if name in wanted and member.isfile():
                        files[name] = archive.extractfile(member).read()
                while file.read(1 << 20):  # to the end, where gzip compares its checksum
                    pass
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise unusable(self._path, f'is damaged: {first_line(error)}', self._field) from error
        if not is_cifar:
            raise unusable(self._path, f'is nothing that is recognised: {RECOGNISED}', self._field)
        return files

    def _unpickle(self, name, data):
        try:
            content = _PixelUnpickler(io.BytesIO(data), encoding='bytes').load()
            if name == 'batches.meta':
                fits = all(isinstance(label, bytes) for label in content[b'label_names'])
            else:
                pixels, labels = content[b'data'], np.asarray(content[b'labels'])
                fits = pixels.dtype == np.uint8 and pixels.shape == (len(labels), np.prod(CIFAR_SHAPE))
                fits = fits and len(labels) and labels.dtype.kind == 'i'
        except Exception as error:  # a damaged pickle fails in any way
            raise unusable(self._path, f'has a {name} that cannot be read: {first_line(error)}', self._field) from error
        if not fits:
            raise unusable(self._path, f'has a {name} that is not as CIFAR-10 publishes it', self._field)
        return content


def _stack(contents):
    """uint8 [N, 3072]: each image's red, green and blue plane."""
    return np.concatenate([batch[b'data'] for batch in contents.values()])


class _PixelUnpickler(pickle.Unpickler):
    """Unpickles lists, dictionaries and NumPy arrays. Whatever else a pickle asks to be called is refused."""

    _ALLOWED = {
        ('multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
        ('multiarray', 'scalar'): np.int64(0).__reduce__()[0],
        ('numpy', 'ndarray'): np.ndarray,
        ('numpy', 'dtype'): np.dtype,
        ('_codecs', 'encode'): lambda text, _: text.encode('latin1'),  # how newer Pythons write bytes
    }

    def find_class(self, module, name):
        module = re.sub(r'^numpy\._?core\.', '', module)
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, which no array needs')
        return self._ALLOWED[module, name]
