import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image
from sklearn.datasets import load_digits
from tensorboardX.record_writer import RecordWriter
from tensorflow_datasets.proto import tf_example_generated_pb2

from cfg_jax import trained
from cfg_jax.data import images, pipeline, sources, spread
from cfg_jax.data.preparing import labels
from cfg_jax.errors import UserError
from cfg_jax.jobs import prepare, train
from tests import tfds_layout, tiny
from tests.numbered import Numbered


def labels_of(iterator, batches):
    return np.concatenate([next(iterator)['label'] for _ in range(batches)])


def make(**changes):
    return pipeline.train_batches(Numbered(), **{'batch_size': 10, 'seed': 0, 'flip': False, **changes})


def test_digits_are_sklearns():
    source, bunch = sources.digits(), load_digits()
    assert len(source) == 1797 and source.image_shape == (8, 8, 1) and source.class_names == tuple('0123456789')
    example = source[100]
    assert example['image'].dtype == np.uint8 and example['label'] == bunch.target[100] == source.label(100)
    np.testing.assert_allclose(
        example['image'][..., 0] / 255 * 16, bunch.images[100], atol=0.04
    )  # half a grey level of 255
    assert source.images.max() == 255 and source.images.min() == 0
    np.testing.assert_array_equal(source.labels, bunch.target)
    np.testing.assert_array_equal(source.images[..., 0], np.round(bunch.images * (255 / 16)))


def test_digits_without_the_file_come_from_sklearn(monkeypatch):
    known = sources.digits()
    monkeypatch.setattr(sources.importlib.util, 'find_spec', lambda name: None)
    other = sources.digits()
    np.testing.assert_array_equal(other.images, known.images)
    np.testing.assert_array_equal(other.labels, known.labels)


def test_digits_do_not_import_sklearn():
    """It would take a second of every start."""
    code = 'import sys; from cfg_jax.data import sources; sources.digits(); assert "sklearn" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tiny.ROOT)


# ---------------------------------------------------------------- the pipeline


def test_each_epoch_sees_everything_once_in_another_order():
    iterator = make(batch_size=12)  # does not divide the 50 images
    stream = labels_of(iterator, 25).reshape(6, 50)
    np.testing.assert_array_equal(np.sort(stream), np.tile(np.arange(50), (6, 1)))
    assert not np.array_equal(stream[0], stream[1])


def test_the_order_depends_on_the_seed_alone():
    np.testing.assert_array_equal(labels_of(make(), 7), labels_of(make(num_threads=4), 7))
    assert not np.array_equal(labels_of(make(), 5), labels_of(make(seed=1), 5))


@pytest.mark.parametrize('rows', [np.split(np.arange(12), 3), [np.arange(12)[::2], np.arange(12)[1::2]]])
def test_processes_share_each_batch(rows):
    """Their parts together are to the bit what one process reads: no overlap, nothing missed, in every epoch."""
    settings = {'batch_size': 12, 'flip': True, 'random_crop': True}
    alone = make(**settings)
    parts = [make(**settings, rows=ours) for ours in rows]
    for _ in range(13):
        together = [next(part) for part in parts]
        for key, expected in next(alone).items():
            for part, ours in zip(together, rows):
                np.testing.assert_array_equal(part[key], expected[ours])


@pytest.mark.parametrize('reading', [{}, {'num_threads': 2}, {'num_workers': 1}], ids=str)
def test_the_position_resumes_whatever_reads(reading):
    """Resume in the middle of an epoch, with random flips and crops; the first reader has no threads or workers."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(['pytest'])  # Grain's workers ask them
    iterator = make(flip=True, random_crop=True)
    labels_of(iterator, 3)
    assert iterator.position == 3
    expected = [next(iterator) for _ in range(4)]
    resumed = make(flip=True, random_crop=True, **reading)
    resumed.seek(3)
    for batch in expected:
        again = next(resumed)
        np.testing.assert_array_equal(again['image'], batch['image'])
        np.testing.assert_array_equal(again['label'], batch['label'])


STREAM = """
import hashlib, sys
from absl import flags
from cfg_jax.data import pipeline
from tests.numbered import Numbered

if __name__ == '__main__':
    workers, position = map(int, sys.argv[1:])
    flags.FLAGS(['stream'])
    batches = pipeline.train_batches(
        Numbered(), batch_size=12, seed=3, flip=True, random_crop=True, num_workers=workers
    )
    batches.seek(position)
    for batch in batches:
        digest = hashlib.sha256(batch['image'].tobytes() + batch['label'].tobytes()).hexdigest()
        print(batches.position, digest, flush=True)
"""


@pytest.mark.parametrize('workers', [0, 2])
def test_a_killed_stream_goes_on_to_the_bit(workers, tmp_path):
    """After SIGKILL in the middle of the third epoch, the stream continues as it would have."""
    script = tmp_path / 'stream.py'
    script.write_text(STREAM)
    environment = {**tiny.environment(), 'PYTHONPATH': str(tiny.ROOT)}

    def read(position, until):
        command = [sys.executable, script, str(workers), str(position)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        lines = [process.stdout.readline().split() for _ in range(position, until)]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {int(number): digest for number, digest in lines}

    iterator = make(batch_size=12, seed=3, flip=True, random_crop=True)
    expected = {}
    for batch in (next(iterator) for _ in range(15)):
        expected[iterator.position] = hashlib.sha256(batch['image'].tobytes() + batch['label'].tobytes()).hexdigest()
    before = read(0, 10)
    assert {**before, **read(max(before), 15)} == expected


def test_workers_end_with_their_parent(tmp_path):
    """They end even if SIGKILL hits the parent alone: an orphan would hold the job's output and memory for ever."""
    script = tmp_path / 'stream.py'
    script.write_text(STREAM)
    environment = {**tiny.environment(), 'PYTHONPATH': str(tiny.ROOT)}
    process = subprocess.Popen(
        [sys.executable, script, '2', '0'], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    process.stdout.readline()
    process.kill()
    process.stdout.read()  # ends when the last process that holds the pipe is gone
    process.wait()
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError('its workers are still there')


KEPT = """
import numpy as np
from absl import flags
from cfg_jax.data import pipeline, sources

if __name__ == '__main__':
    flags.FLAGS(['kept'])
    data = sources.ArraySource(np.zeros((40, 64, 64, 3), np.uint8), np.arange(40), map(str, range(40)))
    batches = pipeline.train_batches(data, batch_size=20, seed=0, num_workers=2)
    kept = [next(batches) for _ in range(3)]
    batches.close()
"""


def test_workers_leave_nothing_to_warn_of(tmp_path):
    """Batches that are still in use at the exit, as arrays on JAX's CPU devices are, hold no memory of the workers."""
    script = tmp_path / 'kept.py'
    script.write_text(KEPT)
    environment = {**tiny.environment(), 'PYTHONPATH': str(tiny.ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, '')


def test_random_crops_keep_the_size_and_most_of_the_image():
    settings = {'batch_size': 400, 'seed': 0}
    images = next(pipeline.train_batches(sources.digits(), **settings))['image']
    crops = next(pipeline.train_batches(sources.digits(), random_crop=True, **settings))['image']
    assert crops.shape == images.shape and crops.dtype == np.uint8
    # a side of 7 or of 8 pixels, one as likely as the other; a crop of all 8 is the image itself
    changed = (images != crops).any((1, 2, 3))
    assert abs(changed.mean() - 0.5) < 4 * 0.5 / np.sqrt(400)
    similar = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images[changed], crops[changed])]
    assert np.median(similar) > 0.5


def test_half_the_images_are_flipped():
    iterator = make(flip=True, batch_size=50)
    images = np.concatenate([next(iterator)['image'] for _ in range(20)])[..., 0]
    flipped = images[:, 0, -1] == 255
    np.testing.assert_array_equal(images[:, 0, 0] == 255, ~flipped)
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(1000)


# ---------------------------------------------------------------- TFDS's data sets


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
    """Small cifar10, imagenet_resized/64x64 and imagenet2012 as TFDS writes them."""
    data_dir = tmp_path_factory.mktemp('tensorflow_datasets')
    tfds_layout.write_cifar10(data_dir, 60)
    tfds_layout.write_imagenet_resized(data_dir, 70)
    tfds_layout.write_imagenet2012(data_dir, [(90, 120), (100, 80), (64, 64)])
    return data_dir


def open_tfds(data_dir, name, size, split='train', **options):
    return sources.TfdsSource(name, split, str(data_dir), (size, size, 3), **options)


@pytest.mark.parametrize(('name', 'size', 'count'), [('cifar10', 32, 60), ('imagenet_resized/64x64', 64, 70)])
def test_tfdss_own_data_sets_are_read_without_tensorflow(tfds_dir, name, size, count):
    """Images equal those of stock TFDS to the bit, and the pipeline shows each once an epoch."""
    source, stock = open_tfds(tfds_dir, name, size), tfds.builder(name, data_dir=tfds_dir).as_data_source('train')
    assert len(source) == len(stock) == count and source.class_names[:2] == tuple(
        stock.dataset_info.features['label'].names[:2]
    )
    for index in (0, 7, count - 1):
        np.testing.assert_array_equal(source[index]['image'], stock[index]['image'])
        assert source[index]['label'] == source.label(index) == stock[index]['label']
    batches = pipeline.train_batches(pickle.loads(pickle.dumps(source)), batch_size=10, seed=0, num_threads=2)
    epoch = [next(batches) for _ in range(count // 10)]
    numbers = [tfds_layout.number_of(image) for batch in epoch for image in batch['image']]
    assert sorted(numbers) == list(range(count))
    factor, classes = (1, 10) if name == 'cifar10' else (7, 1000)
    assert [label for batch in epoch for label in batch['label']] == [factor * n % classes for n in numbers]
    assert 'tensorflow' not in sys.modules


def test_the_folder_of_a_data_set_is_enough(tfds_dir):
    by_folder = open_tfds(tfds_dir / 'cifar10' / '3.0.2', '', 32)
    np.testing.assert_array_equal(by_folder[3]['image'], open_tfds(tfds_dir, 'cifar10', 32)[3]['image'])


def test_parts_of_a_split(tfds_dir):
    whole, part = open_tfds(tfds_dir, 'cifar10', 32), open_tfds(tfds_dir, 'cifar10', 32, 'train[50%:75%]')
    assert len(part) == 15
    np.testing.assert_array_equal(part[0]['image'], whole[30]['image'])


def test_tfrecord_is_read_without_tensorflow(tfds_dir, tmp_path):
    """The files are written by tensorboardX, whose framing and checksums are TensorFlow's."""
    for name, size in (('cifar10', 32), ('imagenet_resized/64x64', 64)):
        part = 'train[10%:90%]'
        expected = open_tfds(tfds_dir, name, size, part)
        (folder,) = (tfds_dir / name).glob('*.*.*')
        copy = tmp_path / folder.relative_to(tfds_dir)
        copy.mkdir(parents=True)
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        tfds_layout.as_tfrecord(copy)
        records = open_tfds(tmp_path, name, size, part)
        assert len(records) == len(expected)
        for index in (0, 20, len(expected) - 1):
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(records))[index]['image'], expected[index]['image'])
    assert 'tensorflow' not in sys.modules
    (shard,) = copy.glob('*.tfrecord-*')
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match=r'damaged: record 69 ends beyond the file.*config\.data\.data_dir'):
        open_tfds(tmp_path, name, size)
    shard.unlink()
    with pytest.raises(UserError, match=r'1 of the 1 files of imagenet_resized/64x64.* missing'):
        open_tfds(tmp_path, name, size)


def flipped(path, *places):
    """Change bytes of a file."""
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 255
    path.write_bytes(data)


def copy_of(tfds_dir, name, data_dir):
    (folder,) = (tfds_dir / name).glob('*.*.*')
    return Path(shutil.copytree(folder, data_dir / folder.relative_to(tfds_dir)))


def test_a_damaged_array_record_file_is_named(tfds_dir, tmp_path):
    (shard,) = copy_of(tfds_dir, 'cifar10', tmp_path).glob('*.array_record-*')
    whole = shard.read_bytes()
    for data in (b'', whole[: len(whole) // 2], whole[:-100], b'x' * len(whole)):
        shard.write_bytes(data)
        with pytest.raises(
            UserError, match=rf'^{shard} is damaged: .*copy or prepare it again \(config\.data\.data_dir'
        ):
            open_tfds(tmp_path, 'cifar10', 32)
    shard.write_bytes(whole)
    info = shard.parent / 'dataset_info.json'
    info.write_text(info.read_text().replace('"60"', '"61"'))
    with pytest.raises(UserError, match=rf'{shard} is damaged: it holds 60 records, but .* says 61'):
        open_tfds(tmp_path, 'cifar10', 32)


@pytest.mark.parametrize('reading', [{}, {'num_threads': 2}, {'num_workers': 1}], ids=str)
def test_damage_that_shows_in_reading_is_named_whatever_reads(tfds_dir, tmp_path, reading):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(['pytest'])  # Grain's workers ask them
    (shard,) = copy_of(tfds_dir, 'cifar10', tmp_path).glob('*.array_record-*')
    flipped(shard, *range(40_000, 90_000))
    batches = pipeline.train_batches(open_tfds(tmp_path, 'cifar10', 32), batch_size=60, seed=0, **reading)
    with pytest.raises(UserError, match=rf'{shard} is damaged: .*config\.data\.data_dir'):
        next(batches)


def test_a_damaged_tfrecord_file_is_named(tfds_dir, tmp_path):
    folder = copy_of(tfds_dir, 'cifar10', tmp_path)
    tfds_layout.as_tfrecord(folder)
    (shard,) = folder.glob('*.tfrecord-*')
    whole = shard.read_bytes()
    length = struct.unpack('<Q', whole[:8])[0]
    source = open_tfds(tmp_path, 'cifar10', 32)
    for place in (12, 12 + length // 2, 12 + length):  # the first record's data, and their checksum
        flipped(shard, place)
        with pytest.raises(UserError, match=rf'{shard} is damaged: checksum mismatch in the record at byte 12;.*dir'):
            source[0]
        source[1]
        shard.write_bytes(whole)
    for place in (0, 8):
        flipped(shard, place)
        with pytest.raises(UserError, match=rf'{shard} is damaged: checksum mismatch in the length of record 0'):
            open_tfds(tmp_path, 'cifar10', 32)
        shard.write_bytes(whole)
    os.truncate(shard, 100)
    with pytest.raises(UserError, match=rf'{shard} is damaged'):
        source[5]


def test_records_that_are_no_examples(tfds_dir, tmp_path):
    """Their checksums match: bytes that are not an Example, an Example without an image, and one without a label."""
    folder = copy_of(tfds_dir, 'cifar10', tmp_path)
    tfds_layout.as_tfrecord(folder)
    (shard,) = folder.glob('*.tfrecord-*')
    no_image, no_label = tf_example_generated_pb2.Example(), tf_example_generated_pb2.Example()
    no_image.features.feature['label'].int64_list.value.append(1)
    no_label.features.feature['image'].bytes_list.value.append(b'x')
    records = [b'\xff' * 30, b'', no_image.SerializeToString(), no_label.SerializeToString()]
    writer = RecordWriter(str(shard))
    for record in records * 15:
        writer.write(record)
    writer.close()
    source = open_tfds(tmp_path, 'cifar10', 32)
    for index in range(4):
        with pytest.raises(
            UserError, match=rf'{shard} is damaged: image {index} of cifar10/3\.0\.2, .* is not an example with'
        ):
            source[index]


@pytest.mark.parametrize('part', ['train[:0]', 'train[:0%]', 'train[5:5]'])
def test_parts_without_images(tfds_dir, part):
    with pytest.raises(UserError, match=rf'cifar10/3\.0\.2, split {re.escape(repr(part))} has no images .*data\.split'):
        open_tfds(tfds_dir, 'cifar10', 32, part)


def test_labels_that_are_none(tmp_path):
    """TFDS gives the label -1 in splits without labels."""
    features = {'image': tfds.features.Image(shape=(8, 8, 3)), 'label': tfds.features.ClassLabel(num_classes=2)}
    examples = [{'image': tfds_layout.picture(0, 8), 'label': -1}]
    tfds_layout.write(tmp_path, 'unlabelled', examples, version='1.0.0', features=features)
    source = open_tfds(tmp_path, 'unlabelled', 8)
    for read in (source.label, source.__getitem__):
        with pytest.raises(
            UserError, match=r'image 0 of unlabelled.* has label -1; allowed: 0 to 1\..*config\.data\.split'
        ):
            read(0)


IMPORTS = """
import pickle, sys, threading

def note(event, arguments):
    if event == 'import' and threading.current_thread() is not threading.main_thread():
        print(arguments[0], flush=True)

reads = pickle.load(sys.stdin.buffer)
sys.addaudithook(note)
for read in reads:
    threads = [threading.Thread(target=read.map, args=[[index]]) for index in range(len(read.source))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print('read', *(len(read.source) for read in reads))
"""


def test_reading_threads_import_nothing(tfds_dir, tmp_path):
    """First imports in several threads at once deadlock. A new worker unpickles what it reads, then starts threads."""
    cifar10 = open_tfds(tfds_dir, 'cifar10', 32, 'train[:8]')
    folder, pixels = tmp_path / 'a', Image.fromarray(tfds_layout.picture(7, 32))
    folder.mkdir()
    upright = Image.Exif()
    upright[images.ORIENTATION_TAG] = 3
    for suffix in ('png', 'jpg', 'gif', 'bmp', 'tif', 'webp', 'ppm'):
        pixels.save(folder / f'{suffix}.{suffix}', exif=upright)
    pixels.convert('RGBA').save(folder / 'rgba.png')
    read = [pipeline.ReadImages(source) for source in (cifar10, sources.FolderSource(str(tmp_path), (32, 32, 3)))]
    environment = {**tiny.environment(), 'PYTHONPATH': str(tiny.ROOT)}
    done = subprocess.run(
        [sys.executable, '-c', IMPORTS], input=pickle.dumps(read), capture_output=True, env=environment
    )
    assert done.stdout.decode().splitlines() == ['read 8 8'], done.stderr.decode()


# ---------------------------------------------------------------- few open files, and errors that are no damage


@pytest.fixture(scope='module')
def thirty_files(tmp_path_factory):
    """Data sets of 60 images in 30 files: {file format: data_dir}."""
    data_dirs = {}
    for file_format in ('array_record', 'tfrecord'):
        data_dir = tmp_path_factory.mktemp(file_format)
        raw = data_dir / 'raw'
        for number in range(60):
            write_pictures(raw, **{f'c{number % 3}__{number:02d}': images.encode_png(tfds_layout.picture(number, 8))})
        config = tiny.config(
            data__source='tfds', data__name='thirty', data__data_dir=str(data_dir), data__num_classes=3,
            data__image_channels=3, prepare__path=str(raw), prepare__num_shards=30, prepare__num_workers=1,
        )  # fmt: skip
        folder = prepare.run(config, None)
        if file_format == 'tfrecord':
            tfds_layout.as_tfrecord(folder)
        data_dirs[file_format] = data_dir
    return data_dirs


LIMITED = """
import pickle, resource, sys
source, soft, hard = pickle.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
numbers = sorted(int(source[i]['image'][0, 0, 0]) * 256 + int(source[i]['image'][0, 0, -1]) for i in range(60))
assert numbers == list(range(60)), numbers
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(source._records._open._kept))
"""


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_more_record_files_than_may_be_open(thirty_files, file_format):
    """The soft limit is raised to what the hard one allows, and files are closed where that is not enough."""
    source = open_tfds(thirty_files[file_format], 'thirty', 8)
    for limits, expected in [((24, 24), '24 6'), ((24, 200), '120 30')]:
        arguments = {'input': pickle.dumps((source, *limits)), 'capture_output': True, 'cwd': tiny.ROOT}
        done = subprocess.run([sys.executable, '-c', LIMITED], env=tiny.environment(), **arguments)
        assert done.stdout.decode().strip() == expected, done.stderr.decode()


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_only_damage_is_called_damage(thirty_files, file_format, tmp_path):
    """An error of the system says what it is: no advice to prepare whole data again."""
    data_dir = Path(shutil.copytree(thirty_files[file_format], tmp_path / 'copy'))
    source, (first, second, *_) = open_tfds(data_dir, 'thirty', 8), sorted(data_dir.rglob(f'*.{file_format}-*'))
    first.unlink()
    with pytest.raises(UserError) as caught:
        source[0]
    assert str(caught.value) == f'{first} cannot be read: No such file or directory (config.data.data_dir).'
    taken = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first.write_bytes(second.read_bytes())
    for read in (lambda: source[0], lambda: open_tfds(data_dir, 'thirty', 8)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            with pytest.raises(UserError, match=r'cannot be read: Too many open files \(config\.data\.'):
                read()
        finally:
            while taken:
                os.close(taken.pop())
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------- folders


def write_pictures(folder, **files):
    for name, data in files.items():
        path = folder / f'{name}.png'.replace('__', '/')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def png(channels=3):
    return images.encode_png(tfds_layout.picture(7, 8, channels))


def test_an_unusable_image_is_named_with_what_helps(tmp_path):
    """The error gives the whole path, and config fields only if their values are the cause."""
    write_pictures(tmp_path, a__1=b'', a__2=png(), a__3=png()[:40])
    for size, channels, index, reason, fields in [
        (8, 3, 0, 'empty file', ''),
        (8, 3, 2, 'truncated', ''),
        (16, 3, 1, 'smaller than 16x16: 8x8', ' (config.data.image_size, config.data.upsample)'),
        (8, 1, 1, 'has colour, but 1 channel is needed', ' (config.data.image_channels)'),
    ]:
        with pytest.raises(UserError) as caught:
            sources.FolderSource(str(tmp_path), (size, size, channels))[index]
        makes = '--mode=prepare makes a data set without such images'
        assert str(caught.value) == f'{tmp_path}/a/{index + 1}.png: {reason}; {makes}{fields}.'


def test_what_may_be_a_mistake_in_a_folder_is_said(tmp_path, capsys):
    write_pictures(tmp_path, a=png(), b=png())
    sources.FolderSource(str(tmp_path), (8, 8, 3))
    assert capsys.readouterr().out == ''
    (tmp_path / 'labels.json').write_text('{"a.png": 1, "b.png": 2}')
    (tmp_path / 'notes.txt').write_text('Mine.')
    assert sources.FolderSource(str(tmp_path), (8, 8, 3)).class_names == ('0', '1', '2')
    assert capsys.readouterr().out == (
        '1 of 3 classes have no images: 0\nignored 1 other entries, such as notes.txt: not an image by its name\n'
    )
    content = {'a.png': 'x', 'b.png': 'x', 'class_names': ['x', *'abcdef']}
    (tmp_path / 'labels.json').write_text(json.dumps(content))
    sources.FolderSource(str(tmp_path), (8, 8, 3))
    assert '6 of 7 classes have no images: a, b, c, d, e, ...\n' in capsys.readouterr().out


def test_checkpoints_keep_the_order_of_their_classes(tmp_path, monkeypatch):
    """A run from before classes were ordered by their numbers resumes, and its labels mean what they meant."""
    data, workdir = tmp_path / 'data', tmp_path / 'run'
    for number in range(12):
        for image in range(2):
            write_pictures(data, **{f'{number}__{image}': images.encode_png(tfds_layout.picture(number, 8))})
    changes = {'data__source': 'folder', 'data__data_dir': str(data), 'data__num_classes': 12}
    changes |= {'data__image_channels': 3, 'train__num_steps': 1, 'train__checkpoint_every': 1}
    with monkeypatch.context() as before:
        before.setattr(labels, 'natural', lambda name: name)
        train.run(tiny.config(**changes), workdir)
    old = tuple(sorted(map(str, range(12))))
    assert trained.saved_class_names(workdir) == old
    seen = []
    batches = pipeline.train_batches
    monkeypatch.setattr(pipeline, 'train_batches', lambda source, **how: seen.append(source) or batches(source, **how))
    train.run(tiny.config(**{**changes, 'train__num_steps': 2}), workdir)
    assert trained.saved_class_names(workdir) == old
    (source,) = seen
    for index in range(len(source)):
        batch = source[index]
        assert source.label(index) == batch['label'] == old.index(str(tfds_layout.number_of(batch['image'])))

    source = sources.FolderSource(str(data), (8, 8, 3))
    for names in (old[:-1], (*old, '12'), ('cat', *old[1:])):
        source.order_classes(names)
        assert source.class_names == tuple(map(str, range(12)))  # other classes: the order is its own
        assert all(source.label(index) == tfds_layout.number_of(source[index]['image']) for index in range(len(source)))


def test_an_image_that_cannot_be_read_now_is_no_reason_to_prepare_the_data(tmp_path, monkeypatch):
    write_pictures(tmp_path, a=png())
    source = sources.FolderSource(str(tmp_path), (8, 8, 3))

    def full(*_):
        raise OSError(errno.EMFILE, 'Too many open files')

    monkeypatch.setattr('builtins.open', full)
    with pytest.raises(UserError) as caught:
        source[0]
    monkeypatch.undo()
    assert str(caught.value) == f'{tmp_path}/a.png: unreadable: Too many open files (config.data.data_dir).'


def test_archives_are_no_folders(tmp_path):
    (tmp_path / 'train_data_batch_1.npz').write_bytes(b'')
    with pytest.raises(UserError, match=r'config\.data\.data_dir.*--mode=prepare --config\.prepare\.path='):
        sources.FolderSource(str(tmp_path), (8, 8, 3))


# ---------------------------------------------------------------- other sizes, and what is not there


def test_images_of_other_sizes_are_resampled_where_the_data_set_has_no_one_size(tfds_dir):
    source = open_tfds(tfds_dir, 'imagenet2012', 64)
    assert source.batch(np.arange(3))['image'].shape == (3, 64, 64, 3)
    with pytest.raises(UserError, match=r'imagenet2012.*smaller.*config\.data\.upsample'):
        open_tfds(tfds_dir, 'imagenet2012', 128)[0]
    assert open_tfds(tfds_dir, 'imagenet2012', 128, upsample=True)[0]['image'].shape == (128, 128, 3)
    with pytest.raises(UserError, match=r'images of cifar10.* are \(32, 32, 3\), not \(64, 64, 3\)'):
        open_tfds(tfds_dir, 'cifar10', 64)


def test_data_that_is_not_there(tfds_dir, tmp_path):
    with pytest.raises(UserError) as error:
        open_tfds(tmp_path, 'imagenet_resized/64x64', 64)
    for part in (
        "'imagenet_resized/64x64'",
        'config.data.data_dir',
        '--mode=prepare --config.prepare.path=',
        '_npz.zip',
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r'--mode=prepare'):
        open_tfds(tmp_path, 'my_own', 64)
    for name, archive in [
        ('fashion_mnist', '/usr/share/datasets/fashion-mnist'),
        ('kmnist_32', 'train-images-idx3-ubyte'),
        ('emnist_letters', r'emnist-\*-images-idx3-ubyte'),
        ('cifar100', 'a folder or zip of images'),
    ]:
        with pytest.raises(UserError, match=f'where PATH is .*{archive}'):
            open_tfds(tmp_path, name, 28)
    with pytest.raises(UserError, match=r"no split 'eval'; allowed: 'train'.*config\.data\.split"):
        open_tfds(tfds_dir, 'cifar10', 32, 'eval')
    with pytest.raises(UserError, match=r'config\.data\.name'):
        sources.TfdsSource('', 'train', None, (8, 8, 3))


def test_a_data_set_without_labels(tmp_path):
    features = {'image': tfds.features.Image(shape=(8, 8, 3)), 'caption': tfds.features.Text()}
    examples = [{'image': tfds_layout.picture(0, 8), 'caption': 'waves'}]
    tfds_layout.write(tmp_path, 'captions', examples, version='1.0.0', features=features)
    with pytest.raises(UserError, match=r"needed are 'image', and 'label'"):
        open_tfds(tmp_path, 'captions', 8)


@pytest.mark.slow
def test_the_imagenet64_config_trains_on_tfdss_data(tfds_dir, tmp_path):
    """The network is shrunk, the data unchanged; class names pass into the checkpoint and out of it again."""
    small = {
        'data.data_dir': tfds_dir,
        'model.channels': 8,
        'model.channel_mult': (1, 1, 1),
        'model.num_blocks': 1,
        'model.dtype': 'float32',
        'model.attention_resolutions': (),
        'model.head_channels': 8,
        'model.num_groups': 4,
        'train.batch_size': 4,
        'train.num_steps': 2,
        'train.log_every': 1,
        'train.grid_every': 0,
        'sample.num_steps': 1,
        'sample.num_images': 2,
        'sample.batch_size': 2,
    }
    flags = [f'--config.{key}={value}' for key, value in small.items()]
    command = [f'--config={tiny.ROOT}/configs/imagenet64.py', f'--workdir={tmp_path}', *flags]
    trained = tiny.main(*command)
    assert trained.returncode == 0, trained.stderr
    assert '70 images' in trained.stdout and 'step 2/2' in trained.stdout
    sampled = tiny.main(*command, '--mode=sample', '--config.sample.labels=n02119789,n02100735')
    assert sampled.returncode == 0, sampled.stderr
    (samples,) = tmp_path.glob('sample_*.npz')
    assert np.load(samples)['arr_1'].tolist() == [0, 1] and np.load(samples)['arr_0'].shape == (2, 64, 64, 3)


def test_indices_are_spread_evenly():
    assert spread(10, 100).tolist() == list(range(10))
    assert spread(1000, 3).tolist() == [0, 500, 999]
