"""CIFAR-10 for Python: pickled batches of pixels, in the tar.gz file or unpacked."""

import gzip
import io
import os
import pickle
import re
import tarfile
import zlib

import numpy as np

from cfg_jax.data.preparing.raw_images import RawImages, check_split, stamp, unrecognised
from cfg_jax.errors import first_line, unusable

_BATCHES = {'train': [f'data_batch_{number}' for number in range(1, 6)], 'test': ['test_batch']}
_META = 'batches.meta'  # the file with the class names
_SHAPE = (3, 32, 32)


def is_cifar10_folder(folder):
    """Return True if the folder holds batches.meta and at least one of the batches."""
    batches = [name for names in _BATCHES.values() for name in names]
    return any(_is_file(folder, name) for name in batches) and _is_file(folder, _META)


def _is_file(folder, name):
    return os.path.isfile(os.path.join(folder, name))


class Cifar10(RawImages):
    """CIFAR-10 for Python, packed or unpacked: 32x32x3. Each process that reads keeps the pixels of a split, 150 MB."""

    def __init__(self, path, split, field):
        check_split(split, _BATCHES, path)
        self._path, self._batches, self._field = path, _BATCHES[split], field
        contents = self._load()
        class_names = [name.decode() for name in contents.pop(_META)[b'label_names']]
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
            del contents[_META]
            self._pixels = _stack(contents)
        return np.ascontiguousarray(self._pixels[index].reshape(_SHAPE).transpose(1, 2, 0))

    def stamps(self):
        if os.path.isdir(self._path):
            return [stamp(os.path.join(self._path, name)) for name in self._batches]
        return [stamp(self._path)]

    def _load(self):
        """Return {file name: its dictionary}: the batches of the split in order, then batches.meta."""
        wanted = [*self._batches, _META]
        files = self._read_folder(wanted) if os.path.isdir(self._path) else self._read_tar(wanted)
        lacking = [name for name in wanted if name not in files]
        if lacking:
            raise unusable(self._path, f'is damaged or incomplete CIFAR-10: it lacks {lacking[0]}', self._field)
        return {name: self._unpickle(name, files[name]) for name in wanted}

    def _read_folder(self, wanted):
        """Return {file name: bytes} of the wanted files in the folder."""
        files = {}
        for name in wanted:
            if _is_file(self._path, name):
                with open(os.path.join(self._path, name), 'rb') as file:
                    files[name] = file.read()
        return files

    def _read_tar(self, wanted):
        """Return {file name: bytes} of the wanted files in the tar.gz file."""
        files, is_cifar = {}, False
        try:
            with gzip.open(self._path) as file, tarfile.open(fileobj=file) as archive:
                for member in archive:
                    folder, name = os.path.split(member.name)
                    is_cifar |= folder.endswith('cifar-10-batches-py')
                    if name in wanted and member.isfile():
                        files[name] = archive.extractfile(member).read()
                while file.read(1 << 20):  # gzip compares its checksum at the end
                    pass
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise unusable(self._path, f'is damaged: {first_line(error)}', self._field) from error
        if not is_cifar:
            raise unrecognised(self._path, self._field)
        return files

    def _unpickle(self, name, data):
        """Return the dictionary in one of the files; raises UserError unless its arrays are as published."""
        try:
            content = _PixelUnpickler(io.BytesIO(data), encoding='bytes').load()
            if name == _META:
                fits = all(isinstance(label, bytes) for label in content[b'label_names'])
            else:
                pixels, labels = content[b'data'], np.asarray(content[b'labels'])
                fits = pixels.dtype == np.uint8 and pixels.shape == (len(labels), np.prod(_SHAPE))
                fits = fits and len(labels) and labels.dtype.kind == 'i'
        except Exception as error:  # a damaged pickle can raise anything
            raise unusable(self._path, f'has a {name} that cannot be read: {first_line(error)}', self._field) from error
        if not fits:
            raise unusable(self._path, f'has a {name} that differs from the published layout of CIFAR-10', self._field)
        return content


def _stack(contents):
    """Return uint8 [N, 3072]: the red, green and blue planes of each image."""
    return np.concatenate([batch[b'data'] for batch in contents.values()])


class _PixelUnpickler(pickle.Unpickler):
    """An unpickler of lists, dictionaries and NumPy arrays that refuses to call anything else."""

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
            raise pickle.UnpicklingError(f'it calls {module}.{name}, which no array needs')
        return self._ALLOWED[module, name]
