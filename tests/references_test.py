import dataclasses
import errno
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from cfg_jax import metrics
from cfg_jax.errors import UserError
from cfg_jax.evaluation import references
from tests.tiny import ROOT

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((50, 6)).astype(np.float32)
MEAN, COVARIANCE = metrics.feature_statistics(FEATURES)
SPATIAL = metrics.feature_statistics(RNG.standard_normal((50, 4)))
IMAGES = RNG.integers(0, 256, (12, 8, 8, 3), np.uint8)
ADM = {'mu': MEAN, 'sigma': COVARIANCE, 'mu_s': SPATIAL[0], 'sigma_s': SPATIAL[1], 'arr_0': IMAGES}


def full():
    return references.Reference(
        MEAN,
        COVARIANCE,
        *SPATIAL,
        num_images=np.int64(50),
        features=FEATURES,
        inception_score=(np.float64(3.5), 0.25),
        judge='digits 0123é',
        floor=(np.float64(0.25), 0.5),
    )


def test_a_reference_comes_back(tmp_path):
    path = tmp_path / 'new' / 'reference.npz'
    written = full()
    references.save(path, written)
    loaded = references.load(str(path))
    for field in dataclasses.fields(loaded):
        there, back = (getattr(reference, field.name) for reference in (written, loaded))
        if isinstance(there, np.ndarray):
            np.testing.assert_array_equal(back, there)
        else:
            assert back == there, field.name
    assert loaded.hash == written.hash
    assert loaded.num_images == 50 and isinstance(loaded.num_images, int) and loaded.features.dtype == np.float32
    assert [file.name for file in path.parent.iterdir()] == ['reference.npz']


def test_what_a_file_does_not_tell_is_none(tmp_path):
    references.save(tmp_path / 'a.npz', references.Reference(MEAN.astype(np.float32), COVARIANCE.astype(np.float32)))
    loaded = references.load(str(tmp_path / 'a.npz'))
    others = {field.name for field in dataclasses.fields(loaded)} - {'mean', 'covariance'}
    assert {getattr(loaded, name) for name in others} == {None}
    assert loaded.covariance.dtype == np.float64


@pytest.mark.parametrize(
    'change',
    [
        {'mean': MEAN + 1e-9},
        {'covariance': COVARIANCE * (1 + 1e-9)},
        {'spatial_mean': SPATIAL[0] + 1},
        {'features': FEATURES[:40]},
        {'num_images': 51},
        {'judge': 'trained'},
        {'inception_score': None},
        {'floor': None},
        {'floor': (0.25, 0.25)},
        {'images': IMAGES},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_hash_is_of_everything(change):
    assert dataclasses.replace(full(), **change).hash != full().hash


def test_files_from_before_the_floor_are_read(tmp_path):
    """They have its hash, which the rows of former evaluations have too."""
    facts = '{"inception_score": [3.5, 0.25], "judge": "digits 0123\\u00e9", "num_images": 50}'
    former = dataclasses.replace(full(), floor=None)
    references.save(tmp_path / 'former.npz', former)
    with np.load(tmp_path / 'former.npz') as arrays:
        assert arrays['facts'].tobytes().decode() == facts
    loaded = references.load(str(tmp_path / 'former.npz'))
    assert loaded.floor is None and loaded.hash == former.hash and loaded.inception_score == (3.5, 0.25)


def test_adms_reference(tmp_path):
    np.savez(tmp_path / 'plain.npz', **ADM)
    np.savez_compressed(tmp_path / 'compressed.npz', **ADM)
    np.savez(tmp_path / 'statistics.npz', mu=MEAN, sigma=COVARIANCE)
    plain, compressed = (references.load(str(tmp_path / f'{name}.npz')) for name in ('plain', 'compressed'))
    for loaded in (plain, compressed):
        np.testing.assert_array_equal(loaded.mean, MEAN)
        np.testing.assert_array_equal(loaded.spatial_covariance, SPATIAL[1])
        np.testing.assert_array_equal(loaded.images, IMAGES)
    assert isinstance(plain.images, np.memmap) and plain.hash == compressed.hash
    # the distance of the features to their own statistics, from the file
    distance = metrics.gaussian_distance(*metrics.feature_statistics(FEATURES), plain.mean, plain.covariance)
    assert distance == pytest.approx(0, abs=1e-9)
    only = references.load(str(tmp_path / 'statistics.npz'))
    assert only.spatial_mean is None and only.images is None and only.hash != plain.hash


def skewed():
    covariance = COVARIANCE.copy()
    covariance[0, 1] += 0.1
    return covariance


class Evil:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


BAD = {
    'no mu': ({'sigma': COVARIANCE}, 'has no mu: a reference has mu and sigma, this file has sigma'),
    'nothing': ({'x': MEAN}, 'has no mu and no sigma'),
    'shapes': (ADM | {'sigma': COVARIANCE[:5, :5]}, r'has mu (6,) and sigma (5, 5); needed are [D] and [D, D]'),
    'two axes': (ADM | {'mu': MEAN[None]}, r'has mu (1, 6)'),
    'not symmetric': (ADM | {'sigma': skewed()}, 'sigma that is not symmetric'),
    'negative': (ADM | {'sigma_s': -SPATIAL[1]}, 'sigma_s with a negative variance'),
    'not finite': (ADM | {'mu_s': SPATIAL[0] * np.nan}, 'mu_s of float64 with values that are not finite'),
    'whole numbers': (ADM | {'mu': np.zeros(6, int)}, 'mu of int64 with values that are not finite floats'),
    'half': ({'mu': MEAN, 'sigma': COVARIANCE, 'mu_s': MEAN}, 'has mu_s but not both of mu_s and sigma_s'),
    'features': (ADM | {'features': FEATURES[:, :5]}, 'has features float32 (50, 5); needed are finite floats [M, 6]'),
    'float images': (ADM | {'arr_0': IMAGES / 255}, 'has arr_0 float64'),
    'facts': (ADM | {'facts': np.frombuffer(b'{}', np.uint8)}, "facts: 'inception_score'"),
    'other hash': (ADM | {'sha256': np.zeros(64, np.uint8)}, 'is damaged: checksum mismatch'),
}


def refuses(path, expected, load=references.load, field='config.eval.reference'):
    with pytest.raises(UserError) as raised:
        load(str(path))
    text = str(raised.value)
    assert expected in text and text.endswith(f'({field}).') and '\n' not in text, text


@pytest.mark.parametrize('name', BAD)
def test_bad_references(name, tmp_path):
    arrays, expected = BAD[name]
    np.savez(tmp_path / 'bad.npz', **arrays)
    refuses(tmp_path / 'bad.npz', expected)


def test_files_that_are_no_references(tmp_path):
    refuses(tmp_path / 'absent.npz', 'no such file')
    refuses(tmp_path, 'no such file')
    np.save(tmp_path / 'a.npy', MEAN)
    refuses(tmp_path / 'a.npy', 'is not an npz file, or is truncated')
    (tmp_path / 'empty.npz').touch()
    refuses(tmp_path / 'empty.npz', 'is not an npz file, or is truncated')


def test_pickles_are_not_read(tmp_path):
    path, touched = tmp_path / 'evil.npz', tmp_path / 'touched'
    np.savez(path, mu=np.array([Evil(touched)], object), sigma=COVARIANCE)
    refuses(path, 'has mu as Python objects, which are never unpickled')
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('mu.npy', pickle.dumps(Evil(touched)))
        archive.writestr('sigma.npy', b'')
    refuses(path, 'is damaged: mu: ')
    assert not touched.exists()


def damaged(path):
    """Rewrite the file with one byte changed, and yield the position, for many positions."""
    whole = path.read_bytes()
    for position in range(0, len(whole), 13):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :])
        yield position


def loaded_or_refused(path):
    try:
        return references.load(str(path)), None
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize(
    'function', ['zipfile.ZipFile', 'zipfile.ZipFile.open', 'numpy.memmap', 'zipfile.ZipExtFile.readinto']
)
def test_an_error_of_the_system_is_no_damage(tmp_path, monkeypatch, function):
    """In opening the file, one of its arrays, the images in it, or on the way through them."""
    (np.savez_compressed if 'readinto' in function else np.savez)(tmp_path / 'stale.npz', arr_0=IMAGES)

    def stale(*_, **__):
        raise OSError(errno.ESTALE, 'Stale file handle')

    monkeypatch.setattr(function, stale)
    for load in (references.load, references.load_samples):
        if load is references.load_samples or function == 'zipfile.ZipFile':
            with pytest.raises(UserError, match=r'stale\.npz cannot be read: Stale file handle \(config\.eval\.'):
                load(str(tmp_path / 'stale.npz'))


def test_damaged_files_of_ours(tmp_path):
    """A file cut anywhere is refused; with any byte changed it is refused in one line, or reads as before."""
    path = tmp_path / 'reference.npz'
    references.save(path, dataclasses.replace(full(), images=IMAGES))
    expected, whole, refusals = references.load(str(path)).hash, path.read_bytes(), []
    for _ in damaged(path):
        loaded, refusal = loaded_or_refused(path)
        refusals.append(refusal)
        assert refusal or loaded.hash == expected
        assert '\n' not in (refusal or '')
    assert sum(map(bool, refusals)) > 0.8 * len(refusals)
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        refuses(path, 'is not an npz file, or is truncated')


@pytest.mark.parametrize('saver', [np.savez, np.savez_compressed])
def test_damaged_files_of_adm(saver, tmp_path):
    """They have checksums but no hash: statistics read as before, or the file is refused."""
    path, refusals = tmp_path / 'reference.npz', []
    saver(path, **ADM)
    for _ in damaged(path):
        loaded, refusal = loaded_or_refused(path)
        refusals.append(refusal)
        same = loaded and np.array_equal(loaded.mean, MEAN) and np.array_equal(loaded.covariance, COVARIANCE)
        assert refusal or same
        assert '\n' not in (refusal or '')
    assert any(refusals)


# ---------------------------------------------------------------- samples


def refuses_samples(path, expected, **options):
    refuses(path, expected, lambda path: references.load_samples(path, **options), 'config.eval.samples')


@pytest.mark.parametrize('saver', [np.savez, np.savez_compressed])
def test_samples_of_an_npz(saver, tmp_path):
    labels = np.arange(12) % 5
    saver(tmp_path / 'samples.npz', IMAGES, labels)
    samples = references.load_samples(str(tmp_path / 'samples.npz'), num_classes=5)
    np.testing.assert_array_equal(samples.images, IMAGES)
    np.testing.assert_array_equal(samples.labels, labels)
    assert samples.labels.dtype == np.int32 and samples.class_names is None
    assert isinstance(samples.images, np.memmap) == (saver is np.savez)
    refuses_samples(tmp_path / 'samples.npz', 'has label 4; config.data.num_classes allows 0 to 3', num_classes=4)
    saver(tmp_path / 'samples.npz', np.asfortranarray(IMAGES[..., :1]))
    samples = references.load_samples(str(tmp_path / 'samples.npz'))
    np.testing.assert_array_equal(samples.images, IMAGES[..., :1])
    assert samples.labels is None


@pytest.mark.parametrize('text', [str, str.encode])
def test_labels_of_an_npz_may_be_class_names(text, tmp_path):
    """Which are text, or bytes as some programs save them; a number above the data set's may be a name."""
    names = ['dog', 'café', '1000'] * 4
    np.savez(tmp_path / 'samples.npz', IMAGES, np.array(list(map(text, names))))
    samples = references.load_samples(str(tmp_path / 'samples.npz'), num_classes=3)
    assert samples.labels.dtype == np.int32 and [samples.class_names[label] for label in samples.labels] == names
    assert sorted(samples.class_names) == ['1000', 'café', 'dog']


BAD_SAMPLES = {
    'floats': ({'arr_0': IMAGES / np.float32(255)}, 'has arr_0 float32 [12, 8, 8, 3]; needed is uint8 [N, H, W, 1 or'),
    'nchw': ({'arr_0': IMAGES.transpose(0, 3, 1, 2)}, 'uint8 [12, 3, 8, 8], which is NCHW; needed is uint8'),
    'no channels': ({'arr_0': IMAGES[..., 0]}, 'has arr_0 uint8 [12, 8, 8]; needed is'),
    'alpha': ({'arr_0': np.zeros((2, 8, 8, 4), np.uint8)}, 'has arr_0 uint8 [2, 8, 8, 4]; needed is'),
    'none': ({'arr_0': IMAGES[:0]}, 'has arr_0 uint8 [0, 8, 8, 3]; needed is'),
    'names': ({'samples': IMAGES}, 'has no arr_0: samples are uint8 NHWC in arr_0, this file has samples'),
    'float labels': ({'arr_0': IMAGES, 'arr_1': np.zeros(12)}, 'has arr_1 float64 [12]; needed are whole numbers or'),
    'few labels': ({'arr_0': IMAGES, 'arr_1': np.arange(11)}, 'has arr_1 int64 [11]; needed are whole numbers or'),
    'negative': ({'arr_0': IMAGES, 'arr_1': np.arange(12) - 1}, 'has label -1 in arr_1'),
    'objects': ({'arr_0': IMAGES, 'arr_1': np.array(['cat'] * 12, object)}, 'has arr_1 as Python objects, which'),
    'no text': ({'arr_0': IMAGES, 'arr_1': np.full(12, 0x110000).view('<U2')}, 'is damaged: arr_1: '),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD_SAMPLES)
def test_bad_samples(name, tmp_path):
    arrays, expected = BAD_SAMPLES[name]
    np.savez(tmp_path / 'bad.npz', **arrays)
    refuses_samples(tmp_path / 'bad.npz', expected)


def write_images(folder, names, images=IMAGES):
    for name, image in zip(names, images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / name)


def test_samples_of_a_folder(tmp_path):
    write_images(tmp_path / 'loose', [f'{number:03}.png' for number in range(12)])
    samples = references.load_samples(str(tmp_path / 'loose'))
    np.testing.assert_array_equal(samples.images, IMAGES)
    assert samples.labels is None
    # numbers are names like any others: by name, ten stands before two
    write_images(tmp_path / 'numbers', [f'{number}/x.png' for number in range(12)])
    samples = references.load_samples(str(tmp_path / 'numbers'), num_classes=12)
    for image, label in zip(samples.images, samples.labels):
        np.testing.assert_array_equal(image, IMAGES[int(samples.class_names[label])])
    write_images(tmp_path / 'words', ['dog/x.png', 'cat/x.png', 'dog/y.png'])
    samples = references.load_samples(str(tmp_path / 'words'))
    assert samples.class_names == ('cat', 'dog') and samples.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(samples.images, IMAGES[[1, 0, 2]])
    write_images(tmp_path / 'gray', ['0.png'], IMAGES[..., :1])
    samples = references.load_samples(str(tmp_path / 'gray'), channels=1)
    np.testing.assert_array_equal(samples.images, IMAGES[:1, ..., :1])


def test_bad_folders(tmp_path):
    refuses_samples(tmp_path / 'absent', 'no such file or folder')
    (tmp_path / 'empty').mkdir()
    refuses_samples(tmp_path / 'empty', 'holds no images')
    write_images(tmp_path / 'sizes', ['0.png', '1.png'])
    Image.fromarray(np.zeros((16, 8, 3), np.uint8)).save(tmp_path / 'sizes' / '2.png')
    refuses_samples(tmp_path / 'sizes', 'has images of different sizes: 0.png 8x8, 2.png 16x8')
    (tmp_path / 'sizes' / '1.png').write_bytes(b'not an image')
    refuses_samples(tmp_path / 'sizes', 'has an unusable image: 1.png: not an image')


def test_samples_are_in_memory_once_at_most(tmp_path):
    """Of 100 MB, a compressed file takes about that much memory, a plain one only the parts that are used."""
    images = np.zeros((33_000, 32, 32, 3), np.uint8)
    np.savez(tmp_path / 'plain.npz', images)
    np.savez_compressed(tmp_path / 'compressed.npz', images)
    code = (
        'import sys\nfrom cfg_jax.evaluation import references\n'
        'peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024\n'
        'for path in sys.argv[1:]:\n'
        '    before = peak()\n    samples = references.load_samples(path)\n    samples.images[-1].max()\n'
        '    print(peak() - before)'
    )
    command = [sys.executable, '-c', code, *(str(tmp_path / f'{name}.npz') for name in ('plain', 'compressed'))]
    plain, compressed = map(int, subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout.split())
    assert plain < 0.1 * images.nbytes and 0.5 * images.nbytes < compressed < 1.5 * images.nbytes
