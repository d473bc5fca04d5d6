"""A trained model: read from its checkpoints, its drawing function, and the sets of images drawn with it."""

import contextlib
import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from cfg_jax import build, diffusion, guidance, samplers, schedules
from cfg_jax.config import default
from cfg_jax.data import spread
from cfg_jax.errors import UserError
from cfg_jax.files import composed
from cfg_jax.models import blocks, classifier, unet
from cfg_jax.sampling import generate
from cfg_jax.sampling.labels import make_labels, parse_labels
from cfg_jax.sampling.sample_sets import SampleSet, params_digest
from cfg_jax.torch_files import not_finite
from cfg_jax.training import sharding
from cfg_jax.training.checkpoints import Checkpoints, check_folder


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained network and all that is needed to draw with it.

    config: that of the run. params: the EMA parameters, whole on every device. step: training steps done.
    class_names: by label id. digest: text that is the same for the same parameters. classifier: the trained noisy
    classifier of config.guidance.classifier_workdir, or None. workdir: the folder that the checkpoint was read from.
    """

    config: ConfigDict
    params: Any
    step: int
    class_names: tuple[str, ...]
    digest: str
    classifier: 'Trained | None' = None
    workdir: Path | None = None


# ---------------------------------------------------------------- reading


def load(config, workdir, mesh=None, *, step=None, ema=True):
    """Return a checkpoint of `workdir` as `Trained`, with the classifier that the config names.

    mesh: where the parameters are put; all devices by default. step: the checkpoint's; the newest by default. ema: take
    the average of the parameters, not the parameters themselves. Raises UserError if there is no checkpoint, or if it
    does not belong to the config.
    """
    mesh = mesh or sharding.make_mesh()
    model = _load(config, workdir, mesh, load_classifier(config, mesh), step=step, ema=ema)
    if model.classifier:
        check_same_order(model.class_names, model.classifier.class_names, config.guidance.classifier_workdir)
    return model


def check_same_order(class_names, others, workdir):
    """Raise UserError if the classifier in `workdir` knows the model's classes, `class_names`, in another order."""
    names, others = list(map(composed, class_names)), list(map(composed, others))
    if names != others and sorted(names) == sorted(others):
        label = next(label for label, name in enumerate(names) if name != others[label])
        raise UserError(
            f'label {label} is {names[label]!r} to the model but {others[label]!r} to the classifier in {workdir}; '
            'both must be trained with the classes in one order (config.guidance.classifier_workdir).'
        )


def load_classifier(config, mesh=None):
    """Return the classifier of config.guidance.classifier_workdir as `Trained`, or None if it names none.

    Its own checkpoint tells its config. Raises UserError if it cannot guide the config's model.
    """
    workdir, field = config.guidance.classifier_workdir, '(config.guidance.classifier_workdir)'
    if not workdir:
        return None
    check_folder(workdir, 'config.guidance.classifier_workdir')
    saved = saved_config(workdir)
    if saved.model.kind != 'classifier':
        raise UserError(f'{workdir} holds a {saved.model.kind}, not a classifier {field}.')
    for key in ('image_size', 'image_channels', 'num_classes'):
        if saved.data[key] != config.data[key]:
            raise UserError(
                f'the classifier in {workdir} has config.data.{key} {saved.data[key]}, the model has '
                f'{config.data[key]} {field}.'
            )
    return _load(saved, workdir, mesh or sharding.make_mesh(), None)


def saved_config(workdir):
    """Return the config of the newest readable checkpoint in `workdir`, with defaults for newer fields.

    Raises UserError if there is no checkpoint.
    """
    config = default()
    with _open_checkpoints(workdir, {}) as checkpoints:
        config.update(checkpoints.saved_config())
    return config


def _load(config, workdir, mesh, classifier, *, step=None, ema=True):
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    with _open_checkpoints(workdir, build.model_identity(config)) as checkpoints:
        restored = checkpoints.restore_params(sharding.abstract(shapes, sharding.replicated(mesh)), step=step, ema=ema)
    path = checkpoints.path(restored.step)
    host = jax.device_get(restored.tree)
    if problems := not_finite(flatten_dict(host, sep='/')):
        raise UserError(f'{path}: {problems[0]}; import or train these weights again, in another --workdir.')
    print(f'loaded {path}', flush=True)
    digest = params_digest(host)
    return Trained(config, restored.tree, restored.step, restored.class_names, digest, classifier, Path(workdir))


def saved_class_names(workdir):
    """Return the class names of `workdir`'s newest checkpoint, or () without a readable one. All processes call it."""
    directory, names = Path(workdir) / 'checkpoints', ()
    if directory.is_dir():
        with contextlib.suppress(UserError), Checkpoints(directory, {}, read_only=True) as saved:
            names = saved.saved_class_names()
    return names


def _open_checkpoints(workdir, identity):
    """Return the checkpoints of a trained workdir, read-only; UserError if it has none."""
    directory = Path(workdir) / 'checkpoints'
    if directory.is_dir():
        checkpoints = Checkpoints(directory, identity, defaults=default().to_dict(), read_only=True)
        if checkpoints.latest_step() is not None:
            return checkpoints
        checkpoints.close()
    raise UserError(f'no checkpoint in {directory}; train first (--mode=train) or point --workdir at a trained one.')


# ---------------------------------------------------------------- drawing


def image_batches(config, guide=None, *, batch_size=None):
    """Return (params, labels, weight, seed[, classifier_weight]) -> units of images, as `generate.image_batches` does.

    guide: the classifier that guides too, a `Trained`, or None. params: on every device. batch_size: images that a
    device draws at once. classifier_weight and batch_size are the config's by default.
    """
    mesh = sharding.local_mesh()
    draw = generate.image_batches(
        build.sampler(config, guide and guide.config),
        mesh,
        batch_size=batch_size or config.sample.batch_size,
        num_classes=config.data.num_classes,
    )
    guide_params = guide and sharding.to_local(guide.params, mesh)

    def batches(params, labels, weight, seed, classifier_weight=None, *, units=None):
        if classifier_weight is None:
            classifier_weight = config.guidance.classifier_weight
        params = sharding.to_local(params, mesh)
        return draw(params, labels, weight, seed, guide_params, classifier_weight, units=units)

    return batches


def unit_size(config, count):
    """Return how many of `count` images a device draws at once: config.sample.batch_size, or all if they are fewer.

    A set smaller than one batch is shared out over the devices of a process.
    """
    if count >= config.sample.batch_size:
        return config.sample.batch_size
    return math.ceil(count / (jax.device_count() // jax.process_count()))


# ---------------------------------------------------------------- sets of images on disk


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A set of images to draw: the label ids to choose from, how many images, and the two weights of the guidance."""

    ids: tuple[int, ...]
    count: int
    weight: float
    classifier_weight: float


def wanted(config, class_names):
    """Return the `Wanted` of config.sample."""
    ids, count = parse_labels(config.sample.labels, class_names), config.sample.num_images
    if not config.sample.labels.strip():
        ids = spread(len(ids), count).tolist()
    return Wanted(tuple(ids), count, build.guidance_weight(config), config.guidance.classifier_weight)


def open_set(model, workdir, wanted):
    """Return the `SampleSet` of `wanted` images of a `Trained` model, kept below `workdir`."""
    sample = model.config.sample
    return SampleSet(
        Path(workdir) / 'sample_sets',
        describe(model.config, wanted),
        identity(model, wanted),
        make_labels(wanted.ids, wanted.count, order=sample.label_order, seed=sample.seed),
        batch_size=unit_size(model.config, wanted.count),
        shard_images=sample.shard_images,
    )


def identity(model, wanted):
    """Return what the images of a set depend on, apart from their number: a nested dict of plain values."""
    plain = model.config.to_dict()
    options = {option for _, options in build.SAMPLERS.values() for option in options}
    drawing = {key: plain['sample'][key] for key in ('sampler', 'num_steps', 'spacing', 'clip_x', 'seed', *options)}
    weights = {'guidance_weight': wanted.weight, 'classifier_weight': wanted.classifier_weight}
    guide = model.classifier
    return {
        'params': model.digest,
        'code': code_digest(model.config),
        'classifier_params': guide and guide.digest,
        'classifier': guide and {**build.model_identity(guide.config), 'dtype': guide.config.model.dtype},
        'model': build.model_identity(model.config)['model'],
        'dtype': plain['model']['dtype'],
        'diffusion': plain['diffusion'],
        'sample': drawing,
        'guidance': plain['guidance'] | weights,
        'classes': list(wanted.ids),
        'label_order': plain['sample']['label_order'],
        'batch_size': unit_size(model.config, wanted.count),  # of the program that draws them
    }


def code_digest(config):
    """Return text that changes with the code that draws: this project's, and a user's own guidance."""
    digest = hashlib.sha256(build.guidance_digest(config).encode())
    for module in (schedules, diffusion, guidance, samplers, blocks, unet, classifier, build, generate):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def drawn_with(config, weight, classifier_weight):
    """Return the guidance of a picture's images for its title: 'w = 0.3', 'w = 0, c = 2', 'unconditional, c = 2'."""
    function = config.guidance.function
    parts = [function] if function in ('conditional', 'unconditional') else [f'w = {weight:g}']
    if ':' in function:
        parts.append(function.rpartition(':')[2])
    if config.guidance.classifier_workdir:
        parts.append(f'c = {classifier_weight:g}')
    return ', '.join(parts)


def guidance_identity(config):
    """Return config.guidance.function, with a hash if it is the user's own and may be edited."""
    name, digest = config.guidance.function, build.guidance_digest(config)
    return f'{name}, sha256 {digest[:16]}' if digest else name


def describe(config, wanted):
    """Return a short name for files such as 'ancestral256_w0.3_seed0'.

    It tells the guidance function, v and eta where they differ from the defaults.
    """
    usual, sample = default(), config.sample
    name = f'{sample.sampler}{len(build.sampling_logsnrs(config))}'
    if config.guidance.function != usual.guidance.function:
        name += f'_{config.guidance.function.rpartition(":")[2]}'
    for option in build.SAMPLERS[sample.sampler][1]:
        if sample[option] != usual.sample[option]:
            name += f'_{option}{sample[option]:g}'
    name += f'_w{wanted.weight:g}'
    if config.guidance.classifier_workdir:
        name += f'_classifier{wanted.classifier_weight:g}'
    return f'{name}_seed{sample.seed}'
