"""ImageNet itself: ILSVRC2012's tar files of JPEGs."""

import os
import tarfile

import numpy as np

from cfg_jax.data.preparing.labels import natural, tfds_lines
from cfg_jax.data.preparing.raw_images import (
    RawImages,
    ReadAt,
    check_split,
    counted,
    is_image_name,
    stamp,
    unrecognised,
)
from cfg_jax.errors import UserError, first_line, unusable

_BLOCK = 512  # bytes of a tar header; two blocks of zeros end the archive


class ImagenetTar(RawImages):
    """ILSVRC2012's tar files as published. They are neither unpacked nor copied: images are read in place."""

    def __init__(self, path, split, field):
        check_split(split, ('train', 'validation'), path)
        size = os.path.getsize(path)
        with open(path, 'rb') as file:
            members = list(counted(_members(file, 0, size, path, field), path))
            inner = [member for member in members if member[0].endswith('.tar')]
            images, ignored = _images_among([member for member in members if not member[0].endswith('.tar')])
            is_train = bool(inner) and not images
            if not is_train and (inner or not images or len({os.path.dirname(name) for name, _, _ in images}) > 1):
                raise unrecognised(path, field)
            if is_train != (split == 'train'):
                raise UserError(
                    f'{path} holds the split {"train" if is_train else "validation"!r}, not {split!r} '
                    f'({field}, config.data.split).'
                )
            if is_train:
                images, more = _images_among(counted(_inner_members(file, inner, path, field), path))
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


def _members(file, start, end, path, field):
    """Yield (name, offset, bytes) of the files in the tar archive from byte `start` to `end` of a file."""
    file.seek(start)
    try:
        archive = tarfile.TarFile(fileobj=file)
        for member in archive:
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f'it ends within {member.name}')
            if member.isfile():
                yield member.name.removeprefix('./'), member.offset_data, member.size
        # tarfile takes a broken header for the end of the archive
        if archive.offset + _BLOCK > end or any(os.pread(file.fileno(), _BLOCK, archive.offset)):
            raise tarfile.ReadError(f'it breaks off at byte {archive.offset}')
    except tarfile.TarError as error:
        raise unusable(path, f'is a damaged or truncated tar file: {first_line(error)}', field) from error


def _inner_members(file, inner, path, field):
    """Yield the files of the tar files within the tar file, each named <stem of its tar file>/<its own name>."""
    for name, offset, size in inner:
        folder = os.path.splitext(os.path.basename(name))[0]
        for member, *span in _members(file, offset, offset + size, path, field):
            yield f'{folder}/{os.path.basename(member)}', *span


def _images_among(members):
    """Return (the members that are images by their names, [(name, reason)] of the others)."""
    images, ignored = [], []
    for member in members:
        if is_image_name(member[0]):
            images.append(member)
        else:
            ignored.append((member[0], 'not an image by its name'))
    return images, ignored


def _train_labels(images, path, field):
    """Return (class names, labels) from the images' folders; the classes are TFDS's if these include all folders."""
    if not images:
        raise unusable(path, 'holds tar files without images', field)
    folders = [name.partition('/')[0] for name, _, _ in images]
    class_names = tfds_lines('datasets/imagenet2012/labels.txt')
    if not set(folders) <= set(class_names):
        class_names = sorted(set(folders), key=natural)
    ids = {name: index for index, name in enumerate(class_names)}
    return class_names, [ids[folder] for folder in folders]


def _validation_labels(images, path, field):
    """Return (class names, labels) from TFDS's list, which is in the order of the images' names."""
    class_names = tfds_lines('datasets/imagenet2012/labels.txt')
    labels = tfds_lines('datasets/imagenet2012/validation_labels.txt')
    if len(images) != len(labels):
        raise unusable(path, f'holds {len(images):,} images; the validation split has {len(labels):,}', field)
    ids = {name: index for index, name in enumerate(class_names)}
    return class_names, [ids[label] for label in labels]
