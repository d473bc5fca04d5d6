"""Read and write references, the statistics that generated images are measured against; read anyone's samples.

A reference is an npz file, written here or by ADM. Both kinds hold `mu` [D] and `sigma` [D, D] of a judge's features,
and perhaps `mu_s`, `sigma_s` of its spatial features. ADM's may also hold uint8 images, `arr_0`; a file written here
holds the other fields of `Reference`, and a hash of all of them.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import zipfile
import zlib

import numpy as np

from cfg_jax import files
from cfg_jax.data import images
from cfg_jax.data.preparing import archives
from cfg_jax.errors import UserError, first_line, system_error, unusable

REFERENCE_FIELD, SAMPLES_FIELD = 'config.eval.reference', 'config.eval.samples'
_STATISTICS = (('mu', 'sigma'), ('mu_s', 'sigma_s'))
_PIECE = 1 << 24  # bytes that are read at once
# what zipfile and NumPy raise for a damaged file, or one that the system does not let us read
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError)


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images in a judge's eyes. Fields that the file lacks are None.

    mean, covariance: float64 [D], [D, D] of the judge's features; spatial_*: [S], [S, S]. num_images: the number of
    images they were computed from; features: [M, D] of up to 10,000 of these images, for precision and recall;
    inception_score: (mean, deviation) of their logits; floor: (mean, deviation) of FID between random halves of them,
    each with the same share of every class;
    judge: its `identity`. images: uint8 [M, H, W, C] from ADM's
    file, memory-mapped if they are not compressed.
    """

    mean: np.ndarray
    covariance: np.ndarray
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None
    num_images: int | None = None
    features: np.ndarray | None = None
    inception_score: tuple | None = None
    judge: str | None = None
    images: np.ndarray | None = None
    floor: tuple | None = None

    @functools.cached_property
    def hash(self):
        """The sha256 of all fields, in hexadecimal; the same however they are stored."""
        digest = hashlib.sha256()
        for name, array in sorted(_as_arrays(self).items()):
            little = np.ascontiguousarray(array, array.dtype.newbyteorder('<'))
            digest.update(f'{name} {little.dtype.str} {little.shape}\n'.encode())
            digest.update(little.reshape(-1).view(np.uint8))
        return digest.hexdigest()


def _as_arrays(reference):
    """Return {name in a file: array} of the fields that are not None."""
    facts = {key: getattr(reference, key) for key in ('num_images', 'inception_score', 'judge')}
    if reference.floor is not None:  # older files do not have it, and keep their hash
        facts['floor'] = reference.floor
    gaussians = (reference.mean, reference.covariance), (reference.spatial_mean, reference.spatial_covariance)
    arrays = {'features': reference.features, 'arr_0': reference.images}
    for names, gaussian in zip(_STATISTICS, gaussians):
        arrays |= {name: None if each is None else np.asarray(each, np.float64) for name, each in zip(names, gaussian)}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if any(fact is not None for fact in facts.values()):
        text = json.dumps(facts, sort_keys=True, default=lambda number: number.item())  # NumPy's numbers
        arrays['facts'] = np.frombuffer(text.encode(), np.uint8)
    return arrays


def save(path, reference):
    """Write the reference, whole or not at all."""
    file = io.BytesIO()
    np.savez(file, **_as_arrays(reference), sha256=np.frombuffer(reference.hash.encode(), np.uint8))
    files.write(path, file.getbuffer())


def save_arrays(path, arrays):
    """Write arrays by name as an npz file, whole or not at all, without a copy of them in memory."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with files.whole(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **arrays)


def load_arrays(path, names, *, field):
    """Return these arrays of an npz file; raises UserError if it is damaged, lacks one or has other than floats."""
    with _open(path, field) as npz:
        absent = [name for name in names if name not in npz.names]
        if absent:
            raise npz.unusable(f'has no {" and no ".join(absent)}; it has {npz.listing}')
        arrays = [npz.read(name) for name in names]
        if not all(map(_is_finite, arrays)):
            raise npz.unusable('has values that are not finite floats')
        return arrays


def load(path, *, field=REFERENCE_FIELD):
    """Return the `Reference` in a file that `save` or ADM wrote. Raises UserError, which names config field `field`."""
    with _open(path, field) as npz:
        absent = [name for name in _STATISTICS[0] if name not in npz.names]
        if absent:
            raise npz.unusable(
                f'has no {" and no ".join(absent)}: a reference has mu and sigma, this file has {npz.listing}'
            )
        (mean, covariance), (spatial_mean, spatial_covariance) = (_statistics(npz, *names) for names in _STATISTICS)
        features = npz.read('features') if 'features' in npz.names else None
        if features is not None and (features.ndim != 2 or features.shape[1] != len(mean) or not _is_finite(features)):
            raise npz.unusable(
                f'has features {features.dtype} {features.shape}; needed are finite floats [M, {len(mean)}]'
            )
        reference = Reference(
            mean,
            covariance,
            spatial_mean,
            spatial_covariance,
            features=features,
            images=_images(npz) if 'arr_0' in npz.names else None,
            **_facts(npz),
        )
        if 'sha256' in npz.names and npz.read('sha256').tobytes() != reference.hash.encode():
            raise npz.unusable('is damaged: checksum mismatch')
        return reference


def _facts(npz):
    """Return the fields of a `Reference` that are not arrays, as far as the file has them."""
    if 'facts' not in npz.names:
        return {}
    try:
        facts = json.loads(npz.read('facts').tobytes())
        pairs = {'inception_score': facts['inception_score'], 'floor': facts.get('floor')}
        pairs = {key: None if pair is None else tuple(pair) for key, pair in pairs.items()}
        return {'num_images': facts['num_images'], 'judge': facts['judge'], **pairs}
    except (ValueError, KeyError, TypeError) as error:
        raise npz.unusable(f'is damaged: facts: {first_line(error)}') from error


def _is_finite(array):
    """Return True for finite floats."""
    return array.dtype.kind == 'f' and bool(np.isfinite(array).all())


def _statistics(npz, mean_name, covariance_name):
    """Return (mean, covariance) in float64, or (None, None)."""
    present = [name for name in (mean_name, covariance_name) if name in npz.names]
    if not present:
        return None, None
    if len(present) == 1:
        raise npz.unusable(f'has {present[0]} but not both of {mean_name} and {covariance_name}')
    mean, covariance = npz.read(mean_name), npz.read(covariance_name)
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean),) * 2:
        raise npz.unusable(
            f'has {mean_name} {mean.shape} and {covariance_name} {covariance.shape}; needed are [D] and [D, D]'
        )
    for name, array in ((mean_name, mean), (covariance_name, covariance)):
        if not _is_finite(array):
            raise npz.unusable(f'has {name} of {array.dtype} with values that are not finite floats')
    covariance = covariance.astype(np.float64)
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-6 * scale:
        raise npz.unusable(f'has a {covariance_name} that is not symmetric, as a covariance must be')
    if covariance.diagonal().min() < -1e-6 * scale:
        raise npz.unusable(f'has a {covariance_name} with a negative variance')
    return mean.astype(np.float64), covariance


# ---------------------------------------------------------------- samples


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Images to be judged, uint8 [N, H, W, C]; their labels, int32 [N], and class names, if they have any."""

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple | None = None


def load_samples(path, *, channels=3, num_classes=None, field=SAMPLES_FIELD):
    """Return the `Samples` in an npz (`arr_0` uint8 NHWC; perhaps labels `arr_1`), or in a folder or archive of images.

    arr_1: a label id or a class name for each image. channels: of the images in files. Their labels are those of
    `data.preparing`, with class names. num_classes: label ids in an npz must be below it. Raises UserError, which names
    the config field `field`.
    """
    if os.path.splitext(path)[1].lower() == '.npz':
        with _open(path, field) as npz:
            if 'arr_0' not in npz.names:
                raise npz.unusable(f'has no arr_0: samples are uint8 NHWC in arr_0, this file has {npz.listing}')
            pixels = _images(npz)
            samples = Samples(pixels, *(_labels(npz, len(pixels)) if 'arr_1' in npz.names else ()))
    else:
        samples = _from_files(archives.open_images(path, field=field), path, channels, field)
    labelled = samples.labels is not None and samples.class_names is None
    if labelled and num_classes is not None and samples.labels.max() >= num_classes:
        raise unusable(
            path,
            f'has label {samples.labels.max()}; config.data.num_classes allows 0 to {num_classes - 1}',
            field,
        )
    return samples


def _images(npz):
    """Return arr_0, uint8 [N, H, W, C]."""
    needed = 'needed is uint8 [N, H, W, 1 or 3]'
    dtype, shape = npz.header('arr_0')
    what = f'has arr_0 {dtype} [{", ".join(map(str, shape))}]'
    if dtype != np.uint8:
        raise npz.unusable(f'{what}; {needed}: round and convert its pixels')
    if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
        raise npz.unusable(f'{what}, which is NCHW; {needed}: transpose it by (0, 2, 3, 1)')
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise npz.unusable(f'{what}; {needed}')
    return npz.read('arr_0', mapped=True)


def _labels(npz, number):
    """Return arr_1 as (labels int32 [number], class names or None)."""
    dtype, shape = npz.header('arr_1')
    if dtype.kind not in 'iuUS' or shape != (number,):
        raise npz.unusable(
            f'has arr_1 {dtype} [{", ".join(map(str, shape))}]; needed are whole numbers or class names [{number}]'
        )
    labels = npz.read('arr_1')
    if dtype.kind in 'US':
        try:
            names = list(map(os.fsdecode, labels.tolist()))
        except (ValueError, SystemError) as error:  # code points beyond Unicode's
            raise npz.unusable(f'is damaged: arr_1: {first_line(error)}') from error
        ids = {name: label for label, name in enumerate(dict.fromkeys(names))}
        return np.array([ids[name] for name in names], np.int32), tuple(ids)
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        label = labels.min() if labels.min() < 0 else labels.max()
        raise npz.unusable(f'has label {label} in arr_1; allowed: 0 to {np.iinfo(np.int32).max}')
    return labels.astype(np.int32), None


def _from_files(raw, path, channels, field):
    """Return the `Samples` of `RawImages`, which must all have one size."""
    pixels = None
    for index, name in enumerate(raw.names):
        try:
            image = raw.read(index)
            image = images.decode(image, channels) if isinstance(image, bytes) else image
        except images.ImageError as error:
            raise unusable(path, f'has an unusable image: {name}: {error}', field) from error
        if pixels is None:
            pixels = np.empty((len(raw), *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            first, this = (f'{shape[0]}x{shape[1]}' for shape in (pixels.shape[1:], image.shape))
            raise unusable(path, f'has images of different sizes: {raw.names[0]} {first}, {name} {this}', field)
        pixels[index] = image
    names = raw.class_names
    if len(names) == 1:  # a folder without classes, whatever its name
        return Samples(pixels)
    return Samples(pixels, raw.labels, names)


# ---------------------------------------------------------------- npz files


def _open(path, field):
    """Open an npz file as `_Npz`; raises UserError."""
    where = os.path.expanduser(path)
    if not os.path.isfile(where):
        raise UserError(f'no such file: {path!r} ({field}).')
    try:
        return _Npz(where, field)
    except zipfile.BadZipFile as error:
        raise unusable(where, 'is not an npz file, or is truncated', field) from error
    except _UNREADABLE as error:
        raise _unreadable(where, error, field) from error


def _unreadable(path, error, field, what=''):
    """Return the UserError for an exception in reading `what` of the file: the system's reason, or else damage."""
    if code := system_error(error):
        return unusable(path, f'cannot be read: {os.strerror(code)}', field)
    return unusable(path, f'is damaged: {what}{first_line(error)}', field)


class _Npz:
    """A reader of the arrays of an npz file: without pickles, header by header, and with no array twice in memory."""

    def __init__(self, path, field):
        self._path, self._field, self._archive = path, field, zipfile.ZipFile(path)
        members = self._archive.infolist()
        self.names = {info.filename.removesuffix('.npy'): info for info in members if info.filename.endswith('.npy')}
        self.listing = ', '.join(sorted(self.names)[:10]) or 'no arrays'

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._archive.close()

    def unusable(self, what):
        """Return the UserError that says what is wrong with the file."""
        return unusable(self._path, what, self._field)

    def header(self, name):
        """Return (dtype, shape) of an array without reading its values."""
        with self._stream(name) as stream:
            return self._read_header(stream, name)[:2]

    def _stream(self, name):
        try:
            return self._archive.open(self.names[name])
        except _UNREADABLE as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name, error):
        return _unreadable(self._path, error, self._field, f'{name}: ')

    def _read_header(self, stream, name):
        """Return (dtype, shape, True if in Fortran order, bytes of the header); refuses objects and wrong sizes."""
        try:
            dtype, shape, fortran = files.read_npy_header(stream)
            start = stream.tell()
        except NotImplementedError as error:
            raise self.unusable(f'has {name} in {error}') from None
        except _UNREADABLE as error:
            raise self._unreadable(name, error) from error
        if dtype.hasobject:
            raise self.unusable(f'has {name} as Python objects, which are never unpickled; save plain arrays')
        size = dtype.itemsize * int(np.prod(shape, dtype=object))
        if start + size != self.names[name].file_size:
            raise self.unusable(f'is damaged: {name} has {self.names[name].file_size - start} bytes instead of {size}')
        return dtype, shape, fortran, start

    def read(self, name, *, mapped=False):
        """Return an array; with `mapped`, memory-mapped if it is not compressed in the file."""
        info = self.names[name]
        with self._stream(name) as stream:
            dtype, shape, fortran, start = self._read_header(stream, name)
            order = 'F' if fortran else 'C'
            if mapped and info.compress_type == zipfile.ZIP_STORED:
                try:
                    with open(self._path, 'rb') as file:
                        file.seek(info.header_offset)
                        header = file.read(files.ZIP_HEADER_BYTES)
                    offset = info.header_offset + files.zip_header_size(header) + start
                    return np.memmap(self._path, dtype, 'r', offset, shape, order)
                except (ValueError, OSError) as error:  # ValueError: longer than the file
                    raise self._unreadable(name, error) from error
            array = np.empty(shape, dtype, order)
            rest = memoryview(array.reshape(-1, order=order).view(np.uint8))
            try:
                while rest:
                    rest = rest[stream.readinto(rest[:_PIECE]) or self._too_short(name) :]
                stream.read(1)  # zipfile compares the checksum at the end
            except _UNREADABLE as error:
                raise self._unreadable(name, error) from error
            return array

    def _too_short(self, name):
        raise self.unusable(f'is damaged: {name} is truncated')
