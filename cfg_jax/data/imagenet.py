"""ImageNet in the two forms that it is published in: downsampled, as NumPy archives, and whole, as tar files."""

import contextlib
import io
import os
import re
import tarfile
import threading
import zipfile

import numpy as np

from cfg_jax.data.folders import RECOGNISED, RawImages, ReadAt, check_split, counted, is_image_name, unusable
from cfg_jax.data.images import first_line
from cfg_jax.errors import UserError

NPZ_PREFIXES = {'train': 'train', 'validation': 'val'}
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


def _natural(text):
    """A key that sorts batch 2 before batch 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', text)]


class ImagenetNpz(RawImages):
    """Downsampled ImageNet as published. Each process that reads holds one batch's pixels, 1.6 GB at 64x64.

    Reading is quick in order of index; each change of batch decodes a whole one.
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
        self._batch = (None, None)  # number, pixels
        names = [f'{stem}/{row}' for stem, shape in zip(self._files, shapes) for row in range(shape[0])]
        labels = np.concatenate(labels)
        if len(np.unique(labels)) == labels.max() == 1000:
            class_names = _tfds_lines('image_classification/imagenet_resized_labels.txt')
        else:
            class_names = [str(label) for label in range(1, labels.max() + 1)]
        super().__init__('imagenet_npz', class_names, names, labels - 1)

    def __getstate__(self):
        return {**self.__dict__, '_batch': (None, None)}

    def read(self, index):
        number = int(np.searchsorted(self._starts, index, side='right')) - 1
        with self._lock:
            if self._batch[0] != number:
                self._batch = (None, None)  # makes room first
                self._batch = (number, self._read_pixels(list(self._files)[number]))
            row = self._batch[1][index - self._starts[number]]
        return np.ascontiguousarray(row.reshape(3, self._side, self._side).transpose(1, 2, 0))

    def _find(self, split):
        """{stem: (file, member of that zip file or None)} of the split's batches, in their order."""
        paths = [self._path]
        if os.path.isdir(self._path):
            paths = [os.path.join(self._path, name) for name in sorted(os.listdir(self._path))]
        found, others = {}, []
        for path in paths:
            if is_npz_name(path):
                members = [None]
            elif path == self._path or path.lower().endswith('.zip'):
                members = npz_members(path, self._field)
            else:
                continue
            for member in members:
                stem = os.path.splitext(os.path.basename(member or path))[0]
                if not stem.startswith(NPZ_PREFIXES[split]):
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
    def _opened(self, stem):
        """The batch as NumPy opens it, arrays unread."""
        path, member = self._files[stem]
        try:
            with contextlib.ExitStack() as stack:
                file = path
                if member is not None:
                    archive = stack.enter_context(zipfile.ZipFile(path))
                    file = stack.enter_context(archive.open(member))
                    if archive.getinfo(member).compress_type != zipfile.ZIP_STORED:
                        file = io.BytesIO(file.read())  # going back in it would decompress from its start
                yield stack.enter_context(np.load(file, allow_pickle=False))
        except UserError:
            raise
        except Exception as error:  # damage shows as errors of zip files, of zlib, of NumPy
            raise unusable(path, f'has a {stem}.npz that cannot be read: {first_line(error)}', self._field) from error

    def _read_labels(self, stem):
        """(labels int [n], the shape of the pixels), without decoding these."""
        with self._opened(stem) as batch:
            labels = batch['labels'].ravel()
            with batch.zip.open('data.npy') as file:
                version = np.lib.format.read_magic(file)
                read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, _, dtype = read_header[version[0]](file)
            if dtype != np.uint8 or len(shape) != 2 or shape[0] != len(labels) or not len(labels):
                raise unusable(
                    self._path, f'has a {stem}.npz whose data are {dtype} {shape}, labels {labels.shape}', self._field
                )
            if labels.dtype.kind not in 'iu' or labels.min() < 1 or labels.max() > 1000:
                raise unusable(self._path, f'has a {stem}.npz with labels that are not 1 to 1000', self._field)
            return labels.astype(np.int32), shape

    def _read_pixels(self, stem):
        with self._opened(stem) as batch:
            return batch['data']


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
