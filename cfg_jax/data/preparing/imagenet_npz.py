"""Downsampled ImageNet: batches of pixels in npz files, as they are or packed into zip files."""

import contextlib
import io
import os
import re
import threading
import zipfile

import numpy as np

from cfg_jax.data.preparing.labels import natural, tfds_lines
from cfg_jax.data.preparing.raw_images import RawImages, check_split, is_image_name, stamp
from cfg_jax.errors import UserError, first_line, unusable
from cfg_jax.files import read_npy_header

_PREFIXES = {'train': 'train', 'validation': 'val'}  # of the names of a split's batches
_BATCH = re.compile(r'(train_data_batch_|val_data).*\.npz', re.IGNORECASE)
_TAIL = 4 << 20  # bytes; the labels of a batch take 1 MiB


def is_npz_name(name):
    """Return True if a file is an npz file by its name."""
    return name.lower().endswith('.npz')


def npz_members(path, field):
    """Return the names of the npz files in a zip file, or none if it also holds images."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise unusable(path, f'is a damaged zip file: {first_line(error)}', field) from error
    return [] if any(map(is_image_name, names)) else [name for name in names if is_npz_name(name)]


def holds_batches(folder):
    """Return True if the folder holds a batch of downsampled ImageNet, or a zip file of batches."""
    names = os.listdir(folder)
    return any(map(_is_batch, (os.path.join(folder, name) for name in names if is_npz_name(name)))) or any(
        _is_zip_of_batches(os.path.join(folder, name)) for name in names if name.lower().endswith('npz.zip')
    )


def _is_batch(path):
    """Return True if an npz file is a batch by its name, or else by its arrays."""
    if not os.path.isfile(path):
        return False
    if _BATCH.fullmatch(os.path.basename(path)):
        return True
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return {'data.npy', 'labels.npy'} <= set(archive.namelist())
    return False


def _is_zip_of_batches(path):
    """Return True if a zip file holds a batch, or if it is damaged: reading it then says so."""
    if not os.path.isfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_BATCH.fullmatch(os.path.basename(name)) for name in archive.namelist())
    except zipfile.BadZipFile:
        return True


class ImagenetNpz(RawImages):
    """Downsampled ImageNet as published. Each process keeps few pixels in memory, for batches may be compressed.

    Reading is quick in the order of index. A change of batch reads the whole new batch for its checksum, and a step
    back reads up to a whole batch.
    """

    _lock = threading.Lock()

    def __init__(self, path, split, field):
        check_split(split, _PREFIXES, path)
        self._path, self._field = path, field
        self._files = self._find(split)
        labels, shapes = zip(*(self._read_labels(stem) for stem in self._files))
        if len({shape[1] for shape in shapes}) > 1:
            raise unusable(path, 'holds images of several sizes', field)
        self._side = round((shapes[0][1] / 3) ** 0.5)
        if 3 * self._side**2 != shapes[0][1]:
            raise unusable(path, f'has rows of {shapes[0][1]} numbers, which is not a square RGB image', field)
        self._starts = np.cumsum([0, *(shape[0] for shape in shapes)])
        self._pixels = None
        names = [f'{stem}/{row}' for stem, shape in zip(self._files, shapes) for row in range(shape[0])]
        labels = np.concatenate(labels)
        if len(np.unique(labels)) == labels.max() == 1000:
            class_names = tfds_lines('image_classification/imagenet_resized_labels.txt')
        else:
            class_names = [str(label) for label in range(1, labels.max() + 1)]
        super().__init__('imagenet_npz', class_names, names, labels - 1)

    def __getstate__(self):
        return {**self.__dict__, '_pixels': None}

    def read(self, index):
        number = int(np.searchsorted(self._starts, index, side='right')) - 1
        stem = list(self._files)[number]
        with self._lock, self._errors(stem):
            if self._pixels is None or self._pixels.stem != stem:
                if self._pixels is not None:
                    self._pixels.close()
                self._pixels = None
                self._pixels = _Pixels(stem, self._opened(stem))
            row = self._pixels.row(int(index - self._starts[number]))
        return np.ascontiguousarray(row.reshape(3, self._side, self._side).transpose(1, 2, 0))

    def stamps(self):
        return (stamp(path) for path in dict.fromkeys(path for path, _ in self._files.values()))

    def _find(self, split):
        """Return {stem: (file, member of that zip file or None)} of the split's batches, in order."""
        paths = [self._path]
        if os.path.isdir(self._path):
            paths = [os.path.join(self._path, name) for name in sorted(os.listdir(self._path))]
            paths = [
                path for path in paths if _is_batch(path) or (path.lower().endswith('.zip') and os.path.isfile(path))
            ]
        found, others = {}, []
        for path in paths:
            for member in [None] if is_npz_name(path) else npz_members(path, self._field):
                stem = os.path.splitext(os.path.basename(member or path))[0]
                other = member is not None and not _BATCH.fullmatch(os.path.basename(member))
                if other or not stem.startswith(_PREFIXES[split]):
                    others.append(stem)
                elif stem in found:
                    raise unusable(self._path, f'holds {stem}.npz twice, in {found[stem][0]} and {path}', self._field)
                else:
                    found[stem] = (path, member)
        if not found:
            has = f'; it has {others[0]}.npz' if others else ''
            raise UserError(
                f'{self._path} holds no {_PREFIXES[split]}*.npz for the split {split!r}{has} '
                f'({self._field}, or config.data.split: train, validation).'
            )
        return {stem: found[stem] for stem in sorted(found, key=natural)}

    @contextlib.contextmanager
    def _errors(self, stem):
        """Turn whatever goes wrong in reading a batch into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy each raise their own kinds for damage
            path = self._files[stem][0]
            raise unusable(path, f'has a {stem}.npz that cannot be read: {first_line(error)}', self._field) from error

    @contextlib.contextmanager
    def _opened(self, stem):
        """Yield (the batch as NumPy opens it, arrays unread; True if the checksum of the whole was compared)."""
        path, member = self._files[stem]
        with contextlib.ExitStack() as stack:
            file = path
            if member is not None:
                archive = stack.enter_context(zipfile.ZipFile(path))
                inner = _Member(archive.open(member), archive.getinfo(member).file_size)
                file = stack.enter_context(io.BufferedReader(inner, 1 << 20))
            yield stack.enter_context(np.load(file, allow_pickle=False)), member is not None

    def _read_labels(self, stem):
        """Return (labels int [n], the shape of the pixels), without decoding the pixels."""
        with self._errors(stem), self._opened(stem) as (batch, _):
            labels = batch['labels'].ravel()
            with batch.zip.open('data.npy') as file:
                dtype, shape, _ = read_npy_header(file)
            if dtype != np.uint8 or len(shape) != 2 or shape[0] != len(labels) or not len(labels):
                raise unusable(
                    self._path,
                    f'has a {stem}.npz with data {dtype} {shape} and labels {labels.shape}; needed are uint8 [n, 3 HW] '
                    'and [n]',
                    self._field,
                )
            if labels.dtype.kind not in 'iu' or labels.min() < 1 or labels.max() > 1000:
                raise unusable(self._path, f'has a {stem}.npz with labels that are not 1 to 1000', self._field)
            return labels.astype(np.int32), shape


class _Pixels:
    """The rows of one batch's array `data`, read one by one after its checksum was found to be right.

    opened: a context manager, as of `ImagenetNpz._opened`.
    """

    def __init__(self, stem, opened):
        self.stem, self._stack = stem, contextlib.ExitStack()
        batch, compared = self._stack.enter_context(opened)
        if not compared:
            with batch.zip.open('data.npy') as file:
                while file.read(1 << 20):  # zipfile compares the checksum at the end
                    pass
        self._file = self._stack.enter_context(batch.zip.open('data.npy'))
        _, (_, self._width), _ = read_npy_header(self._file)
        self._start = self._file.tell()

    def row(self, number):
        """Return a row, uint8 [3 HW]."""
        self._file.seek(self._start + number * self._width)  # a seek backwards decompresses from the start again
        return np.frombuffer(self._file.read(self._width), np.uint8)

    def close(self):
        self._stack.close()


class _Member(io.RawIOBase):
    """A member of a zip file that is itself a zip file. It is read through once for its checksum, and its end kept.

    The inner zip file's index, and perhaps the labels, are at that end: without it, each look at them would decompress
    the whole member.
    """

    def __init__(self, file, size):
        self._file, self._position = file, 0
        self._size, self._end = size, max(size - _TAIL, 0)  # bytes from `_end` on are kept
        left = self._end
        while left:  # `seek` may skip the checksum
            left -= len(file.read(min(left, 1 << 20))) or left
        self._kept = file.read()

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self._position

    def seek(self, offset, whence=io.SEEK_SET):
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer):
        if self._position < self._end:
            self._file.seek(self._position)
            data = self._file.read(min(len(buffer), self._end - self._position))
        else:
            data = self._kept[self._position - self._end :][: len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self):
        self._file.close()
        super().close()
