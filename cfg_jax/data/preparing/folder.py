"""A folder of images: in class folders, or labelled by a labels.json, or all of one class."""

import os

from cfg_jax.data.images import Unreadable
from cfg_jax.data.preparing.labels import organise
from cfg_jax.data.preparing.raw_images import RawImages, counted, is_hidden, is_image_name, stamp


class ImageFolder(RawImages):
    """A folder of images, at any depth."""

    def __init__(self, path, field):
        self._path = path
        entries = list(counted(_walk(path), path))
        unfit = [(name, reason) for name, reason in entries if reason]
        files = [name for name, reason in entries if not reason]
        super().__init__('folder', *organise(files, self._read, path, field, unfit))

    def _read(self, name):
        with open(os.path.join(self._path, name), 'rb') as file:
            return file.read()

    def read(self, index):
        try:
            return self._read(self.names[index])
        except OSError as error:
            raise Unreadable(f'unreadable: {error.strerror}') from error

    def stamps(self):
        return (stamp(os.path.join(self._path, name)) for name in self.names)


def holds_class_folders(path):
    """Return True if a folder within this folder holds an image."""
    return any('/' in name and is_image_name(name) and not reason for name, reason in _walk(path))


def _walk(folder, prefix='', above=()):
    """Yield (relative name, '' or the reason to ignore it) of the files under a folder.

    Links are followed unless they lead back to a folder above. Pipes, sockets and devices are ignored: reading them
    may block for ever.
    """
    resolved = os.path.realpath(folder)
    if resolved in above:
        yield prefix, 'a link to a folder that contains it'
        return
    empty = True
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            name, empty = prefix + entry.name, False
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # only links, for instance one to itself
                yield name, f'a link that cannot be followed: {error.strerror}'
                continue
            if is_folder:
                yield from _walk(entry.path, f'{name}/', (*above, resolved))
            else:
                yield name, '' if is_file else 'a broken link' if entry.is_symlink() else 'not a regular file'
    if empty and prefix:
        yield prefix, 'an empty folder'
