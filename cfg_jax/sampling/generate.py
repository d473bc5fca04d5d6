"""From a trained model to images: what training's grids, the sampling job and the evaluation job share."""

import math
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec

from cfg_jax import build
from cfg_jax.config import default
from cfg_jax.errors import UserError
from cfg_jax.training import sharding
from cfg_jax.training.checkpoints import Checkpoints


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


def image_batches(config, *, batch_size=None, classifier=None):
    """The jitted sampler of any number of images: (params, labels, weight, seed[, classifier_weight]) -> units.

    A unit is `batch_size` consecutive images (config.sample.batch_size unless given), which one device of this process
    draws at once. Its program is the same on any number of devices and processes, so image i is the same to the bit
    wherever and with whichever other units it is drawn. params: on every device. labels: int [N] on the host, checked
    here. classifier_weight: of the classifier that config.guidance names, if it names one (`classifier`: as
    `load_classifier` gives it, loaded unless given); the config's unless given. units: the numbers of those wanted, all
    unless given. Yields numpy arrays uint8 [B, H, W, C], one a unit in their order; that of the last of N images is
    shorter. There is one compilation, whatever N is.
    """
    size, mesh = batch_size or config.sample.batch_size, sharding.local_mesh()
    classifier_config, classifier_params = classifier or load_classifier(config, sharding.make_mesh())
    classifier_params = sharding.to_local(classifier_params, mesh)
    sample = build.sampler(config, classifier_config)
    whole, split = PartitionSpec(), sharding.batch_sharding(mesh).spec
    specs = {'in_specs': (whole, whole, split, split, whole, whole, whole), 'out_specs': split}

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, check_vma=False, **specs)
    def drawn(*arguments):
        return build.to_uint8(sample(*arguments))

    def batches(params, labels, weight, seed, classifier_weight=None, *, units=None):
        check_labels(labels, config.data.num_classes)
        if classifier_weight is None:
            classifier_weight = config.guidance.classifier_weight
        params = sharding.to_local(params, mesh)
        guiding = np.float32(weight), classifier_params, np.float32(classifier_weight)
        units = range(math.ceil(len(labels) / size)) if units is None else units

        def fetched(units, images):
            images = np.asarray(images)
            for place, unit in enumerate(units):
                yield images[place * size :][: min(size, len(labels) - unit * size)]

        computing = None  # each batch is fetched after the next one has been dispatched
        for start in range(0, len(units), mesh.size):
            ours = units[start : start + mesh.size]
            indices = np.add.outer(np.resize(ours, mesh.size) * size, np.arange(size)).ravel()
            filled = labels[np.minimum(indices, len(labels) - 1)]
            on_devices = jax.device_put(
                (indices.astype(np.uint32), filled.astype(np.int32)), sharding.batch_sharding(mesh)
            )
            dispatched = ours, drawn(params, np.uint32(seed), *on_devices, *guiding)
            if computing is not None:
                yield from fetched(*computing)
            computing = dispatched
        if computing is not None:
            yield from fetched(*computing)

    return batches


def check_labels(labels, num_classes):
    """Raises UserError for a label outside [0, num_classes): under jit it would clamp or become NaN in silence."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f'label {label} is not a class; allowed: 0 to {num_classes - 1} (config.sample.labels).')


def parse_labels(text, class_names):
    """'0,1,2' or 'cat,dog' -> a list of label ids; '' -> all of them. A number is an id, not a class's name."""
    if not text.strip():
        return list(range(len(class_names)))
    ids = []
    for item in (item.strip() for item in text.split(',')):
        if re.fullmatch('[+-]?[0-9]+', item):
            ids.append(int(item))
        elif item in class_names:
            ids.append(class_names.index(item))
        else:
            names = ', '.join(map(repr, class_names[:10])) + (', ...' if len(class_names) > 10 else '')
            raise UserError(
                f'label {item!r} is not a class; allowed: 0 to {len(class_names) - 1} or a name of {names} '
                '(config.sample.labels).'
            )
    check_labels(ids, len(class_names))
    return ids
