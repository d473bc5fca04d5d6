"""Recognise the archives that data sets come in, and open them as `RawImages`."""

import contextlib
import os

from cfg_jax.data.preparing.cifar10 import Cifar10, is_cifar10_folder
from cfg_jax.data.preparing.folder import ImageFolder, holds_class_folders
from cfg_jax.data.preparing.idx import Idx, holds_idx_files, is_idx_name
from cfg_jax.data.preparing.imagenet_npz import ImagenetNpz, holds_batches, is_npz_name, npz_members
from cfg_jax.data.preparing.imagenet_tar import ImagenetTar
from cfg_jax.data.preparing.raw_images import unrecognised
from cfg_jax.data.preparing.zip_file import ImageZip
from cfg_jax.errors import UserError, first_line, unusable


def open_images(path, *, split='train', name='', field='config.prepare.path'):
    """Open a folder or archive of any kind that this folder knows, as `RawImages`. Raises UserError.

    split: 'train' or 'test' of CIFAR-10 and IDX files, 'train' or 'validation' of ImageNet; folders and zip files have
    no splits. name: the data set's, by which IDX files are chosen and their classes named. field: the config field that
    `path` came from.
    """
    expanded = os.path.expanduser(path)
    with _reading(path, expanded, field):
        kind = _recognise(expanded, field)
        if kind in (ImageFolder, ImageZip):
            return kind(expanded, field)
        return Idx(expanded, split, field, name) if kind is Idx else kind(expanded, split, field)


def open_plain_images(path, *, field):
    """Open a folder of images, or a zip file of one, as `RawImages`. Raises UserError, also for every other archive."""
    expanded = os.path.expanduser(path)
    with _reading(path, expanded, field):
        kind = _recognise(expanded, field)
        if kind not in (ImageFolder, ImageZip):
            raise UserError(
                f'{expanded} is not a folder or zip file of images ({field}, config.data.source); prepare the archive '
                f'first: --mode=prepare --config.prepare.path={expanded} --config.data.source=tfds.'
            )
        return kind(expanded, field)


@contextlib.contextmanager
def _reading(path, expanded, field):
    """Raise UserError if the path does not exist, or if the system does not let us read it."""
    if not os.path.exists(expanded):
        raise UserError(f'no such file or folder: {path!r} ({field}).')
    try:
        yield
    except OSError as error:
        what = f'cannot be read: {error.strerror or first_line(error)}'
        raise unusable(error.filename or expanded, what, field) from error


def _recognise(path, field):
    """Return the class that opens this folder or file."""
    if os.path.isdir(path):
        tests = {Cifar10: is_cifar10_folder, ImagenetNpz: holds_batches, Idx: holds_idx_files}
        kind = next((kind for kind, test in tests.items() if test(path)), ImageFolder)
        return ImageFolder if kind is not ImageFolder and holds_class_folders(path) else kind
    start = b''
    if os.path.isfile(path):  # reading a pipe may block for ever
        with open(path, 'rb') as file:
            start = file.read(512)
    suffix = os.path.splitext(path)[1].lower()
    if is_npz_name(path):
        return ImagenetNpz
    if is_idx_name(os.path.basename(path)) and os.path.isfile(path):
        return Idx
    if start.startswith(b'PK') or suffix == '.zip':
        return ImagenetNpz if npz_members(path, field) else ImageZip
    if start.startswith(b'\x1f\x8b'):
        return Cifar10
    if start[257:262] == b'ustar' or suffix == '.tar':
        return ImagenetTar
    raise unrecognised(path, field)
