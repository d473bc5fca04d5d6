"""Images as they lie, undecoded: what every archive gives, and the two plainest, a folder and a zip file of one."""

import contextlib
import json
import os
import struct
import time
import zipfile
import zlib

import numpy as np

from cfg_jax.data.images import ImageError, first_line
from cfg_jax.errors import UserError

RECOGNISED = (
    'a folder or zip file of images, cifar-10-python.tar.gz or cifar-10-batches-py, downsampled ImageNet '
    '(train_data_batch_*.npz, val_data.npz or zip files of them), ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar'
)
SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
SPLIT_NAMES = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}
MAX_CLASSES = 1_000_000  # a larger id is taken for a mistake
PROGRESS_SECONDS = 5
DEFLATED = zipfile.ZIP_DEFLATED
UTF8_FLAG = 0x800  # of a zip file's member


class RawImages:
    """A sequence of labelled images as they are stored. It pickles; files are opened in the process that reads.

    kind: 'folder' | 'zip' | 'cifar10' | 'imagenet_npz' | 'imagenet_tar'. class_names: tuple of str. names: unique
    relative names, in an order that is the same each time. labels: int32 [N]. ignored: (name, reason) of what was
    left out because its name is no image's.
    """

    def __init__(self, kind, class_names, names, labels, ignored=()):
        self.kind, self.class_names, self.names = kind, tuple(class_names), names
        self.labels, self.ignored = np.asarray(labels, np.int32), list(ignored)

    def __len__(self):
        return len(self.names)

    def read(self, index):
        """Image `index`: the bytes of an encoded file, or uint8 [H, W, C] where the archive holds pixels.

        Raises ImageError if this image cannot be read, UserError if more than this one cannot.
        """
        raise NotImplementedError

    def stamps(self):
        """An iterable of bytes that differ once files do: their sizes and times, or checksums, by what costs least."""
        raise NotImplementedError


class ReadAt:
    """Pieces of a file, read at any place; the file is opened at the first."""

    def __init__(self, path):
        self.path, self._file = path, None

    def __getstate__(self):
        return {'path': self.path, '_file': None}

    def __del__(self):
        if self._file is not None:
            self._file.close()

    def __call__(self, offset, size):
        """`size` bytes from byte `offset`."""
        try:
            file = self._file
            if file is None:  # for several threads perhaps, each of which then reads its own
                file = self._file = open(self.path, 'rb')  # noqa: SIM115, as it stays open
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise ImageError(f'unreadable: {first_line(error)}') from error
        if len(data) < size:
            raise ImageError('truncated')
        return data


def unusable(path, what, field):
    """The error that says in one line what is wrong with `path`, which came from the config's `field`."""
    return UserError(f'{path} {what} ({field}).')


def stamp(path):
    """The size of a file and the time of its last change, as bytes; of one that is gone none."""
    try:
        status = os.stat(path)
    except OSError:
        return b''
    return struct.pack('<qq', status.st_size, status.st_mtime_ns)


def plain(name):
    """A file's or class's name, whatever bytes it is of, as one line can show it."""
    return name if name.isprintable() else ascii(name)[1:-1]


def notes(class_names, counts, ignored):
    """Lines about what may be a mistake: classes that have no image, and entries that were left out.

    counts: int, how many images each class has. ignored: as in `RawImages`.
    """
    empty = [plain(name) for name, count in zip(class_names, counts) if not count]
    if empty:
        more = ', ...' if empty[5:] else ''
        yield f'{len(empty)} of {len(class_names)} classes have no image: {", ".join(empty[:5])}{more}'
    if ignored:
        yield f'ignored {len(ignored)} other entries, such as {plain(ignored[0][0])}: {ignored[0][1]}'


def check_split(split, splits, path):
    if split not in splits:
        raise UserError(f'{path} has the splits {", ".join(map(repr, splits))}, not {split!r} (config.data.split).')


def counted(items, path):
    """The items; while they take long, a line now and then says how many there were."""
    told = time.monotonic()
    for count, item in enumerate(items, 1):
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            print(f'{path}: {count:,} files found so far', flush=True)
        yield item


def is_image_name(name):
    return name.lower().endswith(SUFFIXES)


def _is_hidden(part):
    return part.startswith('.') or part == '__MACOSX'


class ImageFolder(RawImages):
    """A folder of images: in class folders, or with a labels.json, or all of one class."""

    def __init__(self, path, field):
        self._path = path
        entries = list(counted(_walk(path), path))
        unfit = [(name, reason) for name, reason in entries if reason]
        files = [name for name, reason in entries if not reason]
        super().__init__('folder', *_organise(files, self._read, path, field, unfit))

    def _read(self, name):
        with open(os.path.join(self._path, name), 'rb') as file:
            return file.read()

    def read(self, index):
        try:
            return self._read(self.names[index])
        except OSError as error:
            raise ImageError(f'unreadable: {error.strerror}') from error

    def stamps(self):
        return (stamp(os.path.join(self._path, name)) for name in self.names)


def holds_class_folders(path):
    """Whether an image lies in a folder of this folder."""
    return any('/' in name and is_image_name(name) and not reason for name, reason in _walk(path))


def _walk(folder, prefix='', above=()):
    """(relative name, why it is left out or '') of the files under a folder.

    Links are followed unless they lead back up. What is neither a file nor a folder is left out: reading it may wait
    for ever.
    """
    here = os.path.realpath(folder)
    if here in above:
        yield prefix, 'a link to a folder that it lies in'
        return
    empty = True
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            name, empty = prefix + entry.name, False
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # of links alone, to themselves for instance
                yield name, f'a link that cannot be followed: {error.strerror}'
                continue
            if is_folder:
                yield from _walk(entry.path, f'{name}/', (*above, here))
            else:
                yield name, '' if is_file else 'a link to nothing' if entry.is_symlink() else 'not a file'
    if empty and prefix:
        yield prefix, 'an empty folder'


class ImageZip(RawImages):
    """A zip file of such a folder. One top folder of class folders, or of images with labels, is taken for the root."""

    def __init__(self, path, field):
        try:
            with zipfile.ZipFile(path) as archive:
                members = _without_top(_zip_members(archive, path, field), archive.read)
                organised = _organise(list(members), lambda name: archive.read(members[name]), path, field)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise unusable(path, f'is a damaged zip file: {first_line(error)}', field) from error
        super().__init__('zip', *organised)
        # What a member needs to be read without a ZipFile, whose index of a million would be built in each process.
        infos = [members[name] for name in self.names]
        self._offsets = np.array([info.header_offset for info in infos], np.int64)
        self._sizes = np.array([(info.compress_size, info.file_size) for info in infos], np.int64).reshape(-1, 2)
        self._checksums = np.array([info.CRC for info in infos], np.int64)
        self._deflated = np.array([info.compress_type == DEFLATED for info in infos])
        self._read_at = ReadAt(path)

    def read(self, index):
        offset, (stored, size) = int(self._offsets[index]), self._sizes[index].tolist()
        header = self._read_at(offset, 30)
        name_length, extra_length = struct.unpack('<HH', header[26:])
        data = self._read_at(offset + 30 + name_length + extra_length, stored)
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


def _zip_members(archive, path, field):
    """{name: its ZipInfo} of the files in a zip, without hidden ones."""
    members = {}
    for info in archive.infolist():
        name = _zip_name(info)
        parts = [part for part in name.split('/') if part not in ('', '.')]
        if not name.endswith('/') and not any(map(_is_hidden, parts)):
            members['/'.join(parts)] = info
    for name, info in members.items():
        if info.flag_bits & 1:
            raise unusable(path, f'is encrypted ({name}): unpack it and give the folder', field)
        if info.compress_type not in (zipfile.ZIP_STORED, DEFLATED):
            raise unusable(path, f'is compressed otherwise than by deflate ({name}): unpack it, give the folder', field)
    return members


def _zip_name(info):
    """A member's name, also as Windows and macOS write it: with backslashes, or in UTF-8 that is not marked as such."""
    name = info.filename
    if not info.flag_bits & UTF8_FLAG:
        with contextlib.suppress(UnicodeError):
            name = name.encode('cp437').decode()  # zipfile decoded it from there
    return name.replace('\\', '/')


def _without_top(members, read):
    """The members, named as from their one top folder if that holds class folders or labels, and so is no class."""
    names = list(filter(is_image_name, members))
    tops = {name.partition('/')[0] for name in names if '/' in name}
    if len(tops) != 1 or not all('/' in name for name in names):
        return members
    top = f'{tops.pop()}/'
    inside = {name.removeprefix(top): info for name, info in members.items() if name.startswith(top)}
    if _find_labels(members, lambda name: read(members[name])):
        return members
    if any(name.count('/') > 1 for name in names) or _find_labels(inside, lambda name: read(inside[name])):
        return {name: info for name, info in members.items() if not name.startswith(top)} | inside
    return members


def _find_labels(files, read):
    """The name among `files` that gives images their labels, or None. Any file may be called dataset.json."""
    if 'labels.json' in files:
        return 'labels.json'
    if 'dataset.json' in files:
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, IndexError):
            name, _ = json.loads(read('dataset.json'))['labels'][0]
            if isinstance(name, str):
                return 'dataset.json'  # StyleGAN's, of which also those without labels are called so
    return None


def _organise(files, read, path, field, unfit=()):
    """(class names, names of images, their labels, ignored) of files by their names; `read(name)` gives one's bytes.

    unfit: (name, reason) of entries that are no files.
    """
    names = sorted(filter(is_image_name, files))
    labels_file = _find_labels(files, read)
    others = [(name, 'not an image by its name') for name in files if not is_image_name(name) and name != labels_file]
    ignored = sorted([*others, *unfit])
    if not names:
        beside = f', but {len(ignored)} other files, the first {plain(ignored[0][0])}' if ignored else ''
        raise unusable(path, f'holds no images ({", ".join(suffix[1:] for suffix in SUFFIXES)}){beside}', field)
    if labels_file is None:
        class_names, labels = _labels_of_folders(names, path, field)
    else:
        class_names, labels = _labels_of_json(read(labels_file), names, os.path.join(path, labels_file), field)
    for name in class_names:
        if not name.strip() or name.splitlines() != [name]:
            where = path if labels_file is None else os.path.join(path, labels_file)
            raise unusable(where, f'has a class called {name!r}: give it a name that is not blank, of one line', field)
    return class_names, names, labels, ignored


def _labels_of_folders(names, path, field):
    """(class names, labels) from each image's top folder."""
    loose = [name for name in names if '/' not in name]
    class_names = sorted({name.partition('/')[0] for name in names if '/' in name})
    if loose and class_names:
        raise unusable(
            path,
            f'holds {len(loose)} loose images, the first {loose[0]}, beside {len(class_names)} class folders, the '
            f'first {class_names[0]}: put every image into a class folder, or none and add labels.json',
            field,
        )
    if loose:
        return ['images'], [0] * len(names)
    if {name.lower() for name in class_names} <= SPLIT_NAMES and all(name.count('/') > 1 for name in names):
        raise unusable(path, f'holds splits ({", ".join(class_names)}), not classes: give the folder of one', field)
    ids = {name: index for index, name in enumerate(class_names)}
    return class_names, [ids[name.partition('/')[0]] for name in names]


def _labels_of_json(text, names, path, field):
    """(class names, labels) of the images `names` as labels.json says; it must name exactly these."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unusable(path, f'is not JSON: {first_line(error)}', field) from error
    if not isinstance(content, dict):
        raise unusable(path, 'must map file names to labels, or hold {"labels": [[file name, id], ...]}', field)
    class_names = content.pop('class_names', None)
    by_name = _labels_by_name(content, path, field)

    absent = sorted(by_name.keys() - set(names))
    if absent:
        raise unusable(path, f'names {len(absent)} images that are not there, the first {absent[0]}', field)
    unnamed = [name for name in names if name not in by_name]
    if unnamed:
        raise unusable(path, f'leaves {len(unnamed)} images without a label, the first {unnamed[0]}', field)
    if class_names is not None and not _are_names(class_names):
        raise unusable(path, 'has "class_names" that are no list of different names', field)
    labels = [by_name[name] for name in names]
    if isinstance(labels[0], int):
        return _check_ids(labels, class_names, path, field)
    class_names = sorted(set(labels)) if class_names is None else class_names
    ids = {name: index for index, name in enumerate(class_names)}
    unknown = sorted(set(labels) - ids.keys())
    if unknown:
        raise unusable(path, f'has labels that "class_names" lacks, the first {unknown[0]!r}', field)
    return class_names, [ids[label] for label in labels]


def _are_names(class_names):
    return (
        isinstance(class_names, list)
        and all(isinstance(name, str) for name in class_names)
        and len(set(class_names)) == len(class_names)
    )


def _labels_by_name(content, path, field):
    """{file name: label} of either form of labels.json; labels are all class names or all ids."""
    if isinstance(content.get('labels'), list):
        pairs = content['labels']
    else:
        pairs = [[name, label] for name, label in content.items()]
    by_name = {}
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) in (int, str)):
            raise unusable(path, f'must give each file a class name or an id, but has {json.dumps(pair)[:80]}', field)
        if by_name.setdefault(*pair) != pair[1]:
            raise unusable(path, f'gives {pair[0]} two labels', field)
    if len({type(label) for label in by_name.values()}) > 1:
        raise unusable(path, 'mixes class names and ids: use one or the other', field)
    return by_name


def _check_ids(labels, class_names, path, field):
    end = MAX_CLASSES if class_names is None else len(class_names)
    wrong = [label for label in labels if not 0 <= label < end]
    if wrong:
        raise unusable(path, f'has the label {wrong[0]}; ids are 0 to {end - 1}', field)
    return ([str(index) for index in range(max(labels) + 1)] if class_names is None else class_names), labels
