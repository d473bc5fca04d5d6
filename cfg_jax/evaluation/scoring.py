"""From images to a row of numbers: the judge and the reference that a config names, and every metric of one set."""

import contextlib
import dataclasses
import hashlib
import importlib
from pathlib import Path

import numpy as np

from cfg_jax import build, metrics
from cfg_jax.data.sources import spread
from cfg_jax.errors import UserError
from cfg_jax.evaluation import references
from cfg_jax.evaluation.judges import Outputs
from cfg_jax.progress import Progress

_CHUNK = 512  # images that a judge is given at once
_MANIFOLD = 10_000  # real images of precision and recall


def open_judge(config, data):
    """The `judges.Judge` that config.eval.judge names. data: a source of real images."""
    module = importlib.import_module(f'cfg_jax.evaluation.judges.{config.eval.judge}')
    settings = {'weights': config.eval.inception_weights, 'num_steps': config.eval.judge_steps}
    return module.open_judge(data, config.data.num_classes, **settings)


def judged(judge, parts, total, name):
    """The `Outputs` of an iterator over arrays of images, `total` in all, with a progress line every ten seconds."""
    progress, collected, done = Progress(total), [], 0
    for images in parts:
        for start in range(0, len(images), _CHUNK):
            collected.append(judge.apply(images[start : start + _CHUNK]))
            done += len(collected[-1].features)
            progress.show(done, f'{name}  judged')
    return Outputs(*(None if part[0] is None else np.concatenate(part) for part in zip(*collected)))


# ---------------------------------------------------------------- the reference


def reference(config, judge, data, folder):
    """The `references.Reference` of config.eval.reference, or of the data set's own images, kept in `folder`.

    Raises UserError where the file is another judge's or of images of another size.
    """
    if config.eval.reference:
        return _from_file(config, judge)
    count, k = min(config.eval.reference_images or len(data), len(data)), config.eval.nearest_k
    if count <= k:
        fields = 'config.eval.reference_images, config.eval.nearest_k'
        raise UserError(f'{count} real images have not {k} neighbours each ({fields}).')
    chosen, splits = spread(len(data), count), num_splits(config, count)

    def parts():
        return (data.batch(chosen[start : start + _CHUNK])['image'] for start in range(0, count, _CHUNK))

    # kept under the images themselves: a path or a name may come to hold others
    digest = hashlib.sha256(f'{judge.identity} {splits} {data.image_shape}'.encode())
    progress = Progress(count)
    for number, images in enumerate(parts(), 1):
        digest.update(images)
        progress.show(min(number * _CHUNK, count), 'data  read')
    path = Path(folder) / f'{judge.name}_{digest.hexdigest()[:12]}.npz'
    if path.exists():
        with contextlib.suppress(UserError):  # damaged: computed anew
            return references.load(path)
    computed = _of_outputs(judged(judge, parts(), count, 'data'), judge, splits)
    references.save(path, computed)
    return computed


def _of_outputs(outputs, judge, splits):
    spatial = (None, None) if outputs.spatial is None else metrics.feature_statistics(outputs.spatial)
    count = len(outputs.features)
    return references.Reference(
        *metrics.feature_statistics(outputs.features),
        *spatial,
        num_images=count,
        features=outputs.features[spread(count, _MANIFOLD)],
        inception_score=metrics.inception_score(outputs.logits, num_splits=splits),
        judge=judge.identity,
    )


def _from_file(config, judge):
    path, field = config.eval.reference, '(config.eval.reference)'
    found = references.load(path)
    if found.judge not in (None, judge.identity):
        raise UserError(f'{path} is of the judge {found.judge}, not {judge.identity} {field}.')
    shape = build.image_shape(config)
    width = judge.apply(np.zeros((1, *shape), np.uint8)).features.shape[1]
    if len(found.mean) != width:
        raise UserError(f'{path} is of {len(found.mean)} features and the judge {judge.name!r} has {width} {field}.')
    if found.images is not None:
        if found.images.shape[1:] != shape:
            raise UserError(f'{path} holds images of {found.images.shape[1:]}, not {shape} {field}.')
        if found.features is None:
            images = found.images[:_MANIFOLD]
            features = judged(judge, [images], len(images), 'reference').features
            found = dataclasses.replace(found, features=features)
    return found


# ---------------------------------------------------------------- the row


def measure(config, judge, outputs, labels, real):
    """Every metric of one set as {column: value}, less what cannot be had (no labels, no reference of that kind).

    outputs: the judge's of the set. labels: int [N] or None. real: the `Reference`.
    """
    features, logits, spatial = outputs
    splits, k = num_splits(config, len(logits)), config.eval.nearest_k
    row = {
        'fid': metrics.gaussian_distance(*metrics.feature_statistics(features), real.mean, real.covariance),
        'fid_error': metrics.frechet_distance_error(features, real.mean, real.covariance),
        'inception_score': metrics.inception_score(logits, num_splits=splits)[0],
        'inception_score_error': metrics.inception_score_error(logits, num_splits=splits),
    }
    with contextlib.suppress(ValueError):  # too few samples for a line
        line = metrics.extrapolated_frechet_distance(features, real.mean, real.covariance)
        row['fid_infinity'] = line.value
    if spatial is not None and real.spatial_mean is not None:
        statistics = metrics.feature_statistics(spatial)
        row['sfid'] = metrics.gaussian_distance(*statistics, real.spatial_mean, real.spatial_covariance)
    if real.features is not None:
        for name, inside in zip(('precision', 'recall'), metrics.manifold_members(features, real.features, k=k)):
            row[name], row[f'{name}_error'] = float(inside.mean()), float(inside.std() / np.sqrt(len(inside)))
        if min(len(features), len(real.features)) >= _MANIFOLD:  # the papers' subsets of 1,000, their deviation
            distance, row['kernel_distance_error'] = metrics.kernel_distance_subsets(features, real.features)
        else:
            distance = metrics.kernel_distance(features, real.features)
        row['kernel_distance'] = distance
    if labels is not None:
        row['spread'] = metrics.within_class_spread(features, labels)
        if judge.classes_are_labels:
            row['accuracy'] = metrics.class_accuracy(logits, labels)
    return row


def num_splits(config, count):
    """Of so many images for the Inception score: as many as there are config.eval.split_images in them, or one."""
    return max(round(count / config.eval.split_images), 1)


def accuracy_by_class(logits, labels, num_classes):
    """[num_classes]: the accuracy of each class's images; NaN where it has none."""
    groups = (labels == label for label in range(num_classes))
    return [metrics.class_accuracy(logits[group], labels[group]) if group.any() else np.nan for group in groups]


def check_enough(config, num_samples, real):
    """Raises UserError where FID of so few samples means little, or neighbours are wanting, before any is drawn."""
    k = config.eval.nearest_k
    if num_samples <= k:
        raise UserError(f'{num_samples} samples have not {k} neighbours each (config.eval.nearest_k).')
    if real.features is not None and len(real.features) <= k:
        few = len(real.features)
        raise UserError(
            f'the reference has {few} features, which have not {k} neighbours each (config.eval.nearest_k).'
        )
    try:
        metrics.check_enough(num_samples, len(real.mean))
    except ValueError as error:
        if not config.eval.allow_few_samples:
            raise UserError(f'{error}; config.eval.allow_few_samples=True goes on (config.eval.num_samples).') from None
