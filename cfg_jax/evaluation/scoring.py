"""Scoring images: a judge looks at them, and every metric compares them with the reference, giving a row of numbers."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import math
from pathlib import Path

import numpy as np

from cfg_jax import metrics
from cfg_jax.data import spread
from cfg_jax.errors import UserError
from cfg_jax.evaluation import memorisation, references
from cfg_jax.evaluation.columns import column
from cfg_jax.evaluation.judges import Judge, Outputs
from cfg_jax.progress import Progress, shown

_CHUNK = 512  # images that are read at once
_MANIFOLD = 10_000  # real images of precision and recall


def open_judge(name, data, num_classes, **settings):
    """Return the `Judge` that the file `name` of evaluation/judges/ opens; see that package."""
    module = importlib.import_module(f'cfg_jax.evaluation.judges.{name}')
    return module.open_judge(data, num_classes, **settings)


def judged(judges, parts, total, name):
    """Return the `Outputs` of each judge for arrays of images, `total` images in all, which are read once.

    Shows progress under `name`.
    """
    progress, collected, done = Progress(total, compiles=True), [[] for _ in judges], 0
    size = min(judge.chunk for judge in judges)
    chunks = (part[start : start + size] for part in parts for start in range(0, len(part), size))
    with progress.watched(f'{name}  judged'):
        for images in chunks:
            for judge, outputs in zip(judges, collected):
                outputs.append(_applied(judge, images, name))
            done += len(images)
            progress.show(done, f'{name}  judged')
    return [
        Outputs(*(None if part[0] is None else np.concatenate(part) for part in zip(*outputs))) for outputs in collected
    ]


def _applied(judge, images, name):
    """Return the judge's `Outputs`, all of them finite."""
    outputs = judge.apply(images)
    if not all(np.isfinite(part).all() for part in outputs if part is not None):
        raise UserError(
            f'the judge {judge.name!r} gives NaN or infinity for images of {name}: check its weights ({judge.field}).'
        )
    return outputs


# ---------------------------------------------------------------- the reference


class RealImages:
    """`num_images` (0: all) images of a source, evenly spread, and what a judge makes of them.

    indices: their places in the source. labels: int [N], once they are read. name: of progress lines.
    """

    def __init__(self, judge, data, num_images, name='data'):
        self.judge, self.name, self.labels, self._data, self._sha256 = judge, name, None, data, None
        self.indices = spread(len(data), min(num_images or len(data), len(data)))

    def __len__(self):
        return len(self.indices)

    def _parts(self):
        for start in range(0, len(self), _CHUNK):
            yield self._data.batch(self.indices[start : start + _CHUNK])

    def digest(self, settings=''):
        """Return the sha256, in hexadecimal, of the judge, these settings and the images."""
        # of the images themselves: a path or a data set's name may later hold other images
        digest = hashlib.sha256(f'{self.judge.identity} {settings}{self._data.image_shape}'.encode())
        plain, progress, labels = hashlib.sha256(self.judge.identity.encode()), Progress(len(self)), []
        for number, part in enumerate(self._parts(), 1):
            digest.update(part['image'])
            plain.update(part['image'])
            labels.append(part['label'])
            progress.show(min(number * _CHUNK, len(self)), f'{self.name}  read')
        self._sha256, self.labels = plain.hexdigest(), np.concatenate(labels)
        return digest.hexdigest()

    @property
    def sha256(self):
        """The sha256 of the judge and the images, in hexadecimal, from the last time that they were read."""
        if self._sha256 is None:
            self.digest()
        return self._sha256

    @functools.cached_property
    def outputs(self):
        """The judge's `Outputs`, computed once."""
        return judged([self.judge], (part['image'] for part in self._parts()), len(self), self.name)[0]


def reference_of_data(images, folder, *, nearest_k, split_images, coverage_k=5):
    """Return the `references.Reference` of `RealImages`.

    It is kept in `folder` under a hash of the images, and read from there the next time.
    """
    count = len(images)
    for k, field in ((nearest_k, 'config.eval.nearest_k'), (coverage_k, 'config.eval.coverage_k')):
        if count <= k:
            raise UserError(
                f'{k} nearest neighbours need more than {k} real images, and there are {count} '
                f'(config.eval.reference_images, {field}).'
            )
    splits = num_splits(count, split_images)
    path = Path(folder) / f'{images.judge.name}_{images.digest(f"{splits} ")[:12]}.npz'
    if path.exists():
        with contextlib.suppress(UserError):  # a damaged one is computed again
            return references.load(path)
    computed = _reference_of_outputs(images.outputs, images.labels, images.judge, splits)
    references.save(path, computed)
    return computed


def training_of_data(images, held_out, folder, *, name):
    """Return the `memorisation.Training` of two `RealImages`: of training, and held out from it.

    It is kept in `folder` under a hash of both, and read from there the next time. name: of the held-out images, for
    the UserError if training has seen them.
    """
    digest = hashlib.sha256(f'{images.sha256} {held_out.sha256}'.encode()).hexdigest()
    path = Path(folder) / f'{images.judge.name}_{digest[:12]}_training.npz'
    if path.exists():
        with contextlib.suppress(UserError):  # a damaged one is computed again
            return memorisation.load(path, images.indices)
    features = images.outputs.features
    near = memorisation.near(held_out.outputs.features, features)
    memorisation.check(near, name)
    computed = memorisation.Training(features, near, images.indices)
    memorisation.save(path, computed)
    return computed


def _reference_of_outputs(outputs, labels, judge, splits):
    spatial = (None, None) if outputs.spatial is None else metrics.feature_statistics(outputs.spatial)
    count, logits = len(outputs.features), outputs.logits
    try:
        with shown('FID of two halves of the data is computed'):
            floor = metrics.frechet_distance_of_halves(outputs.features, labels)
    except ValueError:  # too few images
        floor = None
    return references.Reference(
        *metrics.feature_statistics(outputs.features),
        *spatial,
        num_images=count,
        features=outputs.features[spread(count, _MANIFOLD)],
        inception_score=None if logits is None else metrics.inception_score(logits, num_splits=splits),
        judge=judge.identity,
        floor=floor,
    )


def reference_of_file(judge, path, image_shape):
    """Return the `references.Reference` in a file. UserError if it is for another judge or other sizes of images."""
    field = '(config.eval.reference)'
    found = references.load(path)
    if found.judge not in (None, judge.identity):
        raise UserError(f'{path} was made with the judge {found.judge}, not with {judge.identity} {field}.')
    width = judge.apply(np.zeros((1, *image_shape), np.uint8)).features.shape[1]
    if len(found.mean) != width:
        raise UserError(f'{path} has {len(found.mean)} features, but the judge {judge.name!r} has {width} {field}.')
    if found.images is not None:
        if found.images.shape[1:] != image_shape:
            raise UserError(f'{path} holds images of {found.images.shape[1:]}, not {image_shape} {field}.')
        if found.features is None:
            images = found.images[:_MANIFOLD]
            (outputs,) = judged([judge], [images], len(images), 'reference')
            found = dataclasses.replace(found, features=outputs.features)
    return found


# ---------------------------------------------------------------- the row


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Everything that images are measured with.

    nearest_k: neighbours that set the radius in precision and recall. split_images: images in each part that the
    Inception score is the mean over. coverage_k: neighbours that set the radius in density and coverage.
    training: what memorisation is measured against, or None.
    """

    judge: Judge
    real: references.Reference
    nearest_k: int
    split_images: int
    coverage_k: int = 5
    training: memorisation.Training | None = None

    def near(self, features):
        """Return the `memorisation.Near` of features [N, D]; None if memorisation is not measured."""
        return self.training and self.training.near(features)

    def measure(self, outputs, labels, influences=None, near=None):
        """Return every metric of one set as {column: value}; metrics that need something absent are left out.

        Raises UserError if one of them is not finite.

        outputs: the judge's, of N images. labels: int [N] or None. influences: those of `fid_influences`, if known.
        near: that of `near`, if known.
        """
        features, logits, spatial = outputs
        real, splits = self.real, num_splits(len(features), self.split_images)
        row = self.measure_fid(features, influences)
        if logits is not None:
            row['inception_score'] = metrics.inception_score(logits, num_splits=splits)[0]
            row['inception_score_error'] = metrics.inception_score_error(logits, num_splits=splits)
        with contextlib.suppress(ValueError), shown('FID of more images is extrapolated'):  # ValueError: too few
            line = metrics.extrapolated_frechet_distance(features, real.mean, real.covariance)
            row['fid_infinity'] = line.value
        if spatial is not None and real.spatial_mean is not None:
            statistics = metrics.feature_statistics(spatial)
            row['sfid'] = metrics.gaussian_distance(*statistics, real.spatial_mean, real.spatial_covariance)
        if real.features is not None:
            with shown('precision, recall, density and coverage are computed'):
                row |= _against_features(features, real.features, self.nearest_k, self.coverage_k)
        with shown('the Vendi score is computed'):
            row['vendi'], row['vendi_error'] = metrics.vendi_score(features)
        if self.training:
            row |= self.training.measure(near or self.near(features))
        if labels is not None:
            row['spread'] = metrics.within_class_spread(features, labels)
            if self.judge.classes_are_labels:
                row['accuracy'] = metrics.class_accuracy(logits, labels)
        _check_finite(row, len(features))
        return row

    def fid_influences(self, features):
        """Return what each image changes FID by, times N: [N]."""
        with shown("FID's error is computed"):
            return metrics.frechet_distance_influences(features, self.real.mean, self.real.covariance)

    def measure_fid(self, features, influences=None):
        """Return FID alone of features [N, D], with its error. Raises UserError if one of them is not finite."""
        influences = self.fid_influences(features) if influences is None else influences
        row = {
            'fid': metrics.gaussian_distance(
                *metrics.feature_statistics(features), self.real.mean, self.real.covariance
            ),
            'fid_error': metrics.standard_error(influences),
        }
        _check_finite(row, len(features))
        return row

    def check_enough(self, num_samples, *, allow_few):
        """Raise UserError, before any image is drawn, if so few samples cannot be measured.

        allow_few: accept FID of fewer samples than features, which means little.
        """
        neighbours = ((self.nearest_k, '(config.eval.nearest_k)'), (self.coverage_k, '(config.eval.coverage_k)'))
        k, field = neighbours[0]  # density and coverage need no neighbours of samples
        if num_samples <= k:
            raise UserError(f'{k} nearest neighbours need more than {k} samples, and there are {num_samples} {field}.')
        count = math.inf if self.real.features is None else len(self.real.features)
        for k, field in neighbours:
            if count <= k:
                raise UserError(
                    f'{k} nearest neighbours need more than {k} images, and the reference has features of {count} '
                    f'{field}.'
                )
        try:
            metrics.check_enough(num_samples, len(self.real.mean))
        except ValueError as error:
            if not allow_few:
                raise UserError(
                    f'{error}; draw more (config.eval.num_samples) or accept it (config.eval.allow_few_samples=True).'
                ) from None


def _check_finite(row, num_samples):
    """Raise UserError unless all metrics are finite numbers."""
    for name, value in row.items():
        if not np.isfinite(value):
            raise UserError(
                f'{column(name).label} of these {num_samples:,} samples is {value}, not a finite number: look at the '
                'samples, or judge them with another judge (config.eval.judge).'
            )


def _against_features(features, real, k, coverage_k):
    """Return the metrics that compare features with features: those of neighbourhoods, and the kernel distance."""
    row, found = {}, metrics.neighbourhoods(features, real, k=k, coverage_k=coverage_k)
    for name, inside in (('precision', found.precise), ('recall', found.recalled)):
        row[name], row[f'{name}_error'] = float(inside.mean()), float(inside.std() / np.sqrt(len(inside)))
    row['density'], row['coverage'] = float(found.balls.mean() / coverage_k), float((found.members > 0).mean())
    row['density_error'], row['coverage_error'] = metrics.density_coverage_errors(found, k=coverage_k)
    if min(len(features), len(real)) >= _MANIFOLD:  # the papers' subsets of 1,000, and their deviation
        row['kernel_distance'], row['kernel_distance_error'] = metrics.kernel_distance_subsets(features, real)
    else:
        row['kernel_distance'] = metrics.kernel_distance(features, real)
    return row


def num_splits(count, split_images):
    """Return the number of parts of `split_images` images in `count`, at least one."""
    return max(round(count / split_images), 1)


def accuracy_by_class(confusion):
    """Return the accuracy of each class's images, [K], of a `metrics.confusion_matrix`; NaN for one without images."""
    counts = confusion.sum(axis=1)
    return np.divide(np.diag(confusion), counts, out=np.full(len(counts), np.nan), where=counts > 0).tolist()
