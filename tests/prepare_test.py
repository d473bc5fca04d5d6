import errno
import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cfg_jax import files
from cfg_jax.data import sources, workers
from cfg_jax.data.images import Unreadable, encode_png
from cfg_jax.data.preparing import folder, labels, shards, tfds_writer
from cfg_jax.errors import UserError
from cfg_jax.jobs import prepare
from tests import tfds_layout, tiny


def config(path, data_dir, *, size, classes, **changes):
    """Return a config that prepares `path` in this process."""
    changes = {'prepare__num_workers': 1, 'data__name': 'my_images', 'data__image_channels': 3, **changes}
    return tiny.config(
        data__source='tfds',
        data__data_dir=str(data_dir),
        data__image_size=size,
        data__num_classes=classes,
        prepare__path=str(path),
        **changes,
    )


def run(*arguments, **options):
    return prepare.run(config(*arguments, **options), None)


def stock(name, data_dir, split='train'):
    """Open the data set with TFDS itself."""
    return tfds.builder(name, data_dir=data_dir).as_data_source(split)


def noise(rng, height, width, channels=3):
    """Return smooth random pixels."""
    small = rng.integers(0, 256, (8, 8, channels), dtype=np.uint8)
    small = Image.fromarray(small.squeeze())
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).reshape(height, width, channels)


def encoded(image, kind='jpeg', **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def write_folder(folder, files):
    """Write files, {relative name: bytes}."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_cifar10(path, numbers):
    """Write CIFAR-10's archive: image i of batch b is picture(numbers[b][i], 32), of class 3 number mod 10."""

    def add(archive, name, content):
        data = pickle.dumps(content, protocol=2)
        info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

    with tarfile.open(path, 'w:gz') as archive:
        add(archive, 'batches.meta', {b'label_names': [name.encode() for name in tfds_layout.CIFAR10]})
        for name, batch in numbers.items():
            pixels = np.stack([tfds_layout.picture(i, 32).transpose(2, 0, 1).ravel() for i in batch])
            add(archive, name, {b'data': pixels, b'labels': [3 * i % 10 for i in batch]})
    return path


def test_cifar10_as_tfds_has_it(tmp_path):
    """TFDS and `sources` read both splits back without TensorFlow: ids, pixels and labels by name."""
    batches = {f'data_batch_{b + 1}': range(6 * b, 6 * b + 6) for b in range(5)}
    archive = write_cifar10(tmp_path / 'cifar-10-python.tar.gz', {**batches, 'test_batch': range(100, 108)})
    (tmp_path / 'cifar10' / '3.0.2').mkdir(parents=True)  # an empty folder is as good as none
    for split in ('train', 'test'):
        folder = run(archive, tmp_path, size=32, classes=10, data__name='cifar10', data__split=split)
    assert folder == tmp_path / 'cifar10' / '3.0.2'
    for split, first, count in (('train', 0, 30), ('test', 100, 8)):
        read = stock('cifar10', tmp_path, split)
        assert len(read) == count and read.dataset_info.features['label'].names == list(tfds_layout.CIFAR10)
        for index, example in enumerate(read):
            assert example['id'] == f'{split}_{index:05d}'.encode()
            np.testing.assert_array_equal(example['image'], tfds_layout.picture(first + index, 32))
            assert example['label'] == 3 * (first + index) % 10
    ours = sources.TfdsSource('cifar10', 'train[10:]', str(tmp_path), (32, 32, 3))
    assert len(ours) == 20 and tfds_layout.number_of(ours[3]['image']) == 13
    assert 'tensorflow' not in sys.modules


def write_idx(folder, split, numbers):
    """Write Fashion-MNIST's files of a split: image i is the gray `picture(i, 28)`, of class 3 i mod 10."""
    pixels = np.stack([tfds_layout.picture(i, 28)[..., 0] for i in numbers])
    labels = np.array([3 * i % 10 for i in numbers], np.uint8)
    return write_folder(
        folder,
        {
            f'{split}-{name}-ubyte.gz': gzip.compress(
                struct.pack(f'>HBB{values.ndim}I', 0, 8, values.ndim, *values.shape) + values.tobytes()
            )
            for name, values in (('images-idx3', pixels), ('labels-idx1', labels))
        },
    )


FASHION = {'size': 28, 'classes': 10, 'data__image_channels': 1, 'data__name': 'fashion_mnist'}


def test_fashion_mnist_as_tfds_has_it(tmp_path):
    for split, numbers in (('train', range(30)), ('t10k', range(100, 108))):
        raw = write_idx(tmp_path / 'in', split, numbers)
    folder = run(raw, tmp_path, **FASHION, prepare__splits=('train', 'test'))
    assert folder.parent == tmp_path / 'fashion_mnist'
    for split, first, count in (('train', 0, 30), ('test', 100, 8)):
        read = stock('fashion_mnist', tmp_path, split)
        assert len(read) == count and read.dataset_info.features['label'].int2str(9) == 'Ankle boot'
        for index, example in enumerate(read):
            np.testing.assert_array_equal(example['image'], tfds_layout.picture(first + index, 28)[..., :1])
            assert example['label'] == 3 * (first + index) % 10
    ours = sources.TfdsSource('fashion_mnist', 'train[10:]', str(tmp_path), (28, 28, 1))
    assert len(ours) == 20 and ours.class_names[0] == 'T-shirt/top'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data__name': 'mine', 'data__image_channels': 3}, r'none of the 30 .* has 1 channels, not the 3 of config'),
        ({'data__image_channels': 3}, r'are \(28, 28, 1\), not \(28, 28, 3\) \(config\.data\.image_size'),
        ({'data__name': 'mine', 'size': 32}, r'none of the 30 .* smaller than 32x32: 28x28.*config\.data\.upsample'),
        ({'data__name': 'mine', 'classes': 9}, r'config\.data\.num_classes is 9, but mine.* has 10 classes'),
        ({'data__split': 'test'}, r"has the splits 'train', not 'test' \(config\.data\.split\)"),
        ({'prepare__splits': ('test',)}, r"has the splits 'train', not 'test' \(config\.prepare\.splits\)"),
        ({'prepare__splits': ('train', 'test[:9]')}, r"^config\.prepare\.splits is 'test\[:9\]'; --mode=prepare takes"),
        ({'data__name': 'emnist/letters'}, r"is 'emnist/letters', TFDS's own data set.*'emnist_letters'"),
    ],
    ids=str,
)  # fmt: skip
def test_idx_files_that_do_not_fit_the_config(tmp_path, changes, message):
    raw = write_idx(tmp_path / 'in', 'train', range(30))
    with pytest.raises(UserError, match=message):
        run(raw, tmp_path / 'out', **FASHION | changes)
    assert not [path for path in tmp_path.joinpath('out').rglob('*') if path.is_file()]


def test_damage_of_idx_files_during_the_work_leaves_nothing_that_looks_finished(tmp_path):
    """The work is resumed when the file is back, and the records are those of undisturbed work."""
    raw = write_idx(tmp_path / 'in', 'train', range(60))
    undisturbed = run(raw, tmp_path / 'undisturbed', **FASHION, prepare__num_shards=6)
    images, write = raw / 'train-images-idx3-ubyte.gz', shards.Work.write
    sound, status = images.read_bytes(), images.stat()

    def third_fails(work, shard, report):
        if shard == 3:
            images.write_bytes(sound[: len(sound) // 4])
            work.raw._pixels._file.close()
            work.raw._pixels._file = None
        write(work, shard, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Work, 'write', third_fails)
        with pytest.raises(UserError, match=r'train-images-idx3-ubyte\.gz is damaged: Compressed file ended'):
            run(raw, tmp_path, **FASHION, prepare__num_shards=6)
    begun = next((tmp_path / 'fashion_mnist').iterdir())
    assert begun.name.endswith('.incomplete-train') and len(shard_bytes(begun)) == 3
    images.write_bytes(sound)
    os.utime(images, ns=(status.st_atime_ns, status.st_mtime_ns))
    folder = run(raw, tmp_path, **FASHION, prepare__num_shards=6, prepare__num_workers=2)
    assert shard_bytes(folder) == shard_bytes(undisturbed) and [path.name for path in folder.parent.iterdir()] == [
        folder.name
    ]


def test_imagenet_resized_as_tfds_has_it(tmp_path):
    """Two zip files of batches become TFDS's train split: labels from 1 become ids from 0."""
    labels = np.random.default_rng(0).permutation(1000)
    parts = np.split(np.arange(1000), [400, 700])
    for part, members in (('part1', (0, 1)), ('part2', (2,))):
        with zipfile.ZipFile(tmp_path / f'Imagenet64_train_{part}_npz.zip', 'w') as archive:
            for batch in members:
                pixels = [tfds_layout.picture(i, 64).transpose(2, 0, 1).ravel() for i in parts[batch]]
                file = io.BytesIO()
                np.savez(file, data=np.stack(pixels), labels=labels[parts[batch]] + 1)
                archive.writestr(f'train_data_batch_{batch + 1}.npz', file.getvalue())
    name = 'imagenet_resized/64x64'
    folder = run(tmp_path, tmp_path / 'out', size=64, classes=1000, data__name=name, prepare__num_shards=3)
    assert folder == tmp_path / 'out' / 'imagenet_resized' / '64x64' / '0.1.0'
    read = stock(name, tmp_path / 'out')
    assert len(read) == 1000 and read.dataset_info.splits['train'].shard_lengths == [333, 333, 334]
    for index in (0, 332, 333, 399, 400, 999):
        np.testing.assert_array_equal(read[index]['image'], tfds_layout.picture(index, 64))
        assert read[index]['label'] == labels[index]
    assert read.dataset_info.features['label'].int2str(0) == 'n02119789'
    assert len(sources.TfdsSource(name, 'train', str(tmp_path / 'out'), (64, 64, 3))) == 1000


def test_labels_go_to_a_known_data_set_by_name(tmp_path):
    """A folder sorts its classes by name, TFDS's imagenet_resized does not."""
    rng, wnids = np.random.default_rng(0), ['n01440764', 'n02100735', 'n02119789']
    folder = write_folder(tmp_path / 'in', {f'{wnid}/x.png': encoded(noise(rng, 8, 8), 'png') for wnid in wnids})
    name = 'imagenet_resized/8x8'
    run(folder, tmp_path, size=8, classes=1000, data__name=name)
    read = stock(name, tmp_path)
    assert [read.dataset_info.features['label'].int2str(each['label']) for each in read] == wnids
    assert [int(each['label']) for each in read][1:] == [1, 0]

    write_folder(folder, {'tench/x.png': encoded(noise(rng, 8, 8), 'png')})
    with pytest.raises(UserError, match=r"1 of the 4 classes.*'tench'.*imagenet_resized/8x8.*config\.data\.name"):
        run(folder, tmp_path, size=8, classes=1000, data__name=name, data__split='validation')


BAD = {  # name: (bytes from those of a sound JPEG, the reason that the report gives)
    'class_0/empty.jpg': (lambda sound: b'', 'empty file'),
    'class_1/truncated.jpg': (lambda sound: sound[: len(sound) // 2], 'truncated'),
    'class_2/not_an_image.jpg': (lambda sound: b'It is a text.' * 40, 'not an image'),
    'class_3/small.jpg': (lambda sound: encoded(noise(np.random.default_rng(0), 60, 90)), 'smaller than 64x64: 60x90'),
}


@pytest.fixture(scope='module')
def two_thousand(tmp_path_factory):
    """2,000 images of four classes, most of them JPEGs of 70 to 200 pixels a side, and notes.txt."""
    rng, files = np.random.default_rng(0), {}
    for i in range(2000):
        files[f'class_{i % 4}/{i:04d}.jpg'] = encoded(noise(rng, *rng.integers(70, 201, 2)))
    rgb = noise(rng, 80, 120)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    files |= {
        'class_0/0000.jpg': encoded(Image.fromarray(rgb).convert('CMYK')),
        'class_0/0004.jpg': encoded(Image.fromarray(rgb).convert('L')),
        'class_0/0008.jpg': encoded(rgb, exif=exif, quality=98),
    }
    for number, mode in (('0012', 'P'), ('0016', 'RGBA')):
        del files[f'class_0/{number}.jpg']
        files[f'class_0/{number}.png'] = encoded(Image.fromarray(rgb).convert(mode), 'png')
    sound = files['class_1/0001.jpg']
    for i, (name, (spoil, _)) in enumerate(BAD.items()):
        del files[f'class_{i}/{1996 + i}.jpg']
        files[name] = spoil(sound)
    assert len(files) == 2000
    return write_folder(tmp_path_factory.mktemp('two_thousand'), {**files, 'notes.txt': b'Mine.'}), rgb


def shard_bytes(folder):
    """Return {file name: contents}."""
    return {path.name: path.read_bytes() for path in folder.glob('*.array_record-*')}


@pytest.fixture(scope='module')
def undisturbed(two_thousand, tmp_path_factory):
    """The folder of the data set that one uninterrupted process makes of the 2,000 images."""
    data_dir = tmp_path_factory.mktemp('undisturbed')
    settings = {'data__resampling': 'adm', 'prepare__num_shards': 20}
    return run(two_thousand[0], data_dir, size=64, classes=4, **settings)


def test_two_thousand_files_survive_a_kill(two_thousand, undisturbed, tmp_path):
    """Killed in the middle, two workers leave nothing that looks finished; rerunning makes identical files."""
    flags = tiny.flags(
        data__source='tfds',
        data__name='my_images',
        data__data_dir=tmp_path,
        data__image_size=64,
        data__image_channels=3,
        data__num_classes=4,
        data__resampling='adm',
        prepare__path=two_thousand[0],
        prepare__num_workers=2,
        prepare__num_shards=20,
    )
    begun = tiny.main('--mode=prepare', *flags, start=subprocess.Popen, start_new_session=True)
    progress = tmp_path / 'my_images' / '1.0.0.incomplete-train' / 'progress'
    deadline = time.monotonic() + 60
    while not list(progress.glob('0*.json')) and begun.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    begun.kill()  # alone: its processes must end with it
    begun.communicate(timeout=60)  # until the last process that holds the pipes is gone
    finished = len(list(progress.glob('0*.json')))
    assert 1 <= finished < 20 and not (tmp_path / 'my_images' / '1.0.0').exists()
    with pytest.raises(tfds.core.registered.DatasetNotFoundError):
        tfds.builder('my_images', data_dir=tmp_path)

    done = tiny.main('--mode=prepare', *flags)
    assert done.returncode == 0, done.stderr
    assert f'resuming: {finished} of 20 shards done\n' in done.stdout
    assert re.search(r'^prepared 2000/2000  \d+ images/s  4 skipped  0s left$', done.stdout, re.MULTILINE)
    assert 'prepared 1996 of 2000 images in ' in done.stdout
    for name, (_, reason) in BAD.items():
        assert f'skipped 1: {reason.split(":")[0]}\n' in done.stdout and f'  {name}: {reason}\n' in done.stdout
    assert 'ignored 1 other entries, such as notes.txt: not an image by its name' in done.stdout

    folder = tmp_path / 'my_images' / '1.0.0'
    assert len(shard_bytes(folder)) == 20 and shard_bytes(folder) == shard_bytes(undisturbed)
    kinds = {'dataset_info.json', 'features.json', 'label.labels.txt', 'prepared-train.json'}
    assert {path.name for path in folder.iterdir()} == kinds | set(shard_bytes(folder))
    for name in kinds:
        assert (folder / name).read_text() == (undisturbed / name).read_text()
    assert [path.name for path in folder.parent.iterdir()] == ['1.0.0']


def test_the_report_and_the_records_agree(two_thousand, undisturbed):
    report = json.loads((undisturbed / 'prepared-train.json').read_text())
    assert report['classes'] == {f'class_{i}': 499 for i in range(4)} and report['written'] == 1996
    assert sorted(report['skipped']) == sorted([name, reason] for name, (_, reason) in BAD.items())
    assert report['ignored'] == [['notes.txt', 'not an image by its name']]
    assert report['settings']['path'] == str(two_thousand[0])
    read = stock('my_images', undisturbed.parent.parent)
    assert read.dataset_info.supervised_keys == ('image', 'label')
    assert "resampled by 'adm' to 64x64" in read.dataset_info.description
    labels = [read[index]['label'] for index in range(len(read))]
    assert np.bincount(labels).tolist() == [499] * 4 and sum(read.dataset_info.splits['train'].shard_lengths) == 1996
    # files are in the order of their names: CMYK, gray, turned, palette, RGBA, of one picture
    cmyk, gray, turned, palette, rgba = (read[index]['image'].astype(int) for index in range(5))
    assert (gray == gray[..., :1]).all()
    assert np.abs(cmyk - rgba).mean() < 8 and np.abs(palette - rgba).mean() < 12
    assert np.abs(np.rot90(turned) - rgba).mean() < 3 < np.abs(turned - rgba).mean()


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes, each of three gray and three colour images of 20x24, and one broken file."""
    rng = np.random.default_rng(0)
    files = {
        f'{c}/{i}.png': encoded(noise(rng, 20, 24, 1 + 2 * (i % 2)).squeeze(), 'png') for c in 'ab' for i in range(6)
    }
    return write_folder(tmp_path / 'pictures', {**files, 'a/broken.png': b''})


def test_a_second_split_joins_the_first(pictures, tmp_path, capsys):
    folder = run(pictures, tmp_path, size=8, classes=2)
    before, info = shard_bytes(folder), (folder / 'dataset_info.json').read_bytes()
    shutil.rmtree(pictures / 'a')
    validation = {'size': 8, 'classes': 2, 'data__split': 'validation', 'prepare__num_shards': 4}

    def fails(source, target):
        if target.name == 'dataset_info.json':
            raise KeyboardInterrupt
        os.rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.os, 'replace', fails)
        with pytest.raises(KeyboardInterrupt):
            run(pictures, tmp_path, **validation)
    assert (folder / 'dataset_info.json').read_bytes() == info and len(stock('my_images', tmp_path)) == 12
    run(pictures, tmp_path, **validation)
    assert 'resuming: 4 of 4 shards done' in capsys.readouterr().out
    assert (
        len(stock('my_images', tmp_path)) == 12
        and [each['label'] for each in stock('my_images', tmp_path, 'validation')] == [1] * 6
    )
    assert before.items() <= shard_bytes(folder).items()
    description = tfds.builder('my_images', data_dir=tmp_path).info.description
    assert 'train: 12 images' in description and 'validation: 6 images' in description

    run(pictures, tmp_path, **validation)
    assert f'already prepared: {folder}\n' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'resampling was .box. and is now .adm.; undo that, or delete'):
        run(pictures, tmp_path, **validation, data__resampling='adm')
    with pytest.raises(UserError, match=r'are \(8, 8, 3\), not \(9, 9, 3\) \(config\.data\.image_size'):
        run(pictures, tmp_path, **{**validation, 'size': 9, 'data__split': 'test'})
    assert sorted(path.name for path in folder.parent.iterdir()) == ['1.0.0']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data__upsample': True}, r'config\.data\.upsample was False and is now True'),
        ({'data__image_channels': 1}, r'config\.data\.image_channels was 3 and is now 1'),
        ({'prepare__num_shards': 3}, r'config\.prepare\.num_shards was 6 and is now 3'),
        ({'one_less': True}, r'images of config\.prepare\.path have changed \(num_images\)'),
    ],
    ids=str,
)
def test_other_settings_do_not_resume_it(pictures, tmp_path, changes, message):
    """Work interrupted after its third shard is resumed with the same settings or not at all."""
    write = shards.Work.write
    settings = {'size': 8, 'classes': 2, 'prepare__num_shards': 6}

    def third_fails(work, shard, report):
        if shard == 3:
            raise KeyboardInterrupt
        write(work, shard, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Work, 'write', third_fails)
        with pytest.raises(KeyboardInterrupt):
            run(pictures, tmp_path, **settings)
    if changes.pop('one_less', False):
        (pictures / 'b' / '0.png').unlink()
    begun = tmp_path / 'my_images' / '1.0.0.incomplete-train'
    with pytest.raises(UserError, match=rf'^{begun} was made with other settings: .*{message}; undo that, or delete'):
        run(pictures, tmp_path, **{**settings, **changes})
    assert not begun.with_name('1.0.0').exists() and len(shard_bytes(begun)) == 3


def test_files_that_were_only_touched_are_the_same(pictures, tmp_path, capsys):
    """New times alone, as a copy gives them, ask for a look at the contents: once, and also of unfinished work."""
    source = shutil.copytree(pictures, tmp_path / 'copy')

    def touch():
        for path in source.rglob('*.png'):
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))

    settings, write = {'size': 8, 'classes': 2, 'prepare__num_shards': 3}, shards.Work.write

    def last_fails(work, shard, report):
        if shard == 2:
            raise KeyboardInterrupt
        write(work, shard, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Work, 'write', last_fails)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path, **settings)
    touch()
    capsys.readouterr()
    made = run(source, tmp_path, **settings)
    assert '; comparing contents\nresuming: 2 of 3 shards done\n' in capsys.readouterr().out
    touch()
    for compared in (f'the times of files in {source} have changed; comparing contents\n', ''):
        assert run(source, tmp_path, **settings) == made
        assert capsys.readouterr().out == f'{compared}already prepared: {made}\n'


@pytest.mark.parametrize('packed', [False, True], ids=['folder', 'zip'])
def test_files_that_changed_are_not_taken_for_the_same(pictures, tmp_path, packed):
    """A finished data set is not taken for one of changed files with the same names."""
    path, changed = pictures, pictures / 'a' / '0.png'
    if packed:
        path = Path(shutil.make_archive(tmp_path / 'pictures', 'zip', pictures))
    run(path, tmp_path, size=8, classes=2)
    run(path, tmp_path, size=8, classes=2)
    changed.write_bytes((pictures / 'a' / '1.png').read_bytes())
    if packed:
        shutil.make_archive(tmp_path / 'pictures', 'zip', pictures)
    message = (
        r'1\.0\.0 was made .*: the sizes or times of files of config\.prepare\.path have changed; .*delete the folder'
    )
    with pytest.raises(UserError, match=message):
        run(path, tmp_path, size=8, classes=2)


def test_a_prepared_set_keeps_the_order_of_its_classes(tmp_path, monkeypatch, capsys):
    """A set from before classes were ordered by their numbers is still taken for prepared, and a split joins it."""
    raw = tmp_path / 'raw'
    for number in range(12):
        (raw / str(number)).mkdir(parents=True)
        (raw / str(number) / 'x.png').write_bytes(encode_png(np.full((8, 8, 3), number, np.uint8)))
    with monkeypatch.context() as before:
        before.setattr(labels, 'natural', lambda name: name)
        made = run(raw, tmp_path, size=8, classes=12)
    order = (made / 'label.labels.txt').read_text().split()
    assert order == sorted(map(str, range(12)))
    capsys.readouterr()
    assert run(raw, tmp_path, size=8, classes=12) == made
    assert capsys.readouterr().out.startswith('already prepared')
    run(raw, tmp_path, size=8, classes=12, data__split='test')
    source = sources.TfdsSource('my_images', 'test', str(tmp_path), (8, 8, 3))
    assert source.class_names == tuple(order)
    assert all(order[source.label(index)] == str(source[index]['image'][0, 0, 0]) for index in range(12))


def test_passing_errors_leave_no_image_out(pictures, tmp_path, monkeypatch):
    def stale(self, index):
        raise Unreadable('unreadable: Stale file handle') from OSError(errno.ESTALE, 'Stale file handle')

    monkeypatch.setattr(folder.ImageFolder, 'read', stale)
    with pytest.raises(UserError, match=r'^a/0\.png: unreadable: Stale file handle .*; rerun the same command'):
        run(pictures, tmp_path, size=8, classes=2, prepare__num_workers=1)


def test_classes_without_images_are_named(pictures, tmp_path, capsys):
    names = [f'a/{i}.png' for i in range(6)] + [f'b/{i}.png' for i in range(6)]
    labels = {name: 1 + (name < 'b') for name in names} | {'a/broken.png': 3}
    (pictures / 'labels.json').write_text(json.dumps(labels))
    run(pictures, tmp_path, size=8, classes=4)
    assert '\n2 of 4 classes have no images: 0, 3\n' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['', ' a', 'a\x07'], ids=repr)
def test_class_names_that_tfds_cannot_store(tmp_path, name):
    with pytest.raises(UserError, match=rf'called {re.escape(repr(name))}.*config\.prepare\.path'):
        tfds_writer.locate('my_images', tmp_path, ['b', name], (8, 8, 3))


def test_images_that_do_not_fit(pictures, tmp_path, capsys):
    with pytest.raises(UserError, match=r'num_classes is 10, but my_images/1\.0\.0 from .*/pictures has 2 classes'):
        run(pictures, tmp_path, size=8, classes=10)
    small = r'none of the 13 images .*; a/0\.png: smaller than 32x32: 20x24\. 12 are too small: set .*upsample=True'
    with pytest.raises(UserError, match=small):
        run(pictures, tmp_path, size=32, classes=2)
    assert not list((tmp_path / 'my_images').iterdir())
    run(pictures, tmp_path, size=32, classes=2, data__upsample=True)
    assert stock('my_images', tmp_path)[5]['image'].shape == (32, 32, 3)

    write_folder(pictures, {'b/large.png': encoded(noise(np.random.default_rng(0), 40, 40), 'png')})
    capsys.readouterr()
    run(pictures, tmp_path / 'one', size=32, classes=2)
    out = capsys.readouterr().out
    assert 'prepared 1 of 14 images' in out and 'skipped 12: smaller than 32x32\n' in out
    assert (
        'most were skipped: 12 are too small: set config.data.upsample=True or a smaller config.data.image_size' in out
    )
    (pictures / 'b' / 'large.png').unlink()

    folder = run(pictures, tmp_path / 'gray', size=8, classes=2, data__image_channels=1, prepare__num_shards=12)
    out = capsys.readouterr().out
    assert 'skipped 6: has colour' in out and 'skipped 1: empty file' in out
    read = stock('my_images', tmp_path / 'gray')
    # files without any image among them
    assert len(read) == 6 and 0 in read.dataset_info.splits['train'].shard_lengths and len(shard_bytes(folder)) == 12
    assert read[5]['image'].shape == (8, 8, 1)
    ours = sources.TfdsSource('my_images', 'train', str(tmp_path / 'gray'), (8, 8, 1))
    np.testing.assert_array_equal(ours.batch(np.arange(6))['image'], [read[index]['image'] for index in range(6)])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data__name': ''}, r"config\.data\.name is ''"),
        ({'data__name': '../x'}, r'config\.data\.name is'),
        ({'data__name': 'cifar100'}, r'features id, image, label, coarse_label; .*config\.data\.name'),
        ({'data__name': 'cifar10'}, r'images of cifar10/3\.0\.2 .* are \(32, 32, 3\), not \(8, 8, 3\)'),
        ({'data__split': 'train[:10%]'}, r"config\.data\.split is 'train\[:10%\]'"),
        ({'prepare__num_shards': 14}, r'config\.prepare\.num_shards is 14; allowed: up to 13, the images in'),
        ({'prepare__path': ''}, r'config\.prepare\.path is not set'),
    ],
    ids=str,
)
def test_settings_that_cannot_be(pictures, tmp_path, changes, message):
    before = sorted(tmp_path.rglob('*'))
    settings = config(pictures, tmp_path, size=8, classes=2)
    settings.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    with pytest.raises(UserError, match=message):
        prepare.run(settings, None)
    assert sorted(tmp_path.rglob('*')) == before


def test_what_lies_there_from_elsewhere(pictures, tmp_path):
    """A split can be added to a data set that TFDS itself prepared, but none of its splits is replaced."""
    tfds_layout.write_cifar10(tmp_path, 4)
    archive = write_cifar10(
        tmp_path / 'cifar.tar.gz', {f'data_batch_{b}': [b] for b in range(1, 6)} | {'test_batch': [7]}
    )
    cifar10 = {'size': 32, 'classes': 10, 'data__name': 'cifar10'}
    with pytest.raises(UserError, match=r"cifar10/3\.0\.2 has the split 'train' already, but not from --mode=prepare"):
        run(archive, tmp_path, **cifar10)
    folder = run(archive, tmp_path, **cifar10, data__split='test')
    assert len(stock('cifar10', tmp_path)) == 4 and stock('cifar10', tmp_path, 'test')[0]['label'] == 1
    tfds_layout.as_tfrecord(folder)
    with pytest.raises(UserError, match=r'in the file format tfrecord, not array_record; give another'):
        run(archive, tmp_path, **cifar10)

    stray = tmp_path / 'my_images' / '1.0.0' / 'mine.txt'
    stray.parent.mkdir(parents=True)
    stray.write_text('Mine.')
    with pytest.raises(UserError, match=r'my_images/1\.0\.0 holds files but no dataset_info\.json'):
        run(pictures, tmp_path, size=8, classes=2)


def test_file_names_of_any_bytes(tmp_path, capsys):
    """Two images, one broken, have names that are not UTF-8; the data set stores file names."""
    folder = tmp_path / 'in' / 'n01443537'
    folder.mkdir(parents=True)
    image = noise(np.random.default_rng(0), 8, 8)
    for name, data in ((b'\xff.png', encoded(image, 'png')), (b'\xfe\n.png', b'')):
        with open(os.fsencode(folder) + b'/' + name, 'wb') as file:
            file.write(data)
    run(tmp_path / 'in', tmp_path, size=8, classes=1000, data__name='imagenet2012')
    assert '\n  n01443537/\\udcfe\\n.png: empty file\n' in capsys.readouterr().out
    (example,) = stock('imagenet2012', tmp_path)
    assert example['file_name'] == b'\xff.png' and example['label'] == 1
    np.testing.assert_array_equal(example['image'], image)


def test_folders_named_in_other_bytes_than_utf8(tmp_path, capsys):
    """Data may be prepared from and into such a folder, and read there; what is printed fits into UTF-8."""
    raw, out = (tmp_path / os.fsdecode(name) for name in (b'bilder-gr\xfcn', b'sortie-\xe9'))
    write_folder(raw, {f'{c}/x.png': encode_png(np.full((8, 8, 3), n, np.uint8)) for n, c in enumerate('ab')})
    made = run(raw, out, size=8, classes=2)
    assert capsys.readouterr().out.splitlines()[-1] == f'report: {tmp_path}/sortie-\\udce9/{made.relative_to(out)}' + (
        '/prepared-train.json'
    )
    assert run(raw, out, size=8, classes=2) == made
    assert capsys.readouterr().out == f'already prepared: {tmp_path}/sortie-\\udce9/{made.relative_to(out)}\n'
    source = sources.TfdsSource('my_images', 'train', str(out), (8, 8, 3))
    assert [source[i]['image'][0, 0, 0] for i in range(2)] == [0, 1]


def test_the_number_of_files():
    numbers = {1: 1, 250: 1, 251: 2, 3900: 16, 50_000: 16, 160_001: 17, 1_281_167: 129}
    assert {images: prepare.default_shards(images) for images in numbers} == numbers


def test_a_full_disk_is_one_line_and_no_end(pictures, tmp_path):
    """A limit on the size of files stands for a full disk: the library fails in the same way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r'1\.0\.0\.incomplete-train cannot be written: .*File too large.*rerun'):
            run(pictures, tmp_path, size=128, classes=2, data__upsample=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run(pictures, tmp_path, size=128, classes=2, data__upsample=True).name == '1.0.0'


def test_one_process_at_a_time(pictures, tmp_path):
    folder = tmp_path / 'my_images' / '1.0.0.incomplete-train'
    folder.mkdir(parents=True)
    with files.locked(folder / 'lock', ''), pytest.raises(UserError, match='another process is preparing'):
        run(pictures, tmp_path, size=8, classes=2)


def _dies(task, report):
    report(1, 0)
    os._exit(7)


def _refuses(task, report):
    raise UserError(f'no {task}')


def test_processes_that_die_or_refuse():
    with pytest.raises(UserError, match=r'died \(exit status 7;.*config\.prepare\.num_workers'):
        workers.run(_dies, [1, 2], 1, lambda done, skipped: None)
    with pytest.raises(UserError, match=r'^no sun$'):
        workers.run(_refuses, ['sun'], 1, lambda done, skipped: None)
