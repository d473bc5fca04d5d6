"""From a trained model to images: what training's grids, the sampling job and the evaluation job share."""

import math
from functools import partial
from pathlib import Path

import jax
import numpy as np

from cfg_jax import build, sharding
from cfg_jax.checkpoints import Checkpoints
from cfg_jax.errors import UserError
from cfg_jax.writers import Progress


def load(config, workdir, mesh):
    """The newest checkpoint's EMA parameters on every device, as `checkpoints.Restored`; UserError if there is none."""
    directory = Path(workdir) / 'checkpoints'
    if not directory.is_dir():
        raise UserError(
            f'no checkpoint in {directory}; train first (--mode=train) or point --workdir at a trained one.'
        )
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    whole = sharding.replicated(mesh)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes)
    checkpoints = Checkpoints(directory, build.model_identity(config), read_only=True)
    restored = checkpoints.restore_ema(abstract)
    checkpoints.close()
    if restored is None:
        raise UserError(
            f'no checkpoint in {directory}; train first (--mode=train) or point --workdir at a trained one.'
        )
    print(f'sampling from {checkpoints.path(restored.step)}', flush=True)
    return restored


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
    """The jitted sampler over any number of images: a function (params, labels, weight, seed) -> batches of uint8.

    labels: int [N] on the host, checked here; image i's noise depends on seed and i alone. The last batch is filled up
    and cut, so that there is one compilation whatever N is. It yields numpy arrays [<= B, H, W, C].
    """
    per_device = math.ceil(config.sample.batch_size / mesh.size)
    size = per_device * mesh.size
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    sample = build.sampler(config)

    @partial(jax.jit, in_shardings=(whole, whole, split, split, whole), out_shardings=split)
    def jitted(params, seed, indices, labels, weight):
        return build.to_uint8(sample(params, seed, indices, labels, weight))

    def batches(params, labels, weight, seed):
        check_labels(labels, config.data.num_classes)
        computing = None  # each batch is fetched after the next one has been dispatched
        for start in range(0, len(labels), size):
            indices = np.arange(start, start + size, dtype=np.uint32)
            filled = np.resize(labels[start : start + size], size).astype(np.int32)
            dispatched = jitted(params, np.uint32(seed), indices, filled, np.float32(weight))
            if computing is not None:
                yield np.asarray(computing)
            computing = dispatched
        yield np.asarray(computing)[: len(labels) - start]

    return batches


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
        elif item.lstrip('+-').isdigit():
            ids.append(int(item))
        else:
            names = ', '.join(map(repr, class_names[:10])) + (', ...' if len(class_names) > 10 else '')
            raise UserError(
                f'label {item!r} is not a class; allowed: 0 to {len(class_names) - 1} or a name of {names} '
                '(config.sample.labels).'
            )
    check_labels(ids, len(class_names))
    return ids
