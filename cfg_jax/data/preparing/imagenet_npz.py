"""ImageNet in the two forms that it is published in: downsampled, as NumPy archives, and whole, as tar files."""

import contextlib
import io
import os
import re
import tarfile
import threading
import zipfile

import numpy as np

from cfg_jax.data.images import first_line
from cfg_jax.data.preparing.raw_images import (
    RECOGNISED,
    RawImages,
    ReadAt,
    check_split,
    counted,
    is_image_name,
    stamp,
    unusable,
)
from cfg_jax.errors import UserError

NPZ_PREFIXES = {'train': 'train', 'validation': 'val'}
_BATCH = re.compile(r'(train_data_batch_|val_data).*\.npz', re.IGNORECASE)
_TAIL = 4 << 20  # bytes; a batch's labels take one
BLOCK = 512  # bytes of a tar header; one of zeros ends the archive

# Downsampled ImageNet: NumPy archives of pixels.


def is_npz_name(name):
    return name.lower().endswith('.npz')


def npz_members(path, field):
    """The .npz files in a zip file; none count beside images."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise unusable(path, f'is a damaged zip file: {first_line(error)}', field) from error
    return [] if any(map(is_image_name, names)) else [name for name in names if is_npz_name(name)]


def holds_batches(folder):
    """Whether a batch of downsampled ImageNet is in the folder, or a zip file of such."""
    names = os.listdir(folder)
    return any(map(_is_batch, (os.path.join(folder, name) for name in names if is_npz_name(name)))) or any(
        _is_zip_of_batches(os.path.join(folder, name)) for name in names if name.lower().endswith('npz.zip')
    )


def _is_batch(path):
    """Whether an .npz file is one by its name or, where that may be any, by its arrays."""
    if not os.path.isfile(path):
        return False
    if _BATCH.fullmatch(os.path.basename(path)):
        return True
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return {'data.npy', 'labels.npy'} <= set(archive.namelist())
    return False


def _is_zip_of_batches(path):
    if not os.path.isfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_BATCH.fullmatch(os.path.basename(name)) for name in archive.namelist())
    except zipfile.BadZipFile:
        return True  # by its name it is, and what is wrong with it will be said


def _natural(text):
    """A key that sorts batch 2 before batch 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', text)]


class ImagenetNpz(RawImages):
    """Downsampled ImageNet as published. A process that reads holds few pixels at once, for batches may be compressed.

    Reading is quick in order of index; a change of batch reads a whole one for its checksum, a step back up to one.
    """

    _lock = threading.Lock()

    def __init__(self, path, split, field):
        check_split(split, NPZ_PREFIXES, path)
        self._path, self._field = path, field
        self._files = self._find(split)
        labels, shapes = zip(*(self._read_labels(stem) for stem in self._files))
        if len({shape[1] for shape in shapes}) > 1:
            raise unusable(path, 'holds images of several sizes', field)
        self._side = round((shapes[0][1] / 3) ** 0.5)
        if 3 * self._side**2 != shapes[0][1]:
            raise unusable(path, f'has rows of {shapes[0][1]} numbers, which is no square RGB image', field)
        self._starts = np.cumsum([0, *(shape[0] for shape in shapes)])
        self._pixels = None
        names = [f'{stem}/{row}' for stem, shape in zip(self._files, shapes) for row in range(shape[0])]
        labels = np.concatenate(labels)
        if len(np.unique(labels)) == labels.max() == 1000:
            class_names = _tfds_lines('image_classification/imagenet_resized_labels.txt')
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
        """{stem: (file, member of that zip file or None)} of the split's batches, in their order."""
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
                if other or not stem.startswith(NPZ_PREFIXES[split]):
                    others.append(stem)
                elif stem in found:
                    raise unusable(self._path, f'holds {stem}.npz twice, in {found[stem][0]} and {path}', self._field)
                else:
                    found[stem] = (path, member)
        if not found:
            has = f'; it has {others[0]}.npz' if others else ''
            raise UserError(
                f'{self._path} holds no {NPZ_PREFIXES[split]}*.npz for the split {split!r}{has} '
                f'({self._field}, or config.data.split: train, validation).'
            )
        return {stem: found[stem] for stem in sorted(found, key=_natural)}

    @contextlib.contextmanager
    def _errors(self, stem):
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # damage shows as errors of zip files, of zlib, of NumPy
            path = self._files[stem][0]
            raise unusable(path, f'has a {stem}.npz that cannot be read: {first_line(error)}', self._field) from error

    @contextlib.contextmanager
    def _opened(self, stem):
        """(the batch as NumPy opens it, arrays unread; whether a checksum of it all was compared)."""
        path, member = self._files[stem]
        with contextlib.ExitStack() as stack:
            file = path
            if member is not None:
                archive = stack.enter_context(zipfile.ZipFile(path))
                inner = _Member(archive.open(member), archive.getinfo(member).file_size)
                file = stack.enter_context(io.BufferedReader(inner, 1 << 20))
            yield stack.enter_context(np.load(file, allow_pickle=False)), member is not None

    def _read_labels(self, stem):
        """(labels int [n], the shape of the pixels), without decoding these."""
        with self._errors(stem), self._opened(stem) as (batch, _):
            labels = batch['labels'].ravel()
            with batch.zip.open('data.npy') as file:
                shape, dtype = _read_header(file)
            if dtype != np.uint8 or len(shape) != 2 or shape[0] != len(labels) or not len(labels):
                raise unusable(
                    self._path, f'has a {stem}.npz whose data are {dtype} {shape}, labels {labels.shape}', self._field
                )
            if labels.dtype.kind not in 'iu' or labels.min() < 1 or labels.max() > 1000:
                raise unusable(self._path, f'has a {stem}.npz with labels that are not 1 to 1000', self._field)
            return labels.astype(np.int32), shape


def _read_header(file):
    """(shape, dtype) of an .npy file, which is left where the numbers begin."""
    version = np.lib.format.read_magic(file)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[version[0]](file)
    return shape, dtype


class _Pixels:
    """The rows of one batch's array `data`, read one by one once its checksum was found to be right.

    opened: a context manager, as ImagenetNpz has it.
    """

    def __init__(self, stem, opened):
        self.stem, self._stack = stem, contextlib.ExitStack()
        batch, compared = self._stack.enter_context(opened)
        if not compared:
            with batch.zip.open('data.npy') as file:
                while file.read(1 << 20):  # to the end, where zipfile compares
                    pass
        self._file = self._stack.enter_context(batch.zip.open('data.npy'))
        (_, self._width), _ = _read_header(self._file)
        self._start = self._file.tell()

    def row(self, number):
        """uint8 [numbers a row]."""
        self._file.seek(self._start + number * self._width)  # forwards it skips, backwards it begins anew
        return np.frombuffer(self._file.read(self._width), np.uint8)

    def close(self):
        self._stack.close()


class _Member(io.RawIOBase):
    """A member of a zip file, read through once, for its checksum, and its end kept.

    There a zip file within it has its index, and perhaps labels; without it each look there would decompress all.
    """

    def __init__(self, file, size):
        self._file, self._position = file, 0
        self._size, self._end = size, max(size - _TAIL, 0)  # from where it is kept
        left = self._end
        while left:  # not `seek`, which may compare no checksum
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


# ImageNet itself: tar files of JPEGs.


def _tfds_lines(path):
    """The lines of a list that comes with TFDS."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(path).read_text().split()


class ImagenetTar(RawImages):
    """ILSVRC2012's tar files as published, neither unpacked nor copied: each image is read from where it lies."""

    def __init__(self, path, split, field):
        check_split(split, ('train', 'validation'), path)
        size = os.path.getsize(path)
        with open(path, 'rb') as file:
            members = list(counted(_tar_members(file, 0, size, path, field), path))
            inner = [member for member in members if member[0].endswith('.tar')]
            images, ignored = _images_among([member for member in members if not member[0].endswith('.tar')])
            is_train = bool(inner) and not images
            if not is_train and (inner or not images or len({os.path.dirname(name) for name, _, _ in images}) > 1):
                raise unusable(path, f'is nothing that is recognised: {RECOGNISED}', field)
            if is_train != (split == 'train'):
                raise UserError(
                    f'{path} is of the split {"train" if is_train else "validation"!r}, not {split!r} '
                    f'({field}, config.data.split).'
                )
            if is_train:
                images, more = _images_among(counted(_train_members(file, inner, path, field), path))
                ignored += more
        images.sort()
        class_names, labels = (_train_labels if is_train else _validation_labels)(images, path, field)
        super().__init__('imagenet_tar', class_names, [name for name, _, _ in images], labels, ignored)
        self._offsets = np.array([offset for _, offset, _ in images], np.int64)
        self._sizes = np.array([size for _, _, size in images], np.int64)
        self._read_at = ReadAt(path)

    def read(self, index):
        return self._read_at(int(self._offsets[index]), int(self._sizes[index]))

    def stamps(self):
        return [stamp(self._read_at.path)]


def _tar_members(file, start, end, path, field):
    """(name, offset, bytes) of the files in the tar archive from byte `start` to `end` of a file."""
    file.seek(start)
    try:
        archive = tarfile.TarFile(fileobj=file)
        for member in archive:
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f'it ends within {member.name}')
            if member.isfile():
                yield member.name.removeprefix('./'), member.offset_data, member.size
        # tarfile takes a broken header for the end, which two blocks of zeros are
        if archive.offset + BLOCK > end or any(os.pread(file.fileno(), BLOCK, archive.offset)):
            raise tarfile.ReadError(f'it breaks off at byte {archive.offset}')
    except tarfile.TarError as error:
        raise unusable(path, f'is a damaged or truncated tar file: {first_line(error)}', field) from error


def _train_members(file, inner, path, field):
    """The files within tar files within the tar file, each named with its tar file's stem as folder."""
    for name, offset, size in inner:
        folder = os.path.splitext(os.path.basename(name))[0]
        for member, *place in _tar_members(file, offset, offset + size, path, field):
            yield f'{folder}/{os.path.basename(member)}', *place


def _images_among(members):
    """(the members that are images by their names, [(name, reason)] of the others)."""
    images, ignored = [], []
    for member in members:
        if is_image_name(member[0]):
            images.append(member)
        else:
            ignored.append((member[0], 'not an image by its name'))
    return images, ignored


def _train_labels(images, path, field):
    if not images:
        raise unusable(path, 'holds tar files without images', field)
    folders = [name.partition('/')[0] for name, _, _ in images]
    class_names = _tfds_lines('datasets/imagenet2012/labels.txt')
    if not set(folders) <= set(class_names):
        class_names = sorted(set(folders))
    ids = {name: index for index, name in enumerate(class_names)}
    return class_names, [ids[folder] for folder in folders]


def _validation_labels(images, path, field):
    class_names = _tfds_lines('datasets/imagenet2012/labels.txt')
    labels = _tfds_lines('datasets/imagenet2012/validation_labels.txt')
    if len(images) != len(labels):
        raise unusable(
            path, f'holds {len(images):,} images; ImageNet validation has {len(labels):,}, labelled by order', field
        )
    ids = {name: index for index, name in enumerate(class_names)}
    return class_names, [ids[label] for label in labels]
