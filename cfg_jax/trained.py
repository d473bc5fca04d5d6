"""A trained model: read from its checkpoints, its drawing function, and the sets of images drawn with it."""

import contextlib
import dataclasses
import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from cfg_jax import build, build_sampling, denoisers, diffusion, guidance, samplers, schedules
from cfg_jax.config import default, of_saved
from cfg_jax.data import spread
from cfg_jax.errors import UserError
from cfg_jax.files import composed
from cfg_jax.models import blocks, classifier, unet
from cfg_jax.sampling import generate
from cfg_jax.sampling.labels import make_labels, parse_labels
from cfg_jax.sampling.sample_sets import SampleSet, params_digest
from cfg_jax.torch_files import not_finite
from cfg_jax.training import sharding, snapshots
from cfg_jax.training.checkpoints import Checkpoints, as_json, check_folder


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained network and all that is needed to draw with it.

    config: that of the run. params: the EMA parameters, or others of that step, whole on every device. step: training
    steps done.
    class_names: by label id. digest: text that is the same for the same parameters. classifier: the trained noisy
    classifier of config.guidance.classifier_workdir, or None. workdir: the folder that the checkpoint was read from.
    weak: the weak model of config.guidance.weak='checkpoint', or None. tag: text in the names of its sets of images, so
    that those of several checkpoints are kept beside each other.
    """

    config: ConfigDict
    params: Any
    step: int
    class_names: tuple[str, ...]
    digest: str
    classifier: 'Trained | None' = None
    workdir: Path | None = None
    weak: 'Trained | None' = None
    tag: str = ''


# ---------------------------------------------------------------- reading


def load(config, workdir, mesh=None, *, step=None, ema=True, former=None):
    """Return a checkpoint of `workdir` as `Trained`, with the classifier and the weak model that the config names.

    mesh: where the parameters are put; all devices by default. step: the checkpoint's; by default the newest, or that
    of the student of config.sample.num_steps where distillation has made students of several. ema: see `load_alone`.
    former: see `with_helpers`. Raises UserError if there is no checkpoint, or if it does not belong to the config.
    """
    mesh = mesh or sharding.make_mesh()
    step = build.student_step(config, config.sample.num_steps) if step is None else step
    return with_helpers(load_alone(config, workdir, mesh, step=step, ema=ema), mesh, former=former)


def with_helpers(model, mesh=None, *, former=None):
    """Return the `Trained` model with the classifier and the weak model that its config names.

    former: a model with helpers of its own, which are taken over if the config names the same ones.
    """
    mesh, settings = mesh or sharding.make_mesh(), model.config.guidance
    classifier = weak = None
    if former and former.config.guidance.classifier_workdir == settings.classifier_workdir:
        classifier = former.classifier
    classifier = classifier or load_classifier(model.config, mesh)
    if former and _weak_place(former) == _weak_place(model):
        weak = former.weak
    if weak:
        _check_null_label(weak.config, model.config, weak.workdir)
    weak = weak or load_weak(model.config, model.workdir, mesh)
    if weak and weak.digest == model.digest and settings.weak_conditional:
        raise _same_parameters(model.step)
    for other, field in ((classifier, 'classifier_workdir'), (weak, 'weak_workdir')):
        if other:
            check_same_order(model.class_names, other.class_names, other.workdir, f'config.guidance.{field}')
    return dataclasses.replace(model, classifier=classifier, weak=weak)


def _same_parameters(step):
    return UserError(
        f'the weak model has the parameters of the model itself, step {step}, so guidance would change nothing; set '
        'config.guidance.weak_workdir, or an earlier config.guidance.weak_step of this workdir, or '
        'config.guidance.weak_ema to False or a length.'
    )


def check_there(config, workdir, *, step=None, ema=True):
    """Raise UserError unless `load` finds its parameters and those of the networks that the config names.

    They are not read, so that many can be checked before the first is used.
    """
    settings, others = config.guidance, []
    own = _check_parameters(workdir, step, ema)
    if _classifier_config(config):
        _check_parameters(settings.classifier_workdir, None, True)
        others.append((settings.classifier_workdir, 'classifier_workdir'))
    if _weak_config(config, workdir):
        place = settings.weak_workdir or workdir
        with _asked_by_weak_step(config):
            weak = _check_parameters(place, settings.weak_step, settings.weak_ema)
        if weak == own and settings.weak_conditional:
            raise _same_parameters(own[1])
        others.append((place, 'weak_workdir'))
    for place, field in others:
        check_same_order(saved_class_names(workdir), saved_class_names(place), place, f'config.guidance.{field}')


def _check_parameters(workdir, step, ema):
    """Return (folder, step, ema) of what `load_alone` would read; UserError if it is not there."""
    with _open_parameters(workdir, {}, ema) as saved:
        step = saved.latest_step() if step is None else step
        saved.require(step)
        if not isinstance(ema, bool):
            snapshots.weights_at(saved, ema, step)
    return Path(workdir).resolve(), step, ema


def check_same_order(class_names, others, workdir, field):
    """Raise UserError if the other network, in `workdir`, knows the model's classes, `class_names`, in another order.

    field: the one that names the workdir.
    """
    names, others = list(map(composed, class_names)), list(map(composed, others))
    if names != others and sorted(names) == sorted(others):
        label = next(label for label, name in enumerate(names) if name != others[label])
        raise UserError(
            f'label {label} is {names[label]!r} to the model but {others[label]!r} to that in {workdir}; both must be '
            f'trained with the classes in one order ({field}).'
        )


def load_classifier(config, mesh=None):
    """Return the classifier of config.guidance.classifier_workdir as `Trained`, or None if it names none.

    Its own checkpoint tells its config. Raises UserError if it cannot guide the config's model.
    """
    saved = _classifier_config(config)
    return saved and load_alone(saved, config.guidance.classifier_workdir, mesh)


def _classifier_config(config):
    """Return the config that the classifier was trained with, checked; None if config.guidance names none."""
    workdir, field = config.guidance.classifier_workdir, '(config.guidance.classifier_workdir)'
    if not workdir:
        return None
    check_folder(workdir, 'config.guidance.classifier_workdir')
    saved = saved_config(workdir)
    if saved.model.kind != 'classifier':
        raise UserError(f'{workdir} holds a {saved.model.kind}, not a classifier {field}.')
    _check_same_data(saved, config, f'the classifier in {workdir}', field)
    return saved


def saved_unet(workdir, config, name, field):
    """Return the config of the diffusion model in `workdir`, whose images and classes are like those of `config`.

    name: what the model is to the other, such as 'teacher'. Raises UserError for any other contents of `workdir`.
    """
    saved = saved_config(workdir)
    if saved.model.kind != 'unet':
        raise UserError(f'{workdir} holds a {saved.model.kind}, not a diffusion model {field}.')
    _check_same_data(saved, config, f'the {name} in {workdir}', field)
    return saved


def _check_same_data(saved, config, name, field):
    """Raise UserError unless another network, of config `saved`, knows images and classes like the config's."""
    for key in ('image_size', 'image_channels', 'num_classes'):
        if saved.data[key] != config.data[key]:
            raise UserError(
                f'{name} has config.data.{key} {saved.data[key]}, the model has {config.data[key]} {field}.'
            )


def _weak_place(model):
    """Return what tells which parameters config.guidance.weak='checkpoint' means to a `Trained`; None without it."""
    settings = model.config.guidance
    if build_sampling.weak_name(model.config) != 'checkpoint':
        return None
    return settings.weak_workdir or model.workdir, settings.weak_step, settings.weak_ema


def load_weak(config, workdir, mesh=None):
    """Return the weak model of config.guidance.weak='checkpoint' as `Trained`; None for any other guidance.

    workdir: the model's own. Raises UserError if the checkpoint cannot be the weak model of the config's model.
    """
    settings, saved = config.guidance, _weak_config(config, workdir)
    if saved is None:
        return None
    with _asked_by_weak_step(config):
        return load_alone(saved, settings.weak_workdir or workdir, mesh, step=settings.weak_step, ema=settings.weak_ema)


def _weak_config(config, workdir):
    """Return the config that the weak model was trained with, checked; None for guidance without one."""
    settings, field = config.guidance, '(config.guidance.weak_workdir)'
    if build_sampling.weak_name(config) != 'checkpoint':
        return None
    if settings.weak_workdir:
        check_folder(settings.weak_workdir, 'config.guidance.weak_workdir')
    place = settings.weak_workdir or workdir
    saved = saved_unet(place, config, 'weak model', field)
    _check_null_label(saved, config, place)
    return saved


@contextlib.contextmanager
def _asked_by_weak_step(config):
    """Context manager: an error within it says that config.guidance.weak_step asked for the step, if it did."""
    try:
        yield
    except UserError as error:
        if config.guidance.weak_step is None:
            raise
        raise UserError(f'{error} It was asked for by config.guidance.weak_step.') from None


def load_teacher(config, mesh=None):
    """Return the teacher of config.distill.teacher as `Trained`. Raises UserError unless the config's student fits it.

    A student has its teacher's network; 'guided' adds the guidance weight to it, which 'progressive' leaves as it is.
    """
    workdir, field = config.distill.teacher, '(config.distill.teacher)'
    if not workdir:
        raise UserError('config.distill.teacher is not set; give the workdir of a trained model to learn from.')
    check_folder(workdir, 'config.distill.teacher')
    saved = saved_unet(workdir, config, 'teacher', field)
    guided = config.distill.method == 'guided'
    if guided and saved.model.guidance_input:
        raise UserError(
            f'the model in {workdir} takes the guidance weight already, as a student does; a teacher of '
            f"config.distill.method='guided' is a model without it {field}."
        )
    if guided and not build_sampling.has_unconditional(saved):
        raise UserError(
            f"the model in {workdir} has not learned the null label, which config.distill.method='guided' needs of a "
            f'teacher (its config.distill.method and config.loss.p_uncond) {field}.'
        )
    own, of_teacher = build.model_identity(config), build.model_identity(saved)
    skipped = ('guidance_input', 'guidance_max') if guided else ()
    for section in ('model', 'diffusion'):
        for key, value in own[section].items():
            if key not in skipped and as_json(value) != as_json(of_teacher[section][key]):
                raise UserError(
                    f'config.{section}.{key} is {value!r}, but the teacher in {workdir} has '
                    f'{of_teacher[section][key]!r}; a student has the network of its teacher {field}.'
                )
    name = (
        f'the number of steps that the teacher in {workdir} takes, twice those of the first of config.distill.rounds,'
    )
    step = None if guided else build.student_step(saved, 2 * config.distill.rounds[0][0], name)
    return load_alone(saved, workdir, mesh, step=step)


def _check_null_label(saved, config, place):
    """Raise UserError if the weak model with config `saved` would be asked for a null label that it does not have."""
    unconditional = not config.guidance.weak_conditional or config.guidance.function == 'unconditional'
    if unconditional and not build_sampling.has_unconditional(saved):
        raise UserError(
            f'the weak model in {place} has not learned a null label and can only be asked with the labels '
            '(config.guidance.weak_conditional, config.guidance.function).'
        )


def saved_config(workdir):
    """Return the config of the newest readable checkpoint in `workdir`, with defaults for newer fields.

    Raises UserError if there is no checkpoint.
    """
    with _open_checkpoints(workdir, {}) as checkpoints:
        return of_saved(checkpoints.saved_config())


def load_alone(config, workdir, mesh=None, *, step=None, ema=True):
    """Return what `load` does without the networks that guide. All parameters are read here.

    step: the checkpoint's; the newest by default. ema: True takes the average of the parameters, False the parameters
    themselves; a number, sigma_rel, takes the average of this length that is made of the snapshots up to that step.
    """
    placed = sharding.replicated(mesh or sharding.make_mesh())
    abstract = sharding.abstract(jax.eval_shape(lambda: build.init_params(config, jax.random.key(0))), placed)
    with _open_parameters(workdir, build.model_identity(config), ema) as saved:
        if isinstance(ema, bool):
            restored, name = saved.restore_params(abstract, step=step, ema=ema), ''
        else:
            restored, name = snapshots.reconstructed(saved, abstract, ema, step), f'the EMA of length {ema:g} at '
    path, params = saved.path(restored.step), restored.tree
    host = jax.device_get(params)
    if problems := not_finite(flatten_dict(host, sep='/')):
        raise UserError(f'{path}: {problems[0]}; import or train these weights again, in another --workdir.')
    if name:
        params = sharding.whole(host, placed)
    print(f'loaded {name}{path}', flush=True)
    digest = params_digest(host)
    return Trained(config, params, restored.step, restored.class_names, digest, workdir=Path(workdir))


def saved_class_names(workdir):
    """Return the class names of `workdir`'s newest checkpoint, or () without a readable one. All processes call it."""
    directory, names = Path(workdir) / 'checkpoints', ()
    if directory.is_dir():
        with contextlib.suppress(UserError), Checkpoints(directory, {}, read_only=True) as saved:
            names = saved.saved_class_names()
    return names


def _open_parameters(workdir, identity, ema):
    """Return the checkpoints, read-only, that hold these parameters: the run's own, or the snapshots of its averages.

    ema: see `load_alone`. UserError if there are none.
    """
    if isinstance(ema, bool):
        return _open_checkpoints(workdir, identity)
    return snapshots.open_to_read(workdir, identity, defaults=default().to_dict())


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


def image_batches(config, guide=None, weak=None, *, batch_size=None):
    """Return (params, labels, weight, seed[, classifier_weight]) -> units of images, as `generate.image_batches` does.

    guide: the classifier that guides too, a `Trained`, or None. weak: the weak model, likewise. params: on every
    device. batch_size: images that a device draws at once. classifier_weight and batch_size are the config's by
    default. It compiles once for all weights, and once for w = 0, where no guidance is computed; once more for a
    classifier_weight of 0, where no classifier is.
    """
    mesh = sharding.local_mesh()

    @functools.cache
    def drawing(guided, by_classifier):
        """Return (the function that draws, the parameters of the weak model), each weight being 0 or any other."""
        at_weight = build_sampling.at_weight(config, float(guided))
        needs_weak = weak if guided or at_weight is config else None
        draw = generate.image_batches(
            build_sampling.sampler(
                at_weight, guide.config if by_classifier else None, needs_weak and needs_weak.config
            ),
            mesh,
            batch_size=batch_size or config.sample.batch_size,
            num_classes=config.data.num_classes,
        )
        return draw, needs_weak and sharding.to_local(needs_weak.params, mesh)

    guide_params = guide and sharding.to_local(guide.params, mesh)

    def batches(params, labels, weight, seed, classifier_weight=None, *, units=None):
        if classifier_weight is None:
            classifier_weight = config.guidance.classifier_weight
        build_sampling.check_weight(config, weight)
        by_classifier = guide is not None and classifier_weight != 0.0
        draw, weak_params = drawing(is_guided(config, weight), by_classifier)
        guiding = (guide_params, classifier_weight) if by_classifier else (None, 0.0)
        params = sharding.to_local(params, mesh)
        return draw(params, labels, weight, seed, *guiding, weak_params, units=units)

    return batches


def is_guided(config, weight):
    """Return False where `image_batches` draws with the program of w = 0, which computes no guidance."""
    return build_sampling.at_weight(config, weight) is config


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
    return Wanted(tuple(ids), count, build_sampling.guidance_weight(config), config.guidance.classifier_weight)


def open_set(model, workdir, wanted):
    """Return the `SampleSet` of `wanted` images of a `Trained` model, kept below `workdir`."""
    sample = model.config.sample
    return SampleSet(
        Path(workdir) / 'sample_sets',
        '_'.join(filter(None, (describe(model.config, wanted), model.tag))),
        identity(model, wanted),
        make_labels(wanted.ids, wanted.count, order=sample.label_order, seed=sample.seed),
        batch_size=unit_size(model.config, wanted.count),
        shard_images=sample.shard_images,
    )


_DRAWING = (
    'sampler', 'num_steps', 'spacing', 'grid', 'clip_x', 'clip_percentile', 'seed',
)  # fmt: skip
_CODE = (schedules, diffusion, denoisers, guidance, samplers, blocks, unet, classifier, build, build_sampling)


def identity(model, wanted):
    """Return what the images of a set depend on, apart from their number: a nested dict of plain values."""
    config = build_sampling.at_weight(model.config, wanted.weight)
    plain, weak = config.to_dict(), model.weak if is_guided(model.config, wanted.weight) else None
    drawing = {key: plain['sample'][key] for key in _DRAWING} | build_sampling.sampler_options(config)
    if config.sample.grid != 'u':
        drawing['grid'] = grid_words(config)
    weights = {'guidance_weight': wanted.weight, 'classifier_weight': wanted.classifier_weight}
    guide = model.classifier
    return {
        'params': model.digest,
        'code': code_digest(config),
        'classifier_params': guide and guide.digest,
        'weak_params': weak and weak.digest,
        'weak': weak and {**build.model_identity(weak.config), 'dtype': weak.config.model.dtype},
        'classifier': guide and {**build.model_identity(guide.config), 'dtype': guide.config.model.dtype},
        'model': build.model_identity(model.config)['model'],
        'dtype': plain['model']['dtype'],
        'diffusion': plain['diffusion'],
        'sample': drawing,
        'guidance': build_sampling.used_fields(config) | weights,
        'classes': list(wanted.ids),
        'label_order': plain['sample']['label_order'],
        'batch_size': unit_size(config, wanted.count),  # of the program that draws them
    }


def code_digest(config):
    """Return text that changes with the code that draws: this project's, and a user's own guidance."""
    digest = hashlib.sha256(build_sampling.guidance_digest(config).encode())
    for module in (*_CODE, generate):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def drawn_with(config, weight, classifier_weight):
    """Return the guidance of a picture's images for its title: 'w = 0.3', 'w = 0, c = 2', 'unconditional, c = 2'."""
    function = config.guidance.function
    parts = [f'w = {weight:g}' if build_sampling.guides(config) else function]
    if ':' in function:
        parts.append(function.rpartition(':')[2])
    parts += guidance_words(config, weight)
    if config.guidance.classifier_workdir:
        parts.append(f'c = {classifier_weight:g}')
    return ', '.join(parts)


def guidance_words(config, weight=1.0, *, between=' '):
    """Return the choices of config.guidance that differ from the paper's: ['apg', 'interval -1 3']; [] at w = 0."""
    usual, settings = default().guidance, build_sampling.at_weight(config, weight).guidance
    if ':' in settings.function:
        return []
    words = []
    for field in ('weak', 'rule', 'schedule'):
        if settings[field] != usual[field]:
            words.append(settings[field].rpartition(':')[2])
    words += ['unlabelled'] * (settings.weak == 'checkpoint' and not settings.weak_conditional)
    for word, fields in _WORDS.items():
        values = [f'{settings[field]:g}' for field in fields if settings[field] != usual[field]]
        words += [between.join([word, *values])] if values else []
    for field in ('attention_resolutions', 'interval'):
        if settings[field]:
            words.append(between.join([field.partition('_')[0], *(f'{value:g}' for value in settings[field])]))
    return words


# numbers of config.guidance in the names of files and in titles
_WORDS = {
    'step': ('weak_step',), 'ema': ('weak_ema',), 'scale': ('time_scale',), 'factor': ('rescale_factor',),
    'norm': ('apg_norm_threshold',), 'eta': ('apg_eta',), 'percentile': ('dynamic_percentile',),
    'momentum': ('momentum',), 'power': ('schedule_power',),
}  # fmt: skip


def grid_words(config):
    """Return config.sample.grid with its ends in λ and rho: 'karras -8.764 12.43 7', or 'u'."""
    sample = config.sample
    if sample.grid in ('u', 'u_open'):
        return sample.grid
    numbers = (*build_sampling.grid_ends(config), *([sample.rho] if sample.grid == 'karras' else []))
    return ' '.join([sample.grid, *(f'{number:.6g}' for number in numbers)])


def guidance_identity(config):
    """Return config.guidance.function and the other choices of guidance, with a hash if any of it is the user's own."""
    digest = build_sampling.guidance_digest(config)
    name = ' '.join([config.guidance.function, *guidance_words(config)])
    return f'{name}, sha256 {digest[:16]}' if digest else name


def describe(config, wanted):
    """Return a short name for files such as 'ancestral256_w0.3_seed0'.

    It tells the guidance, v and eta where they differ from the defaults.
    """
    usual, sample = default(), config.sample
    name = f'{sample.sampler}{len(build_sampling.sampling_logsnrs(config))}'
    if sample.grid != usual.sample.grid:
        name += f'_{sample.grid}'
    if config.guidance.function != usual.guidance.function:
        name += f'_{config.guidance.function.rpartition(":")[2]}'
    for option in build_sampling.SAMPLERS[sample.sampler][1]:
        if sample[option] != usual.sample[option] and option != 'churn_interval':
            name += f'_{option}{sample[option]:g}'
    words = guidance_words(config, wanted.weight, between='_')
    if weak := Path(build_sampling.at_weight(config, wanted.weight).guidance.weak_workdir).name:
        words.append(weak)
    name += ''.join(f'_{word}' for word in words)
    name += f'_w{wanted.weight:g}'
    if config.guidance.classifier_workdir:
        name += f'_classifier{wanted.classifier_weight:g}'
    return f'{name}_seed{sample.seed}'
