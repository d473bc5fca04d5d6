import concurrent.futures
import errno
import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import socket
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cfg_jax.data.images import ImageError, decode, encode_png
from cfg_jax.data.preparing import imagenet_npz, imagenet_tar, labels, raw_images
from cfg_jax.data.preparing.archives import open_images, open_plain_images
from cfg_jax.errors import UserError

TREE = {
    'cat/2.PNG': 1,
    'cat/more/deep/1.png': 2,
    'dog/1.png': 3,
    'dog/b.png': 4,
    'cat/notes.txt': None,
    'README.md': None,
    'cat/.hidden.png': None,
    '.git/1.png': None,
    '__MACOSX/cat/._1.png': None,
}
TREE_NAMES = ['cat/2.PNG', 'cat/more/deep/1.png', 'dog/1.png', 'dog/b.png']


def png(number):
    return encode_png(np.full((2, 2, 1), number, np.uint8))


def content_of(value):
    """Return a PNG of a number, some text for None, bytes unchanged, and JSON of anything else."""
    if value is None or isinstance(value, bytes):
        return value or b'no image'
    return png(value) if isinstance(value, int) else json.dumps(value).encode()


def put(root, files):
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_of(value))
    return str(root)


def put_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, value in files.items():
            archive.writestr(name, content_of(value))
    return str(path)


def put_tar(path, files, mode='w'):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture(params=['folder', 'zip', 'zip with a top folder', 'stored zip'])
def pack(request, tmp_path):
    """A function that packs {name: content} in one of the ways that must all look the same."""

    def packed(files):
        root = tmp_path / 'images'
        if request.param == 'folder':
            root.mkdir()
            return put(root, files)
        top = 'images/' if 'top' in request.param else ''
        compression = zipfile.ZIP_STORED if 'stored' in request.param else zipfile.ZIP_DEFLATED
        return put_zip(root.with_suffix('.zip'), {top + name: value for name, value in files.items()}, compression)

    packed.kind = 'folder' if request.param == 'folder' else 'zip'
    return packed


def number_of(read):
    """Return the number that a PNG was made from."""
    return int(decode(read, 1)[0, 0, 0])


def check(images, kind, class_names, names, labels, *, ignored=()):
    """Check the properties of every archive, and these expectations."""
    assert images.kind == kind and images.class_names == tuple(class_names) and list(images.names) == list(names)
    assert images.labels.dtype == np.int32 and images.labels.tolist() == list(labels)
    assert len(images) == len(images.names) == len(images.labels) == len(set(images.names))
    assert sorted(name for name, _ in images.ignored) == sorted(ignored)
    copy = pickle.loads(pickle.dumps(images))
    for index in [*range(len(images)), 0]:
        first, second, again = images.read(index), copy.read(index), pickle.loads(pickle.dumps(copy)).read(index)
        assert type(first) is type(second) is type(again)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, again)


def refuses(path, *words, **settings):
    """Check that open_images(path) raises a UserError of one line with all of these words."""
    with pytest.raises(UserError) as caught:
        open_images(str(path), **settings)
    message = str(caught.value)
    assert '\n' not in message
    for word in [*words, settings.get('field', 'config.prepare.path')]:
        assert word in message, f'{word!r} is not in: {message}'


# Folders and zip files of images.


def test_class_folders(pack):
    images = open_images(pack(TREE))
    check(images, pack.kind, ['cat', 'dog'], TREE_NAMES, [0, 0, 1, 1], ignored=['README.md', 'cat/notes.txt'])
    assert [number_of(images.read(i)) for i in range(4)] == [1, 2, 3, 4]
    assert {reason for _, reason in images.ignored} == {'not an image by its name'}


def test_numeric_classes_are_in_the_order_of_their_numbers(pack):
    """Labels are then the numbers. The images stay in the order of their names, which a resumed run needs."""
    names = sorted(f'{number}/{letter}.png' for number in range(12) for letter in 'ab')
    images = open_images(pack(dict.fromkeys(names, 1)))
    check(images, pack.kind, map(str, range(12)), names, [int(name.split('/')[0]) for name in names])


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        ('class10 class9 class1', 'class1 class9 class10'),
        ('b2 a10 a2 B1', 'B1 a2 a10 b2'),
        ('02 1 10 2', '1 02 2 10'),
        ('x² x1 x', 'x x1 x²'),
        ('n01440764 n01443537 n01484850', 'n01440764 n01443537 n01484850'),
    ],
)
def test_natural_order(names, expected):
    assert sorted(names.split(), key=labels.natural) == expected.split()


def test_both_unicode_spellings_of_a_name_are_one(pack):
    """File systems and zip files store an accented letter as one character or as two."""
    one, two = 'caf\u00e9', 'cafe\u0301'
    images = open_images(pack({f'{one}/1.png': 1, f'{two}/2.png': 2, 'tea/1.png': 3}))
    names = sorted([f'{one}/1.png', f'{two}/2.png', 'tea/1.png'])
    check(images, pack.kind, [one, 'tea'], names, [0 if name.startswith('caf') else 1 for name in names])


def test_labels_name_files_in_either_unicode_spelling(pack):
    one, two = 'caf\u00e9', 'cafe\u0301'
    files = {f'{one}.png': 1, f'{two}2.png': 2, 'labels.json': {f'{two}.png': two, f'{one}2.png': one}}
    check(open_images(pack(files)), pack.kind, [one], sorted(name for name in files if 'png' in name), [0, 0])


def test_folders_of_file_systems_and_servers_are_no_classes(pack):
    system = ['lost+found', '@eaDir', '$RECYCLE.BIN', '$Recycle.Bin', 'System Volume Information', 'cat/@eaDir/1.png']
    images = open_images(pack({'cat/1.png': 1, 'dog/1.png': 2, **{f'{name}/thumbnail.png': 3 for name in system}}))
    check(images, pack.kind, ['cat', 'dog'], ['cat/1.png', 'dog/1.png'], [0, 1])


def test_other_npz_files_do_not_make_images_downsampled_imagenet(pack):
    images = open_images(pack({'cat/1.png': 1, 'dog/1.png': 2, 'statistics.npz': b'x'}))
    check(images, pack.kind, ['cat', 'dog'], ['cat/1.png', 'dog/1.png'], [0, 1], ignored=['statistics.npz'])


def test_every_kind_of_image_by_its_name(pack):
    suffixes = ['png', 'jpg', 'jpeg', 'webp', 'bmp', 'gif', 'tif', 'tiff', 'ppm', 'pgm', 'JPEG', 'Jpg']
    files = {f'{number:02d}.{suffix}': number for number, suffix in enumerate(suffixes)}
    images = open_images(pack(files | {'x.heic': 0, 'png': 0, 'x.npy': 0}))
    top = 'images/' if '/' in images.names[0] else ''  # the top folder of a zip file is then a class
    ignored = [top + name for name in ('x.heic', 'png', 'x.npy')]
    check(images, pack.kind, ['images'], [top + name for name in files], [0] * 12, ignored=ignored)


def test_labels_by_class_name(pack):
    images = open_images(pack({'b.png': 1, 'a.png': 2, 'c.png': 3, 'labels.json': {
        'a.png': 'zebra', 'b.png': 'ant', 'c.png': 'zebra'}}))  # fmt: skip
    check(images, pack.kind, ['ant', 'zebra'], ['a.png', 'b.png', 'c.png'], [1, 0, 1])


def test_labels_by_id(pack):
    images = open_images(pack({'a.png': 1, 'b.png': 2, 'labels.json': {'a.png': 3, 'b.png': 0}}))
    check(images, pack.kind, '0123', ['a.png', 'b.png'], [3, 0])


@pytest.mark.parametrize('file', ['labels.json', 'dataset.json'])
def test_labels_as_pairs(pack, file):
    """This is StyleGAN's and ADM's form; images may be in folders."""
    labels = {'labels': [['00/b.png', 1], ['00/a.png', 0]], 'class_names': ['cat', 'dog', 'bird']}
    images = open_images(pack({'00/a.png': 1, '00/b.png': 2, 'x.md': None, file: labels}))
    check(images, pack.kind, ['cat', 'dog', 'bird'], ['00/a.png', '00/b.png'], [0, 1], ignored=['x.md'])


def test_class_names_order_the_classes_that_labels_name(pack):
    labels = {'a.png': 'cat', 'b.png': 'dog', 'class_names': ['dog', 'bird', 'cat']}
    images = open_images(pack({'a.png': 1, 'b.png': 2, 'labels.json': labels}))
    check(images, pack.kind, ['dog', 'bird', 'cat'], ['a.png', 'b.png'], [2, 0])


@pytest.mark.parametrize(
    ('labels', 'words'),
    [
        (b'{"a.png": ', ['labels.json', 'not JSON']),
        (b'\xff\xfe', ['not JSON']),
        (b'[' * 100_000, ['not JSON']),
        ([1, 2], ['must map file names to labels']),
        ({'a.png': 0}, ['leaves 1 images without a label', 'b.png']),
        ({'a.png': 0, 'b.png': 1, 'c.png': 0, 'd.png': 0}, ['names 2 images that do not exist', 'c.png']),
        ({'a.png': 0, 'b.png': 'dog'}, ['mixes class names and ids']),
        ({'a.png': 0, 'b.png': 1.5}, ['class name or an id', '"b.png"', '1.5']),
        ({'a.png': 0, 'b.png': True}, ['class name or an id']),
        ({'a.png': 0, 'b.png': -1}, ['label -1']),
        ({'a.png': 0, 'b.png': 10**20}, ['ids are 0 to 999999']),
        ({'a.png': 0, 'b.png': 2, 'class_names': ['x', 'y']}, ['label 2', 'ids are 0 to 1']),
        ({'a.png': 'x', 'b.png': 'z', 'class_names': ['x', 'y']}, ["'z'", 'class_names']),
        ({'a.png': 0, 'b.png': 1, 'class_names': ['x', 'x']}, ['class_names']),
        ({'a.png': 0, 'b.png': 1, 'class_names': 'xy'}, ['class_names']),
        ({'labels': None}, ['class name or an id', '"labels"']),
        ({'labels': [['a.png', 0], ['b.png', 1], ['a.png', 1]]}, ['a.png two labels']),
        ({'labels': [['a.png', 0], ['b.png']]}, ['class name or an id']),
        ({}, ['leaves 2 images without a label']),
    ],
    ids=lambda value: None if isinstance(value, list) and isinstance(value[0], str) else repr(value)[:30],
)
def test_wrong_labels(tmp_path, labels, words):
    refuses(put(tmp_path, {'a.png': 1, 'b.png': 2, 'labels.json': labels}), *words)


def test_wrong_labels_in_a_zip(tmp_path):
    path = put_zip(tmp_path / 'x.zip', {'a.png': 1, 'labels.json': {'b.png': 0}})
    refuses(path, 'x.zip/labels.json', 'b.png', field='config.data.data_dir')


def test_loose_images_beside_class_folders(pack):
    refuses(pack({'cat/1.png': 1, 'dog/1.png': 2, 'a.png': 3}), '1 loose images', 'a.png', '2 class folders', 'cat')


def test_no_images(pack, tmp_path):
    refuses(pack({'archive.7z': None}), 'holds no images', 'png', '1 other files', 'archive.7z')
    (tmp_path / 'empty').mkdir()
    refuses(tmp_path / 'empty', 'holds no images')
    refuses(put_zip(tmp_path / 'empty.zip', {}), 'holds no images')


def test_folders_of_splits_are_no_classes(pack):
    files = {f'{split}/{name}/1.png': 1 for split, name in itertools.product(['train', 'val'], ['cat', 'dog'])}
    refuses(pack(files), 'holds splits (train, val)')


def test_classes_may_be_called_like_splits(pack):
    check(open_images(pack({'test/1.png': 1, 'train/1.png': 2})), pack.kind, ['test', 'train'],
          ['test/1.png', 'train/1.png'], [0, 1])  # fmt: skip


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / 'elsewhere', {'1.png': 5})
    put(tmp_path / 'images', {'cat/1.png': 1, 'cat/2.png': 2})
    (tmp_path / 'images/dog').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'images/cat/loop').symlink_to(tmp_path / 'images')
    images = open_images(str(tmp_path / 'images'))
    assert images.names == ['cat/1.png', 'cat/2.png', 'dog/1.png'] and number_of(images.read(2)) == 5
    assert images.ignored == [('cat/loop/', 'a link to a folder that contains it')]
    (tmp_path / 'images/cat/2.png').unlink()
    with pytest.raises(ImageError, match='unreadable: No such file'):
        images.read(1)


def test_what_is_no_file_is_left_out(tmp_path, monkeypatch):
    """Reading a pipe would block for ever, and one broken link must not stop everything."""
    put(tmp_path, {'cat/1.png': 1})
    monkeypatch.chdir(tmp_path / 'cat')  # a socket's path must be short
    os.mkfifo('pipe.png')
    os.mkfifo('../labels.json')
    os.mkdir('none')
    os.symlink('gone', 'gone.png')
    os.symlink('itself.png', 'itself.png')
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind('socket.png')
        images = open_images(str(tmp_path))
    check(images, 'folder', ['cat'], ['cat/1.png'], [0], ignored=[
        'cat/pipe.png', 'labels.json', 'cat/none/', 'cat/gone.png', 'cat/itself.png', 'cat/socket.png'])  # fmt: skip
    reasons = dict(images.ignored)
    assert reasons['cat/pipe.png'] == reasons['labels.json'] == reasons['cat/socket.png'] == 'not a regular file'
    assert reasons['cat/gone.png'] == 'a broken link' and reasons['cat/none/'] == 'an empty folder'
    assert reasons['cat/itself.png'].startswith('a link that cannot be followed: Too many levels')


@pytest.mark.parametrize('stray', [
    {'train_stats.npz': b'x'}, {'val_fid.npz': b'x'}, {'test_batch/1.png': 3}, {'dataset.json': {'name': 'mine'}},
    {'dataset.json': {'labels': None}}, {'dataset.json': {'labels': ['a', 'b']}}, {'dataset.json': b'not JSON'},
    {'data_batch_1': b'x', 'batches.meta': b'x'}, {'train_data_batch_1.npz': b'x'}, {'x_npz.zip': b'x'},
], ids=lambda stray: ' '.join(stray))  # fmt: skip
def test_stray_files_do_not_decide_what_a_folder_is(tmp_path, stray):
    images = open_images(put(tmp_path, {'cat/1.png': 1, 'dog/1.png': 2} | stray))
    more = [name for name in stray if name.endswith('.png')]
    classes = ['cat', 'dog', *(name.partition('/')[0] for name in more)]
    names = ['cat/1.png', 'dog/1.png', *more]
    check(images, 'folder', classes, names, range(len(names)), ignored=sorted(stray.keys() - set(more)))


@pytest.mark.parametrize('stray', ['train_stats.npz', 'val_fid.npz', 'backup.npz.zip', 'test_batch'])
def test_stray_files_beside_loose_images(tmp_path, stray):
    files = {'a.png': 1, stray: content_of_zip({'x.npy': b'x'})}
    check(open_images(put(tmp_path, files)), 'folder', ['images'], ['a.png'], [0], ignored=[stray])


def content_of_zip(files):
    file = io.BytesIO()
    put_zip(file, files)
    return file.getvalue()


@pytest.mark.parametrize(
    ('files', 'classes', 'names', 'ignored'),
    [
        ({'cats/1.png': 1, 'cats/2.png': 2}, ['cats'], ['cats/1.png', 'cats/2.png'], []),
        ({'top/a/1.png': 1, 'top/b/1.png': 2, 'READ.me': None}, ['a', 'b'], ['a/1.png', 'b/1.png'], ['READ.me']),
        ({'./a/1.png': 1, './/b/1.png': 2}, ['a', 'b'], ['a/1.png', 'b/1.png'], []),
        ({'x/labels.json': {'1.png': 'u', '2.png': 'v'}, 'x/1.png': 1, 'x/2.png': 2}, 'uv', ['1.png', '2.png'], []),
        ({'labels.json': {'x/1.png': 'u', 'x/2.png': 'v'}, 'x/1.png': 1, 'x/2.png': 2}, 'uv',
         ['x/1.png', 'x/2.png'], []),
    ],
    ids=['one class', 'stray file', 'dots', 'labels inside', 'labels outside'],
)  # fmt: skip
def test_the_top_folder_of_a_zip(tmp_path, files, classes, names, ignored):
    images = open_images(put_zip(tmp_path / 'x.zip', files))
    check(images, 'zip', classes, names, range(len(names)) if len(classes) > 1 else [0, 0], ignored=ignored)


def test_names_in_utf8_that_a_zip_does_not_mark_as_such(tmp_path):
    """macOS's Finder writes such names; names in the old code page are read as well."""

    class Unmarked(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):
            return self.filename.encode('utf-8' if 'é' in self.filename else 'cp437'), self.flag_bits & ~0x800

    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
        for number, name in enumerate(['café/1.png', 'für/1.png']):
            archive.writestr(Unmarked(name), png(number))
    images = open_images(str(tmp_path / 'x.zip'))
    check(images, 'zip', ['café', 'für'], ['café/1.png', 'für/1.png'], [0, 1])


def test_classes_without_a_name(tmp_path):
    for number, name in enumerate(['', ' ', 'two\nlines', 'line\n', '\u2028']):
        refuses(put(tmp_path / str(number), {'1.png': 1, 'labels.json': {'1.png': name}}), 'labels.json', repr(name))
    refuses(put(tmp_path / 'names', {'1.png': 1, 'labels.json': {'1.png': 0, 'class_names': ['']}}), "called ''")
    refuses(put(tmp_path / 'folders', {'a/1.png': 1, ' /1.png': 1}), "called ' '")


def test_only_folders_and_zips_are_read_as_they_are(tmp_path):
    """Archives have splits, which folders lack; archives must be prepared."""
    cifar = put_cifar(tmp_path, {name: pickle.dumps(content) for name, content in cifar_files().items()}, True)
    npz_folder = put(tmp_path / 'npz', npz_batches())
    for path in (cifar, npz_folder, npz_folder + '/val_data.npz', train_tar(tmp_path / 'x.tar')):
        with pytest.raises(UserError) as caught:
            open_plain_images(path, field='config.data.data_dir')
        for word in (f'{path} is not a folder or zip', 'config.data.data_dir', f'--config.prepare.path={path}'):
            assert word in str(caught.value)
    put(tmp_path / 'plain', {'cat/1.png': 1})
    assert open_plain_images(str(tmp_path / 'plain'), field='').kind == 'folder'


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    put(tmp_path, {'cat/1.png': 1})
    scan = os.scandir

    def scandir(path):
        if str(path).endswith('cat'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)

    monkeypatch.setattr(os, 'scandir', scandir)
    refuses(tmp_path, f'{tmp_path}/cat cannot be read: Permission denied')


def test_an_unreadable_lost_and_found_is_left_alone(tmp_path, monkeypatch):
    """Only root may read it, at the top of every ext4 disk."""
    put(tmp_path, {'cat/1.png': 1, 'lost+found/1.png': 1})
    scan = os.scandir

    def scandir(path):
        assert not str(path).endswith('lost+found')
        return scan(path)

    monkeypatch.setattr(os, 'scandir', scandir)
    check(open_images(str(tmp_path)), 'folder', ['cat'], ['cat/1.png'], [0])


def test_an_archive_that_the_system_does_not_let_us_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = put_cifar(tmp_path, {name: pickle.dumps(value) for name, value in cifar_files().items()}, True)

    def stale(path):
        raise OSError(errno.ESTALE, 'Stale file handle', path)

    monkeypatch.setattr(gzip, 'open', stale)
    with pytest.raises(UserError, match=rf'^{path} cannot be read: Stale file handle \(config\.prepare\.path\)\.$'):
        open_images(path)


@pytest.mark.parametrize('form', ['folder', 'zip', 'cifar10', 'npz', 'idx'])
def test_stamps_differ_once_a_file_does(tmp_path, form):
    """A zip file is compared by its members' checksums, whatever its time; other files by their times."""
    files = {'cat/1.png': 1, 'cat/2.png': 2}
    if form == 'cifar10':
        path = put_cifar(tmp_path, {name: pickle.dumps(value) for name, value in cifar_files().items()}, True)
    elif form == 'npz':
        path = put(tmp_path, npz_batches())
    elif form == 'idx':
        path = put(tmp_path, idx_files())
    else:
        path = put(tmp_path, files) if form == 'folder' else put_zip(tmp_path / 'x.zip', files)
    changed = {
        'folder': tmp_path / 'cat/1.png',
        'npz': tmp_path / 'train_data_batch_2.npz',
        'idx': tmp_path / 'train-labels-idx1-ubyte',
    }.get(form, pathlib.Path(path))
    before = list(open_images(path).stamps())
    assert before and list(open_images(path).stamps()) == before
    time = os.stat(changed).st_mtime_ns
    os.utime(changed, ns=(time, time + 1))
    assert (list(open_images(path).stamps()) == before) == (form == 'zip')
    if form == 'zip':
        put_zip(path, files | {'cat/2.png': 3})
        assert list(open_images(path).stamps()) != before


def test_paths_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    put(tmp_path / 'images', {'1.png': 1})
    assert len(open_images('~/images')) == 1


def test_windows_zip_files_and_later_versions(tmp_path):
    """Backslashes count as slashes; of two members of one name the later counts, as in unpacking."""
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
        archive.writestr('cat\\1.png', png(0))
        archive.writestr('dog\\1.png', png(1))
        with pytest.warns(UserWarning, match='Duplicate'):
            archive.writestr('dog\\1.png', png(2))
    images = open_images(str(tmp_path / 'x.zip'))
    check(images, 'zip', ['cat', 'dog'], ['cat/1.png', 'dog/1.png'], [0, 1])
    assert number_of(images.read(1)) == 2


def test_damage_in_a_zip_stays_with_its_image(tmp_path):
    files = {'a.png': 1, 'b.png': 2, 'c.png': 3, 'd.png': 4}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = put_zip(tmp_path / f'{compression}.zip', files, compression)
        with zipfile.ZipFile(path) as archive:
            offset = archive.getinfo('b.png').header_offset
        data = bytearray(pathlib.Path(path).read_bytes())
        data[offset + 60] ^= 255
        pathlib.Path(path).write_bytes(data)
        images = open_images(path)
        with pytest.raises(ImageError, match='damaged in the zip file'):
            images.read(1)
        assert [number_of(images.read(i)) for i in (0, 2, 3)] == [1, 3, 4]


def test_threads_share_a_zip(tmp_path):
    path = put_zip(tmp_path / 'x.zip', {f'{number:03d}.png': number for number in range(200)})
    for _ in range(5):
        images = open_images(path)
        with concurrent.futures.ThreadPoolExecutor(16) as threads:
            assert [number_of(data) for data in threads.map(images.read, range(200))] == list(range(200))


def test_a_zip_that_shrinks_later(tmp_path):
    path = put_zip(tmp_path / 'x.zip', {'a.png': 1})
    images = open_images(path)
    os.truncate(path, 40)
    with pytest.raises(ImageError, match='truncated'):
        images.read(0)
    os.remove(path)
    with pytest.raises(ImageError, match='unreadable'):
        pickle.loads(pickle.dumps(images)).read(0)


def test_zip_files_that_cannot_be_read(tmp_path):
    whole = pathlib.Path(put_zip(tmp_path / 'x.zip', TREE)).read_bytes()
    for name, data in [
        ('cut.zip', whole[: len(whole) // 2]),
        ('cut', whole[: len(whole) // 2]),
        ('text.zip', b'some text'),
        ('none.zip', b''),
    ]:
        (tmp_path / name).write_bytes(data)
        refuses(tmp_path / name, name, 'damaged zip file')
    encrypted = bytearray(whole)
    directory = encrypted.index(b'PK\x01\x02')
    encrypted[directory + 8] |= 1
    (tmp_path / 'secret.zip').write_bytes(encrypted)
    refuses(tmp_path / 'secret.zip', 'encrypted', 'cat/2.PNG')
    refuses(put_zip(tmp_path / 'lzma.zip', TREE, zipfile.ZIP_LZMA), 'compressed by a method other than deflate')
    broken_labels = bytearray(pathlib.Path(put_zip(tmp_path / 'l.zip', {'labels.json': {}, 'a.png': 1})).read_bytes())
    broken_labels[42] ^= 255
    (tmp_path / 'l.zip').write_bytes(broken_labels)
    refuses(tmp_path / 'l.zip', 'damaged zip file')


def test_progress_is_shown_when_it_takes_long(tmp_path, monkeypatch, capsys):
    put(tmp_path, TREE)
    open_images(str(tmp_path))
    assert not capsys.readouterr().out
    monkeypatch.setattr(raw_images, 'PROGRESS_SECONDS', 0)
    open_images(str(tmp_path))
    assert f'{tmp_path}: 4 files found so far' in capsys.readouterr().out
    open_images(put(tmp_path / 'idx', idx_files()))
    assert f'{tmp_path}/idx/{IMAGES}: 1 MiB read so far' in capsys.readouterr().out


def test_what_is_not_there_or_not_known(tmp_path):
    refuses(tmp_path / 'nothing', 'no such file or folder', 'nothing')
    refuses('', "no such file or folder: ''", field='config.data.data_dir')
    for name, data in [('x.txt', b'text'), ('x.png', png(1)), ('empty', b'')]:
        (tmp_path / name).write_bytes(data)
        refuses(
            tmp_path / name,
            name,
            'zip file of images',
            'cifar-10-python.tar.gz',
            'ILSVRC2012_img_train.tar',
            'npz',
            'idx3',
        )
    os.mkfifo(tmp_path / 'pipe')  # reading it would wait for ever
    refuses(tmp_path / 'pipe', 'is not recognised')


# CIFAR-10.

CIFAR_CLASSES = [b'airplane', b'automobile', b'bird']


def cifar_files(per_batch=3):
    """Return {name: dictionary} of a few images, as unpickled with encoding='bytes'."""
    rng = np.random.default_rng(0)
    names = [*(f'data_batch_{number}' for number in range(1, 6)), 'test_batch']
    files = {
        name: {
            b'batch_label': b'a batch',
            b'labels': [(number + row) % 3 for row in range(per_batch)],
            b'data': rng.integers(0, 256, (per_batch, 3072), np.uint8),
            b'filenames': [b'x.png'] * per_batch,
        }
        for number, name in enumerate(names)
    }
    return files | {'batches.meta': {b'num_cases_per_batch': per_batch, b'label_names': CIFAR_CLASSES}}


def python2_pickle(value):
    """Pickle by protocol 2 as Python 2 did: byte strings as str, NumPy by its old names."""
    if isinstance(value, dict):
        items = b''.join(python2_pickle(key) + python2_pickle(item) for key, item in value.items())
        return b'}(' + items + b'u'
    if isinstance(value, list):
        return b'](' + b''.join(map(python2_pickle, value)) + b'e'
    if isinstance(value, int):
        return b'J' + struct.pack('<i', value)
    if isinstance(value, np.ndarray):
        shape = b''.join(map(python2_pickle, value.shape))
        return (
            b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01(' + shape + b't'
            b'cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89'
            + python2_pickle(value.tobytes())
            + b'tb'
        )
    return b'T' + struct.pack('<i', len(value)) + value


def put_cifar(tmp_path, files, packed):
    contents = {f'cifar-10-batches-py/{name}': data for name, data in files.items()}
    if packed:
        return put_tar(tmp_path / 'cifar-10-python.tar.gz', contents, 'w:gz')
    put(tmp_path, contents)
    return str(tmp_path / 'cifar-10-batches-py')


PICKLERS = {
    'as Python 2': lambda content: b'\x80\x02' + python2_pickle(content) + b'.',
    'as Python 3': lambda content: pickle.dumps(content, protocol=2),
}


@pytest.mark.parametrize('packed', [False, True], ids=['folder', 'tar.gz'])
@pytest.mark.parametrize('pickler', PICKLERS.values(), ids=PICKLERS)
def test_cifar10(tmp_path, packed, pickler):
    files = cifar_files()
    path = put_cifar(tmp_path, {name: pickler(content) for name, content in files.items()}, packed)
    train = open_images(path)
    names = [f'data_batch_{number}/{row}' for number in range(1, 6) for row in range(3)]
    labels = [(number + row) % 3 for number in range(5) for row in range(3)]
    check(train, 'cifar10', ['airplane', 'automobile', 'bird'], names, labels)
    image, flat = train.read(4), files['data_batch_2'][b'data'][1]
    assert image.dtype == np.uint8 and image.shape == (32, 32, 3)
    assert image[5, 7].tolist() == [flat[5 * 32 + 7], flat[1024 + 5 * 32 + 7], flat[2048 + 5 * 32 + 7]]
    assert len(pickle.dumps(train)) < 3072  # without pixels
    test = open_images(path, split='test')
    check(test, 'cifar10', ['airplane', 'automobile', 'bird'], [f'test_batch/{row}' for row in range(3)], [2, 0, 1])
    with pytest.raises(UserError, match=r"'train', 'test', not 'validation' \(config\.data\.split\)"):
        open_images(path, split='validation')


@pytest.mark.parametrize('module', ['os', 'posix', 'builtins', 'numpy.core.multiarray', 'numpy'])
def test_a_pickle_that_calls_is_refused_and_not_executed(tmp_path, module):
    mark = tmp_path / 'executed'
    function = {'os': 'system', 'posix': 'system', 'builtins': 'eval', 'numpy': 'fromfile'}.get(module, 'fromfile')
    argument = f'open({str(mark)!r}, "w")' if module == 'builtins' else f'touch {mark}'
    bad = f'c{module}\n{function}\n('.encode() + b'X' + struct.pack('<i', len(argument)) + argument.encode() + b'tR.'
    if module in ('os', 'builtins'):
        pickle.loads(bad)  # it is a working one
        assert mark.exists()
        mark.unlink()
    files = {name: pickle.dumps(content, 2) for name, content in cifar_files().items()}
    for name in ('data_batch_3', 'batches.meta'):
        path = put_cifar(tmp_path / name, files | {name: bad}, packed=False)
        refuses(path, name, f'{module.removeprefix("numpy.core.")}.{function}')
    assert not mark.exists()


def test_cifar10_that_cannot_be_read(tmp_path):
    whole = {name: pickle.dumps(content, 2) for name, content in cifar_files().items()}
    lacking = {name: data for name, data in whole.items() if name != 'data_batch_4'}
    refuses(put_cifar(tmp_path / 'a', lacking, False), 'lacks data_batch_4')
    (tmp_path / 'b').mkdir()
    refuses(put_cifar(tmp_path / 'b', lacking, True), 'lacks data_batch_4')
    good = cifar_files()['data_batch_1']
    for change in [
        {b'data': good[b'data'][:, :-1]},
        {b'data': good[b'data'].astype(np.int16)},
        {b'labels': [0, 1]},
        {b'labels': [0, 1, 0.5]},
    ]:
        bad = whole | {'data_batch_1': pickle.dumps(good | change, 2)}
        refuses(put_cifar(tmp_path / 'c', bad, False), 'data_batch_1', 'differs from the published layout of CIFAR-10')
    bad = whole | {'data_batch_1': pickle.dumps(good | {b'labels': [0, 1, 3]}, 2)}
    refuses(put_cifar(tmp_path / 'c', bad, False), 'labels outside 0 to 2')
    for data in [b'', b'text', whole['data_batch_1'][:500], pickle.dumps([1]), pickle.dumps({})]:
        refuses(put_cifar(tmp_path / 'c', whole | {'data_batch_1': data}, False), 'data_batch_1 that cannot be read')

    (tmp_path / 'd').mkdir()
    path = pathlib.Path(put_cifar(tmp_path / 'd', whole, True))
    data = path.read_bytes()
    for size in (5, 100, len(data) // 2, len(data) - 9):
        path.write_bytes(data[:size])
        refuses(path, path.name, 'damaged')
    flipped = bytearray(data)
    flipped[-8] ^= 1  # of the checksum
    path.write_bytes(flipped)
    refuses(path, path.name, 'damaged', 'CRC')
    other = put_tar(tmp_path / 'other.tgz', {'cifar-100-python/train': b'x'}, 'w:gz')
    refuses(other, 'is not recognised', 'cifar-10-python.tar.gz')


# IDX files.


def idx(values):
    """Return the bytes of an IDX file of unsigned bytes."""
    values = np.asarray(values, np.uint8)
    return struct.pack(f'>HBB{values.ndim}I', 0, 8, values.ndim, *values.shape) + values.tobytes()


def idx_pixels(count, height=4, width=6):
    """Return uint8 [count, height, width], no two images alike."""
    return np.random.default_rng(count).integers(0, 256, (count, height, width), np.uint8)


def idx_files(labels=(1, 0, 2, 1), data_set='', split='train', **sides):
    """Return {name: bytes} of the two files of a split, not compressed."""
    stem = f'{data_set}-{split}' if data_set else split
    return {
        f'{stem}-images-idx3-ubyte': idx(idx_pixels(len(labels), **sides)),
        f'{stem}-labels-idx1-ubyte': idx(labels),
    }


def gzipped(files):
    return {f'{name}.gz': gzip.compress(data) for name, data in files.items()}


@pytest.mark.parametrize('form', ['gz', 'plain', 'gz without its suffix', 'a file', 'a gz file', 'with dots', 'both'])
def test_idx_files(tmp_path, form):
    """Both splits of a folder, or the split of one file, however the files are compressed and called."""
    train, test = idx_files(), idx_files([2, 0], split='t10k')
    files = gzipped(train | test) if 'gz' in form else train | test
    if 'without' in form:
        files = {name.removesuffix('.gz'): data for name, data in files.items()}
    if form == 'with dots':
        files = {name.replace('-idx', '.idx'): data for name, data in files.items()}
    if form == 'both':
        files |= dict.fromkeys(gzipped(files), b'not read')
    put(tmp_path, files)
    (tmp_path / 'train-images-idx3-ubyte.unpacked').mkdir()
    in_file = 'file' in form
    for split, word, ids in (('train', 'train', [1, 0, 2, 1]), ('test', 't10k', [2, 0])):
        path = tmp_path / next(name for name in files if name.startswith(f'{word}-images')) if in_file else tmp_path
        images = open_images(str(path), split=split)
        check(images, 'idx', '012'[: max(ids) + 1], [f'{split}-images/{i}' for i in range(len(ids))], ids)
        for order in (range(len(ids)), reversed(range(len(ids)))):
            for index in order:
                image = images.read(index)
                assert image.dtype == np.uint8 and image.shape == (4, 6, 1)
                np.testing.assert_array_equal(image[..., 0], idx_pixels(len(ids))[index])
        other = {'train': 'test', 'test': 'train'}[split] if in_file else 'validation'
        with pytest.raises(UserError, match=rf"has the splits .*'{split}'.*, not '{other}' \(config\.data\.split\)"):
            open_images(str(path), split=other)


def test_idx_files_in_the_current_folder(tmp_path, monkeypatch):
    put(tmp_path, idx_files())
    monkeypatch.chdir(tmp_path)
    assert len(open_images('.')) == len(open_images('train-images-idx3-ubyte')) == 4


DIGITS, CAPITALS, SMALL = '0123456789', 'ABCDEFGHIJKLMNOPQRSTUVWXYZ', 'abcdefghijklmnopqrstuvwxyz'
FASHION = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')


@pytest.mark.parametrize(
    ('name', 'class_names'),
    [
        ('mnist', DIGITS),
        ('fashion_mnist', FASHION),
        ('fashion_mnist_32', FASHION),
        ('fashion_mnist/32x32', FASHION),
        ('kmnist', ('o', 'ki', 'su', 'tsu', 'na', 'ha', 'ma', 'ya', 're', 'wo')),
        ('fashion_mnists', '012'),
        ('mine', '012'),
        ('', '012'),
    ],
)
def test_the_classes_of_idx_files_are_named_after_the_data_set(tmp_path, name, class_names):
    images = open_images(put(tmp_path, idx_files()), name=name)
    assert images.class_names == tuple(class_names) and images.labels.tolist() == [1, 0, 2, 1]
    assert images.read(0).shape == (4, 6, 1)


@pytest.mark.parametrize(
    ('data_set', 'class_names', 'first'),
    [
        ('byclass', DIGITS + CAPITALS + SMALL, 0),
        ('bymerge', DIGITS + CAPITALS + 'abdefghnqrt', 0),
        ('balanced', DIGITS + CAPITALS + 'abdefghnqrt', 0),
        ('letters', CAPITALS, 1),
        ('digits', DIGITS, 0),
        ('mnist', DIGITS, 0),
    ],
)
@pytest.mark.parametrize('by', ['name', 'file', 'only one', 'files without names'])
def test_emnist_is_turned_upright_and_letters_count_from_0(tmp_path, data_set, class_names, first, by):
    """TFDS's documentation: the images are mirrored and turned by a quarter, which a transposition undoes."""
    labels = [first, first + len(class_names) - 1]
    files = idx_files(labels, '' if 'without' in by else f'emnist-{data_set}')
    others = {'emnist-others-mapping.txt': b'0 48'}
    if by in ('name', 'file'):
        others |= idx_files([0], 'emnist-others') | idx_files([0])
    path = put(tmp_path, gzipped(files) | others)
    if by == 'file':
        path += f'/emnist-{data_set}-train-images-idx3-ubyte.gz'
    name = 'mine' if by in ('file', 'only one') else f'emnist_{data_set}'
    images = open_images(path, name=name)
    check(images, 'idx', class_names, ['train-images/0', 'train-images/1'], [0, len(class_names) - 1])
    for index in range(2):
        np.testing.assert_array_equal(images.read(index)[..., 0], idx_pixels(2)[index].T)
    put(tmp_path, {f'{next(iter(files)).split("-images")[0]}-labels-idx1-ubyte.gz': gzip.compress(idx([first, 200]))})
    refuses(path, f'labels outside {first} to {first + len(class_names) - 1}', name=name)
    if first:
        put(tmp_path, {f'{next(iter(files)).split("-images")[0]}-labels-idx1-ubyte.gz': gzip.compress(idx([0, 1]))})
        refuses(path, 'labels outside 1 to 26', name=name)


def test_which_of_several_data_sets_in_idx_files(tmp_path):
    sets = {'emnist-letters': [1], 'emnist-digits': [2, 3], 'qmnist': [4, 5, 6], '': [7, 8, 9, 9]}
    path = put(tmp_path, {name: data for key, labels in sets.items() for name, data in idx_files(labels, key).items()})
    for name, count in [('emnist_letters', 1), ('emnist_digits_32', 2), ('qmnist', 3), ('mnist', 4), ('kmnist/x', 4)]:
        assert len(open_images(path, name=name)) == count
    choices = 'config.data.name to one of emnist_digits, emnist_letters, fashion_mnist, kmnist, mnist, qmnist, or give'
    for name in ('', 'mine', 'emnist_balanced'):
        refuses(path, 'holds several data sets', choices, name=name)
    for name in ('emnist', 'emnist/letters'):
        refuses(
            path, f"config.data.name is {name!r}, TFDS's own", 'transposed', "'emnist_letters'", name=name, field=''
        )
    letters = path + '/emnist-letters-train-images-idx3-ubyte'
    for name in ('emnist_digits', 'mnist'):
        refuses(letters, f'is emnist_letters, but config.data.name is {name!r}', name=name)


IMAGES, LABELS = 'train-images-idx3-ubyte', 'train-labels-idx1-ubyte'


@pytest.mark.parametrize('compress', [False, True], ids=['plain', 'gz'])
@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({IMAGES: idx(idx_pixels(4))[:-1]}, [IMAGES, 'is truncated: it holds 95 bytes of images instead of 96']),
        ({LABELS: idx([1, 0, 2, 1])[:-4]}, [LABELS, 'is truncated: it holds 0 bytes of labels instead of 4']),
        ({IMAGES: idx(idx_pixels(4)) + b'xx'}, [IMAGES, 'holds 2 bytes after its last value']),
        ({LABELS: idx([1, 0, 2, 1]) + b'x'}, [LABELS, 'holds 1 bytes after its last value']),
        ({IMAGES: idx(idx_pixels(4))[:9]}, [IMAGES, 'is truncated in its header']),
        ({IMAGES: idx([1, 0])}, [IMAGES, 'holds 1-dimensional unsigned bytes; images are 3-dimensional']),
        ({LABELS: idx(idx_pixels(4))}, [LABELS, 'holds 3-dimensional unsigned bytes; labels are 1-dimensional']),
        ({IMAGES: struct.pack('>HBB3I', 0, 13, 3, 1, 1, 1) + bytes(4)}, [IMAGES, 'holds 3-dimensional float32']),
        ({LABELS: struct.pack('>HBB1I', 0, 12, 1, 1) + bytes(4)}, [LABELS, 'holds 1-dimensional int32']),
        ({IMAGES: b''}, [IMAGES, 'is not an IDX file']),
        ({IMAGES: b'<html>Not found</html>'}, [IMAGES, 'is not an IDX file']),
        ({LABELS: idx([1, 0, 2])}, [LABELS, 'holds 3 labels for 4 images']),
        ({IMAGES: idx(idx_pixels(0)), LABELS: idx([])}, [IMAGES, 'holds no images']),
        ({IMAGES: idx(idx_pixels(4, 0, 6))}, [IMAGES, 'holds no images']),
        ({LABELS: idx([])}, [LABELS, 'holds no labels']),
        ({LABELS: None}, [IMAGES, 'has no file of labels beside it']),
        ({IMAGES: None}, [LABELS, 'has no file of images beside it']),
        ({IMAGES: struct.pack('>HBB3I', 0, 8, 3, *3 * [2**31])}, [IMAGES, 'truncated', f'instead of {2**93}']),
    ],
    ids=str,
)  # fmt: skip
def test_idx_files_that_cannot_be_read(tmp_path, changes, words, compress):
    files = {name: data for name, data in (idx_files() | changes).items() if data is not None}
    if compress:
        files = gzipped(files)
    refuses(put(tmp_path, files), *words)
    for name in files:
        refuses(tmp_path / name, *words)


def test_damaged_gzip_of_idx_files(tmp_path):
    files = gzipped(idx_files())
    path = put(tmp_path, files)
    for name, data in files.items():
        flipped = bytearray(data)
        flipped[-8] ^= 1  # of the checksum
        for damaged in (data[:5], data[:20], data[: len(data) // 2], data[:-9], data[:-1], bytes(flipped), data + b'x'):
            put(tmp_path, files | {name: damaged})
            refuses(path, name, 'is damaged')


def test_idx_files_that_change_or_go_later(tmp_path):
    """They concern every image, so none is left out because of them."""
    path = put(tmp_path, idx_files())
    images = open_images(path)
    os.truncate(tmp_path / IMAGES, 100)
    with pytest.raises(UserError, match=rf'{IMAGES} is truncated \(config\.prepare\.path\)'):
        images.read(3)
    os.remove(tmp_path / IMAGES)
    with pytest.raises(UserError, match=rf'{IMAGES} cannot be read: No such file'):
        pickle.loads(pickle.dumps(images)).read(0)


@pytest.mark.parametrize('compress', [False, True], ids=['plain', 'gz'])
def test_idx_images_are_never_whole_in_memory(tmp_path, compress):
    files = idx_files(np.arange(10_000) % 10, height=28, width=28)
    path = put(tmp_path, gzipped(files) if compress else files)
    tracemalloc.start()
    try:
        images = open_images(path)
        copy = pickle.loads(pickle.dumps(images))
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for index in range(0, 10_000, 99):
            copy.read(index)
        assert tracemalloc.get_traced_memory()[1] - before < 1e6 < len(files[IMAGES]) / 7
    finally:
        tracemalloc.stop()


def test_idx_files_among_other_things(tmp_path):
    """They are not images that can be read where they are; class folders beside them come first."""
    path = put(tmp_path, idx_files())
    with pytest.raises(UserError, match=r'not a folder or zip file of images .*--mode=prepare'):
        open_plain_images(path, field='config.data.data_dir')
    put(tmp_path, {'cat/1.png': 1})
    check(open_images(path), 'folder', ['cat'], ['cat/1.png'], [0], ignored=[IMAGES, LABELS])


# Downsampled ImageNet.


def npz(labels, side=4, *, first=0, save=np.savez_compressed, **changes):
    """Return a batch whose image i is filled with first + i, except its top left pixel, which is 1, 2, 3."""
    labels = np.array(labels)
    data = np.repeat(np.arange(first, first + len(labels), dtype=np.uint8)[:, None], 3 * side * side, 1)
    data[:, [0, side * side, 2 * side * side]] = [1, 2, 3]
    file = io.BytesIO()
    save(file, **{'data': data, 'labels': labels, 'mean': np.zeros(3 * side * side)} | changes)
    return file.getvalue()


def npz_batches():
    return {
        'train_data_batch_1.npz': npz([3, 1]),
        'train_data_batch_10.npz': npz([1], first=4),
        'train_data_batch_2.npz': npz([2, 2], first=2, save=np.savez),
        'val_data.npz': npz([3, 2, 1], first=10),
    }


@pytest.mark.parametrize('form', ['folder', 'zip', 'stored zip', 'folder of zips'])
def test_downsampled_imagenet(tmp_path, form):
    batches = npz_batches()
    if form == 'folder':
        path = put(tmp_path, batches)
    elif form == 'folder of zips':
        for part, names in enumerate([['train_data_batch_10.npz'], [*batches][:1], [*batches][2:3], [*batches][3:]]):
            put_zip(tmp_path / f'Imagenet4_{part}_npz.zip', {name: batches[name] for name in names})
        path = str(tmp_path)
    else:
        compression = zipfile.ZIP_STORED if 'stored' in form else zipfile.ZIP_DEFLATED
        path = put_zip(
            tmp_path / ('Imagenet4_npz.zip' if form == 'zip' else 'any'),
            {f'out/{name}': x for name, x in batches.items()},
            compression,
        )
    names = ['train_data_batch_1/0', 'train_data_batch_1/1', 'train_data_batch_2/0', 'train_data_batch_2/1']
    train = open_images(path)
    check(train, 'imagenet_npz', '123', [*names, 'train_data_batch_10/0'], [2, 0, 1, 1, 0])
    for order in (range(5), [4, 0, 3, 1, 2]):
        for index in order:
            image = train.read(index)
            assert image.shape == (4, 4, 3) and image.dtype == np.uint8
            assert image[0, 0].tolist() == [1, 2, 3] and (image.reshape(16, 3)[1:] == index).all()
    validation = open_images(path, split='validation')
    check(validation, 'imagenet_npz', '123', [f'val_data/{row}' for row in range(3)], [2, 1, 0])
    with pytest.raises(UserError, match=r"'train', 'validation', not 'test' \(config\.data\.split\)"):
        open_images(path, split='test')


def test_one_batch_of_downsampled_imagenet(tmp_path):
    path = put(tmp_path, npz_batches()) + '/val_data.npz'
    check(open_images(path, split='validation'), 'imagenet_npz', '123', [f'val_data/{i}' for i in range(3)], [2, 1, 0])
    refuses(path, 'no train*.npz', "'train'", 'val_data.npz', 'config.data.split')


def test_a_batch_is_opened_once(tmp_path, monkeypatch):
    images = open_images(put(tmp_path, npz_batches()))
    opened = []
    open_batch = imagenet_npz.ImagenetNpz._opened
    monkeypatch.setattr(
        imagenet_npz.ImagenetNpz, '_opened', lambda self, stem: opened.append(stem) or open_batch(self, stem)
    )
    for index in range(5):
        images.read(index)
    assert opened == ['train_data_batch_1', 'train_data_batch_2', 'train_data_batch_10']
    images.read(0)
    assert opened[3:] == ['train_data_batch_1']
    assert len(pickle.dumps(images)) < 2000


@pytest.mark.parametrize('outer', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_a_batch_is_never_whole_in_memory(tmp_path, monkeypatch, outer, save):
    """Reading 8 MB in order and then back takes at most 6 MB of memory; the labels follow the pixels."""
    monkeypatch.setattr(imagenet_npz, '_TAIL', 1 << 18)
    monkeypatch.setattr(zipfile.ZipExtFile, 'MAX_SEEK_READ', 1 << 18)  # else 16 MB
    data = np.tile(np.random.default_rng(0).integers(0, 256, (27, 3072), np.uint8), (100, 1))
    batch = npz(np.arange(2700) % 5 + 1, save=save, data=data)
    path = put_zip(tmp_path / 'Imagenet32_train_npz.zip', {'train_data_batch_1.npz': batch}, outer)
    del batch
    tracemalloc.start()
    images = open_images(path)
    for index in [*range(0, 2700, 100), 2699, 5]:
        expected = data[index].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(images.read(index), expected)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.labels.tolist() == [row % 5 for row in range(2700)] and peak < 6e6


def test_a_thousand_classes_are_imagenets(tmp_path):
    """Labels of downsampled ImageNet index TFDS's own list for it, which is not sorted by name."""
    labels = np.random.default_rng(0).permutation(1000) + 1
    images = open_images(put(tmp_path, {'val_data.npz': npz(labels, 1)}), split='validation')
    assert len(images.class_names) == len(set(images.class_names)) == 1000
    assert images.class_names == tuple(tfds.builder_cls('imagenet_resized')(
        config='8x8', data_dir=tmp_path / 'tfds').info.features['label'].names)  # fmt: skip
    np.testing.assert_array_equal(images.labels, labels - 1)


def test_downsampled_imagenet_that_cannot_be_read(tmp_path):
    good = npz([1, 2])
    other = npz([1], save=lambda file, data, labels, mean: np.savez(file, pixels=data))
    for data, words in [
        (good[: len(good) // 2], ['cannot be read']),
        (b'', ['cannot be read']),
        (npz([1, None]), ['cannot be read', 'allow_pickle']),
        (other, ['cannot be read', 'labels']),
        (npz([1, 2], data=np.zeros((2, 48), np.float32)), ['float32']),
        (npz([1, 2], data=np.zeros((3, 48), np.uint8)), ['(3, 48)', '(2,)']),
        (npz([1, 2], data=np.zeros((2, 50), np.uint8)), ['50 numbers']),
        (npz([0, 1]), ['not 1 to 1000']),
        (npz([1, 1001]), ['not 1 to 1000']),
        (npz([1.0, 2.0]), ['not 1 to 1000']),
        (npz([]), ['data']),
    ]:
        (tmp_path / 'train_data_batch_1.npz').write_bytes(data)
        refuses(tmp_path / 'train_data_batch_1.npz', 'train_data_batch_1.npz', *words)
    put(tmp_path / 'sizes', {'train_data_batch_1.npz': npz([1]), 'train_data_batch_2.npz': npz([1], side=8)})
    refuses(tmp_path / 'sizes', 'several sizes')
    put(tmp_path / 'twice', {'train_data_batch_1.npz': good})
    put_zip(tmp_path / 'twice/Imagenet4_npz.zip', {'train_data_batch_1.npz': good})
    refuses(tmp_path / 'twice', 'train_data_batch_1.npz twice', 'Imagenet4_npz.zip')
    (tmp_path / 'cut_npz.zip').write_bytes(pathlib.Path(tmp_path / 'twice/Imagenet4_npz.zip').read_bytes()[:-30])
    refuses(tmp_path / 'cut_npz.zip', 'damaged zip file')
    (tmp_path / 'x.npz').write_bytes(good)
    refuses(tmp_path / 'x.npz', 'no train*.npz', 'x.npz')


def test_damaged_pixels_show_when_they_are_read(tmp_path):
    path = tmp_path / 'train_data_batch_1.npz'
    data = bytearray(npz([1, 2], side=64, save=np.savez))
    data[data.index(b'data.npy') + 10_000] ^= 255
    path.write_bytes(data)
    images = open_images(str(path))
    with pytest.raises(UserError, match='cannot be read'):
        images.read(0)


def test_damage_of_a_batch_in_a_zip_shows_as_it_is_opened(tmp_path):
    path = tmp_path / 'Imagenet64_npz.zip'
    batch = npz([1, 2, 3], side=64, save=np.savez)
    damaged = bytearray(pathlib.Path(put_zip(path, {'train_data_batch_1.npz': batch}, zipfile.ZIP_STORED)).read_bytes())
    damaged[30_000] ^= 255  # a pixel of the third image
    path.write_bytes(damaged)
    refuses(path, 'cannot be read', 'Bad CRC')
    damaged = bytearray(pathlib.Path(put_zip(path, {'train_data_batch_1.npz': batch})).read_bytes())
    damaged[damaged.index(b'PK\x01\x02') + 16] ^= 255  # the checksum in the outer directory
    path.write_bytes(damaged)
    refuses(path, 'cannot be read', 'Bad CRC')


# ImageNet's tar files.

WNIDS = ['n01440764', 'n01443537', 'n15075141']


def jpeg(number):
    file = io.BytesIO()
    Image.new('L', (8, 8), 20 * number).save(file, 'JPEG')
    return file.getvalue()


def tar_bytes(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def train_tar(path, wnids=WNIDS):
    """Write a tar file whose members are in reverse order: tar files keep the order of adding."""
    return put_tar(path, {
        f'{wnid}.tar': tar_bytes({f'{wnid}_{number}.JPEG': jpeg(3 * index + number) for number in (2, 1)})
        for index, wnid in reversed(list(enumerate(wnids)))
    })  # fmt: skip


def test_imagenet_train_tar(tmp_path):
    images = open_images(train_tar(tmp_path / 'ILSVRC2012_img_train.tar'))
    names = [f'{wnid}/{wnid}_{number}.JPEG' for wnid in WNIDS for number in (1, 2)]
    known = tfds.core.tfds_path('datasets/imagenet2012/labels.txt').read_text().split()
    check(images, 'imagenet_tar', known, names, [0, 0, 1, 1, 999, 999])
    assert [images.read(i) for i in (5, 0)] == [jpeg(8), jpeg(1)]
    refuses(tmp_path / 'ILSVRC2012_img_train.tar', "'train', not 'validation'", 'config.data.split', split='validation')
    refuses(tmp_path / 'ILSVRC2012_img_train.tar', "'train', 'validation', not 'test'", split='test', field='')


def test_other_classes_in_the_layout_of_imagenet_train(tmp_path):
    images = open_images(train_tar(tmp_path / 'x.tar', ['zebra', 'ant']))
    names = [f'{name}/{name}_{number}.JPEG' for name in ('ant', 'zebra') for number in (1, 2)]
    check(images, 'imagenet_tar', ['ant', 'zebra'], names, [0, 0, 1, 1])


def test_imagenet_validation_tar(tmp_path, monkeypatch):
    lists = {'labels.txt': WNIDS, 'validation_labels.txt': [WNIDS[2], WNIDS[0], WNIDS[2]]}
    monkeypatch.setattr(imagenet_tar, 'tfds_lines', lambda path: lists[os.path.basename(path)])
    names = [f'ILSVRC2012_val_0000000{number}.JPEG' for number in (1, 2, 3)]
    files = {f'./{names[number]}': jpeg(number) for number in (1, 2, 0)}
    path = put_tar(tmp_path / 'val.tar', files | {'./x.txt': b'x', './._y.JPEG.txt': b'y'})
    images = open_images(path, split='validation')
    check(images, 'imagenet_tar', WNIDS, names, [2, 0, 2], ignored=['x.txt', '._y.JPEG.txt'])
    assert [images.read(i) for i in range(3)] == [jpeg(0), jpeg(1), jpeg(2)]
    refuses(path, "'validation', not 'train'", 'config.data.split')


def test_tfds_lists_are_as_they_are_taken_to_be(tmp_path):
    validation = labels.tfds_lines('datasets/imagenet2012/validation_labels.txt')
    names = labels.tfds_lines('datasets/imagenet2012/labels.txt')
    assert len(validation) == 50_000 and len(names) == 1000 and set(validation) == set(names)
    path = put_tar(tmp_path / 'val.tar', {'ILSVRC2012_val_00000001.JPEG': jpeg(1)})
    refuses(path, 'holds 1 images', '50,000', split='validation')


def test_other_tar_files(tmp_path):
    inner = tar_bytes({'x.JPEG': jpeg(1)})
    for name, files in {
        'folders': {'cat/1.JPEG': jpeg(1), 'dog/1.JPEG': jpeg(2)},
        'mixed': {'1.JPEG': jpeg(1), 'n01440764.tar': inner},
        'text': {'x.txt': b'x'},
        'empty': {},
    }.items():
        path = put_tar(tmp_path / f'{name}.tar', files)
        refuses(path, f'{name}.tar', 'is not recognised', 'ILSVRC2012_img_train.tar')
    refuses(put_tar(tmp_path / 'x.tar', {'n01440764.tar': tar_bytes({'x.txt': b'x'})}), 'without images')


def test_damaged_tar_files(tmp_path):
    path = pathlib.Path(train_tar(tmp_path / 'train.tar'))
    data = path.read_bytes()
    end = len(data.rstrip(b'\0'))
    lengths = [0, 100, 512, 513, 1024, 1700, 2048, 2560, len(data) // 2, len(data) // 2 // 512 * 512, end - 1]
    for length in lengths:
        path.write_bytes(data[:length])
        refuses(path, 'train.tar', 'damaged or truncated')
    inner = bytearray(data)
    inner[inner.index(b'n15075141_1') : inner.index(b'n15075141_1') + 400] = b'\xff' * 400
    path.write_bytes(inner)
    refuses(path, 'train.tar', 'damaged or truncated')
    outer = bytearray(data)
    outer[outer.index(b'n01443537.tar')] ^= 1
    path.write_bytes(outer)
    refuses(path, 'train.tar', 'damaged or truncated')
