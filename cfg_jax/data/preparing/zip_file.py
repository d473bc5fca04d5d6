"""A zip file of a folder of images."""

import contextlib
import zipfile
import zlib

import numpy as np

from cfg_jax.data.images import ImageError
from cfg_jax.data.preparing.labels import find_labels, organise
from cfg_jax.data.preparing.raw_images import RawImages, ReadAt, is_hidden, is_image_name
from cfg_jax.errors import first_line, unusable
from cfg_jax.files import ZIP_HEADER_BYTES, zip_header_size

_DEFLATED = zipfile.ZIP_DEFLATED
_ENCRYPTED_FLAG, _UTF8_FLAG = 0x1, 0x800  # of a member


class ImageZip(RawImages):
    """A zip file of a folder of images.

    Its only top folder is taken for the root if it holds class folders, or images and their labels.
    """

    def __init__(self, path, field):
        try:
            with zipfile.ZipFile(path) as archive:
                members = _without_top(_members(archive, path, field), archive.read)
                organised = organise(list(members), lambda name: archive.read(members[name]), path, field)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise unusable(path, f'is a damaged zip file: {first_line(error)}', field) from error
        super().__init__('zip', *organised)
        # Enough to read a member without a ZipFile, which would build its index of a million members in each process.
        infos = [members[name] for name in self.names]
        self._offsets = np.array([info.header_offset for info in infos], np.int64)
        self._sizes = np.array([(info.compress_size, info.file_size) for info in infos], np.int64).reshape(-1, 2)
        self._checksums = np.array([info.CRC for info in infos], np.int64)
        self._deflated = np.array([info.compress_type == _DEFLATED for info in infos])
        self._read_at = ReadAt(path)

    def read(self, index):
        offset, (stored, size) = int(self._offsets[index]), self._sizes[index].tolist()
        start = offset + zip_header_size(self._read_at(offset, ZIP_HEADER_BYTES))
        data = self._read_at(start, stored)
        try:
            if self._deflated[index]:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        except zlib.error as error:
            raise ImageError('damaged in the zip file') from error
        if zlib.crc32(data) != self._checksums[index]:
            raise ImageError('damaged in the zip file')
        return data

    def stamps(self):
        return (self._sizes.tobytes(), self._checksums.tobytes())


def _members(archive, path, field):
    """Return {name: ZipInfo} of the files in a zip file, without hidden ones."""
    members = {}
    for info in archive.infolist():
        name = _name(info)
        parts = [part for part in name.split('/') if part not in ('', '.')]
        if not name.endswith('/') and not any(map(is_hidden, parts)):
            members['/'.join(parts)] = info
    for name, info in members.items():
        if info.flag_bits & _ENCRYPTED_FLAG:
            raise unusable(path, f'is encrypted ({name}): unpack it and give the folder', field)
        if info.compress_type not in (zipfile.ZIP_STORED, _DEFLATED):
            raise unusable(
                path, f'is compressed by a method other than deflate ({name}): unpack it and give the folder', field
            )
    return members


def _name(info):
    """Return a member's name, also as Windows and macOS write it: with backslashes, or in UTF-8 not marked as such."""
    name = info.filename
    if not info.flag_bits & _UTF8_FLAG:
        with contextlib.suppress(UnicodeError):
            name = name.encode('cp437').decode()  # zipfile decoded it as cp437
    return name.replace('\\', '/')


def _without_top(members, read):
    """Return the members named from inside their only top folder, if that holds class folders or labels.

    Otherwise that folder may itself be a class, and the members are returned as they are.
    """
    names = list(filter(is_image_name, members))
    tops = {name.partition('/')[0] for name in names if '/' in name}
    if len(tops) != 1 or not all('/' in name for name in names):
        return members
    top = f'{tops.pop()}/'
    inside = {name.removeprefix(top): info for name, info in members.items() if name.startswith(top)}
    if find_labels(members, lambda name: read(members[name])):
        return members
    if any(name.count('/') > 1 for name in names) or find_labels(inside, lambda name: read(inside[name])):
        return {name: info for name, info in members.items() if not name.startswith(top)} | inside
    return members
