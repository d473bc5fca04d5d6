"""From a trained model to images: what training's grids, the sampling job and the evaluation job share."""

import math
from functools import partial
from pathlib import Path

import jax
import numpy as np

from cfg_jax import build, sharding
from cfg_jax.checkpoints import Checkpoints
from cfg_jax.config import default
from cfg_jax.errors import UserError
from cfg_jax.writers import Progress


def load(config, workdir, mesh):
    """The newest checkpoint's EMA parameters on every device, as `checkpoints.Restored`; UserError if there is none."""
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    whole = sharding.replicated(mesh)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes)
    checkpoints = open_checkpoints(workdir, build.model_identity(config))
    restored = checkpoints.restore_ema(abstract)
    checkpoints.close()
    print(f'sampling from {checkpoints.path(restored.step)}', flush=True)
    return restored


def open_checkpoints(workdir, identity):
    """The checkpoints of a trained workdir, to read; UserError if it has none."""
    directory = Path(workdir) / 'checkpoints'
    if directory.is_dir():
        checkpoints = Checkpoints(directory, identity, defaults=default().to_dict(), read_only=True)
        if checkpoints.latest_step() is not None:
            return checkpoints
    raise UserError(f'no checkpoint in {directory}; train first (--mode=train) or point --workdir at a trained one.')


def load_classifier(config, mesh):
    """(config, parameters on every device) of the classifier in config.guidance.classifier_workdir, or (None, None).

    Its own checkpoint tells what it is. Raises UserError where it cannot guide this config's model.
    """
    workdir = config.guidance.classifier_workdir
    if not workdir:
        return None, None
    theirs = default()
    theirs.update(open_checkpoints(workdir, {}).saved_config())
    field = '(config.guidance.classifier_workdir)'
    if theirs.model.kind != 'classifier':
        raise UserError(f'{workdir} holds a {theirs.model.kind}, not a classifier {field}.')
    for key in ('image_size', 'image_channels', 'num_classes'):
        if theirs.data[key] != config.data[key]:
            raise UserError(
                f'the classifier of {workdir} has config.data.{key} {theirs.data[key]}, the model {config.data[key]} '
                f'{field}.'
            )
    return theirs, load(theirs, workdir, mesh).tree


def collect(batches, total, name):
    """All images of an iterator over batches, uint8 [N, H, W, C], with a progress line every ten seconds or so."""
    progress, images, done = Progress(total), [], 0
    for batch in batches:
        images.append(batch)
        done += len(batch)
        if done == total or progress.seconds() > 10:
            rate, left = progress.rate(done)
            print(f'{name}  {done}/{total} images  {rate:.1f} images/s  {left} left', flush=True)
    return np.concatenate(images)


def image_batches(config, mesh):
    """The jitted sampler over any number of images, (params, labels, weight, seed[, classifier_weight]) -> batches.

    labels: int [N] on the host, checked here; image i's noise depends on seed and i alone. The last batch is filled up
    and cut, so that there is one compilation whatever N is. It yields numpy arrays uint8 [<= B, H, W, C].
    classifier_weight: of the classifier that config.guidance names, if it names one; the config's unless given.
    """
    per_device = math.ceil(config.sample.batch_size / mesh.size)
    size = per_device * mesh.size
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    classifier_config, classifier_params = load_classifier(config, mesh)
    sample = build.sampler(config, classifier_config)

    @partial(jax.jit, in_shardings=(whole, whole, split, split, whole, whole, whole), out_shardings=split)
    def jitted(*arguments):
        return build.to_uint8(sample(*arguments))

    def batches(params, labels, weight, seed, classifier_weight=config.guidance.classifier_weight):
        check_labels(labels, config.data.num_classes)
        guiding = np.float32(weight), classifier_params, np.float32(classifier_weight)
        computing = None  # each batch is fetched after the next one has been dispatched
        for start in range(0, len(labels), size):
            indices = np.arange(start, start + size, dtype=np.uint32)
            filled = np.resize(labels[start : start + size], size).astype(np.int32)
            indices, filled = (sharding.whole_to_devices(values, mesh) for values in (indices, filled))
            dispatched = jitted(params, np.uint32(seed), indices, filled, *guiding)
            if computing is not None:
                yield sharding.to_host(computing)
            computing = dispatched
        yield sharding.to_host(computing)[: len(labels) - start]

    return batches


def spread_classes(num_classes, count):
    """All label ids, or `count` of them evenly spread where there are more."""
    return np.linspace(0, num_classes - 1, min(num_classes, count)).round().astype(np.int32)


def check_labels(labels, num_classes):
    """Raises UserError for a label outside [0, num_classes): under jit it would clamp or become NaN in silence."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f'label {label} is not a class; allowed: 0 to {num_classes - 1} (config.sample.labels).')


def parse_labels(text, class_names):
    """'0,1,2' or 'cat,dog' -> a list of label ids; '' -> all of them."""
    if not text.strip():
        return list(range(len(class_names)))
    ids = []
    for item in (item.strip() for item in text.split(',')):
        if item in class_names:
            ids.append(class_names.index(item))
            continue
        try:
            ids.append(int(item))
        except ValueError:
            names = ', '.join(map(repr, class_names[:10])) + (', ...' if len(class_names) > 10 else '')
            raise UserError(
                f'label {item!r} is not a class; allowed: 0 to {len(class_names) - 1} or a name of {names} '
                '(config.sample.labels).'
            ) from None
    check_labels(ids, len(class_names))
    return ids
