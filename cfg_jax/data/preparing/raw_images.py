"""Labelled images as an archive stores them, undecoded: what each kind of archive in this folder provides."""

import os
import struct
import time

import numpy as np

from cfg_jax.data.images import ImageError, Unreadable
from cfg_jax.errors import UserError, first_line, printable, unusable

_RECOGNISED = (
    'a folder or zip file of images, cifar-10-python.tar.gz or cifar-10-batches-py, MNIST and its like '
    '(train-images-idx3-ubyte.gz or its folder), downsampled ImageNet '
    '(train_data_batch_*.npz, val_data.npz or zip files of them), ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar'
)
SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
PROGRESS_SECONDS = 5
# Folders that file systems, file servers and desktops add, in lower case: they may be unreadable, or hold thumbnails.
_SYSTEM_FOLDERS = {
    '__macosx', '$recycle.bin', 'recycler', 'system volume information', 'lost+found',
    '@eadir', '@tmp', '@recycle', '@recently-snapshot', '@__thumb', '#recycle', '#snapshot', '~snapshot',
}  # fmt: skip


class RawImages:
    """A sequence of labelled images as they are stored. It pickles; each process that reads opens the files itself.

    kind: 'folder' | 'zip' | 'cifar10' | 'idx' | 'imagenet_npz' | 'imagenet_tar'. class_names: tuple of str. names:
    unique relative names, always in the same order. labels: int32 [N]. ignored: list of (name, reason) of the entries
    that are no images.
    """

    def __init__(self, kind, class_names, names, labels, ignored=()):
        self.kind, self.class_names, self.names = kind, tuple(class_names), names
        self.labels, self.ignored = np.asarray(labels, np.int32), list(ignored)

    def __len__(self):
        return len(self.names)

    def read(self, index):
        """Return image `index`: the bytes of an encoded file, or uint8 [H, W, C] if the archive holds pixels.

        Raises ImageError if this image cannot be read, UserError if others cannot be read either.
        """
        raise NotImplementedError

    def stamps(self):
        """Return an iterable of bytes that differ once the files do.

        They are sizes and times of change, or checksums, whichever is cheaper to get.
        """
        raise NotImplementedError


class ReadAt:
    """A function that reads pieces of one file. It opens the file at the first call, and pickles without it."""

    def __init__(self, path):
        self.path, self._file = path, None

    def __getstate__(self):
        return {'path': self.path, '_file': None}

    def __del__(self):
        if self._file is not None:
            self._file.close()

    def __call__(self, offset, size):
        """Return `size` bytes from byte `offset` on; raises ImageError."""
        try:
            file = self._file
            if file is None:  # several threads may open it at once, and each then uses its own
                file = self._file = open(self.path, 'rb')  # noqa: SIM115, it stays open
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise Unreadable(f'unreadable: {error.strerror or first_line(error)}') from error
        if len(data) < size:
            raise ImageError('truncated')
        return data


def unrecognised(path, field):
    """Return the UserError for a path that is none of the archives."""
    return unusable(path, f'is not recognised; allowed: {_RECOGNISED}', field)


def stamp(path):
    """Return the size of a file and the time of its last change, as bytes; no bytes if the file is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return b''
    return struct.pack('<qq', status.st_size, status.st_mtime_ns)


def notes(class_names, counts, ignored):
    """Yield lines about possible mistakes: classes that have no image, and entries that were ignored.

    counts: int, the number of images of each class. ignored: as in `RawImages`.
    """
    empty = [printable(name) for name, count in zip(class_names, counts) if not count]
    if empty:
        more = ', ...' if empty[5:] else ''
        yield f'{len(empty)} of {len(class_names)} classes have no images: {", ".join(empty[:5])}{more}'
    if ignored:
        name, reason = ignored[0]
        yield f'ignored {len(ignored)} other entries, such as {printable(name)}: {reason}'


def check_split(split, splits, path):
    """Raise UserError unless the archive has this split."""
    if split not in splits:
        raise UserError(f'{path} has the splits {", ".join(map(repr, splits))}, not {split!r} (config.data.split).')


def counted(items, path, what='files found'):
    """Yield the items, and print every PROGRESS_SECONDS how many there were so far: `what` they are, and are done."""
    printed = time.monotonic()
    for count, item in enumerate(items, 1):
        if time.monotonic() - printed >= PROGRESS_SECONDS:
            printed = time.monotonic()
            print(f'{printable(path)}: {count:,} {what} so far', flush=True)
        yield item


def is_image_name(name):
    """Return True if a file is an image by its name."""
    return name.lower().endswith(SUFFIXES)


def is_hidden(part):
    """Return True if a file or folder of this name, without its path, is never looked at."""
    return part.startswith('.') or part.lower() in _SYSTEM_FOLDERS
