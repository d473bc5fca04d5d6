"""cfg_jax from Python: read a config, train, load, sample and evaluate; for notebooks and other programs.

    import cfg_jax
    model = cfg_jax.load('runs/digits')
    images = model.sample(labels=[3, 8], weight=1.0, num_images=16)
    cfg_jax.grid(images, [3, 8])

Bad input is a `cfg_jax.UserError` of one line, as at the command line.
"""

import contextlib
import dataclasses
import functools
import numbers
from collections.abc import Callable
from pathlib import Path

from cfg_jax import runtime

runtime.configure()  # sets XLA's flags, which count until JAX makes its first computation

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import logging  # noqa: E402

from cfg_jax import build, build_sampling, config_files, trained  # noqa: E402
from cfg_jax.data import spread  # noqa: E402
from cfg_jax.distributed.job import the_job  # noqa: E402
from cfg_jax.errors import UserError, disk_errors  # noqa: E402
from cfg_jax.progress import Progress  # noqa: E402
from cfg_jax.sampling.labels import check_labels, make_labels, parse_labels  # noqa: E402

read_config = config_files.read
_SHOWN_PIXELS = 32 * 32  # larger images take too long on a CPU to be drawn unasked


class Model(trained.Trained):
    """A trained model, to draw with: a diffusion model or, with `log_prob` alone, a noisy classifier.

    config, params (EMA unless asked otherwise), step, class_names, classifier, workdir: see `trained.Trained`.
    """

    @property
    def null_label(self) -> int:
        """The label id of the unconditional model."""
        return build.null_label(self.config)

    @functools.cached_property
    def model(self) -> Callable:
        """The network as guidance and samplers see it: (z [B, H, W, C], logsnr [B], labels [B]) -> `Prediction`."""
        self._require('unet')
        return build.model(self.config, self.params)

    @functools.cached_property
    def log_prob(self) -> Callable:
        """The classifier as guidance sees it: (z [B, H, W, C], logsnr [B], labels [B]) -> log p(label | z), [B]."""
        self._require('classifier')
        return build.log_prob(self.config, self.params)

    def denoiser(self, labels, weight=0.0, *, guidance=None, classifier_weight=0.0, changes=None) -> Callable:
        """Return the guided denoiser (z [B, H, W, C], logsnr [B]) -> `Prediction` for a label per image.

        labels: ids or names, [B]. weight: the paper's w, a scalar or one per image; classifier_weight likewise.
        guidance, changes: see `sample`.
        """
        self._require('unet')
        config = self._with({'guidance.function': guidance}, changes)
        model = trained.with_helpers(dataclasses.replace(self, config=config), former=self)
        of_label = model.classifier and build.log_prob(model.classifier.config, model.classifier.params)
        weak_model = model.weak and build.model(model.weak.config, model.weak.params)
        ids = np.array(self._ids(labels), np.int32)
        weight = _weight(weight, 'weight', len(ids))
        classifier_weight = _weight(classifier_weight, 'classifier_weight', len(ids))
        if not isinstance(weight, jax.core.Tracer):
            build_sampling.check_weight(config, weight, 'weight')
        if not (model.classifier or isinstance(classifier_weight, jax.core.Tracer)) and np.any(classifier_weight):
            raise UserError(
                f'classifier_weight is {classifier_weight}, but no classifier guides; give one to load(classifier=) or '
                'as config.guidance.classifier_workdir.'
            )
        if np.ndim(weight) == 0 and not isinstance(weight, jax.core.Tracer):
            config = build_sampling.at_weight(config, float(weight))
        others = {'of_label': of_label, 'classifier_weight': classifier_weight, 'weak_model': weak_model}
        return build_sampling.denoiser(config, self.params, ids, weight, **others)

    def sample(
        self,
        labels=None,
        weight=0.0,
        *,
        num_images=None,
        seed=0,
        num_steps=None,
        sampler=None,
        v=None,
        eta=None,
        clip_x=None,
        guidance=None,
        classifier_weight=None,
        changes=None,
    ) -> np.ndarray:
        """Return images, uint8 [N, H, W, C]: those of --mode=sample at the same seed, to the bit.

        labels: label ids or class names, taken in turn until there are `num_images`; by default one image for each.
        None means all classes. weight: the paper's w. guidance: 'classifier_free', 'conditional', 'unconditional',
        'learned', 'module:function', or a function (model, labels, weight, *, null_label) -> denoiser. changes:
        {'section.key': value}, such as {'guidance.rule': 'apg'}; a rule and a schedule may be functions too. What is
        None is as in the config. Another seed or weight does not compile again. Raises UserError for anything that is
        wrong.
        """
        self._require('unet')
        if labels is None:
            num_images = self.config.sample.num_images if num_images is None else num_images
            ids = spread(len(self.class_names), num_images).tolist()
        else:
            ids = self._ids(labels)
            num_images = len(ids) if num_images is None else num_images
        config = self._with(
            {
                'sample.num_images': num_images,
                'sample.seed': seed,
                'sample.num_steps': num_steps,
                'sample.sampler': sampler,
                'sample.v': v,
                'sample.eta': eta,
                'sample.clip_x': clip_x,
                'guidance.function': guidance,
                'guidance.classifier_weight': classifier_weight,
            },
            changes,
        )
        for name, value in (('weight', weight), ('classifier_weight', config.guidance.classifier_weight)):
            _weight(value, name)
        build_sampling.check_weight(config, weight, 'weight')
        labels = make_labels(ids, num_images, order=config.sample.label_order, seed=seed)
        batches = self._program(config)(self.params, labels, float(weight), seed, config.guidance.classifier_weight)
        images, progress, name = [], Progress(num_images, compiles=True), f'w={weight:g}'
        with progress.watched(name):
            for batch in batches:
                images.append(batch)
                progress.show(sum(map(len, images)), name)
        return np.concatenate(images)

    def _program(self, config):
        """Return `trained.image_batches` of the config, compiled once for all weights, seeds and labels."""
        size = trained.unit_size(config, config.sample.num_images)
        drawing = config.sample.to_dict()
        for key in ('num_images', 'seed', 'guidance_weight', 'guidance_scale', 'labels', 'label_order'):
            del drawing[key]  # traced, or not the program's business
        guided = {k: v for k, v in config.guidance.to_dict().items() if k != 'classifier_weight'}
        own = tuple(build_sampling.own_functions(config).items())
        key = (size, str(drawing), str(guided), own)
        if key not in self._programs:
            model = trained.with_helpers(dataclasses.replace(self, config=config), former=self)
            self._programs[key] = trained.image_batches(config, model.classifier, model.weak, batch_size=size)
        return self._programs[key]

    @functools.cached_property
    def _programs(self):
        return {}

    def _with(self, arguments, changes):
        """Return the config with the changes, and the arguments that are not None, checked."""
        from cfg_jax.checks import check_config

        given = {name: value for name, value in arguments.items() if value is not None}
        changes = _named({**given, **(changes or {})})
        config = config_files.with_changes(self.config, changes)
        check_config(config)
        made_for, asked = build.student_steps(config, self.step), config.sample.num_steps
        if made_for not in (None, asked):
            raise UserError(
                f'num_steps is {asked}, but the model of step {self.step:,} is a student of {made_for}; load that of '
                f'{asked}, with step={build.student_step(config, asked, "num_steps")}.'
            )
        return config

    def _ids(self, labels):
        """Return label ids, a list, of ids and class names, or of a text as config.sample.labels takes it."""
        if isinstance(labels, str):
            return parse_labels(labels, self.class_names)
        ids = []
        for label in np.atleast_1d(np.asarray(labels, object)):
            if not isinstance(label, str | int | np.integer):
                raise UserError(f'label {label!r} is not a class; give label ids or class names.')
            ids += parse_labels(label, self.class_names) if isinstance(label, str) else [int(label)]
        if not ids:
            raise UserError('labels are empty; give label ids or class names, or None for all classes.')
        check_labels(ids, len(self.class_names))
        return ids

    def _require(self, kind):
        if self.config.model.kind != kind:
            own, use = self.config.model.kind, {'unet': 'log_prob', 'classifier': 'model, denoiser and sample'}
            raise UserError(f'{self.workdir} holds a {own}, not a {kind}: it has {use[kind]} only.')

    def __repr__(self):
        number = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        height, width, channels = build.image_shape(self.config)
        kind = {'unet': 'Model', 'classifier': 'Classifier'}[self.config.model.kind]
        return (
            f'{kind} of {len(self.class_names)} classes, {height}x{width}x{channels}, {number / 1e6:.1f}M parameters, '
            f'step {self.step:,}, {self.workdir}'
        )

    @functools.cached_property
    def _picture(self):
        ids = spread(len(self.class_names), 10).tolist()
        weights = {'classifier_free': 1.0, 'learned': min(1.0, self.config.model.guidance_max)}
        weight = weights.get(self.config.guidance.function, 0.0)
        images = self.sample(sorted(ids * 10), weight)
        title = f'w = {weight:g}, step {self.step:,}'
        return grid(images, sorted(ids * 10), self.class_names, title=title)._repr_png_()

    def _repr_png_(self):
        """Return a grid of ten images for each of ten classes at w = 1 as PNG, or None where that would take long."""
        height, width, _ = build.image_shape(self.config)
        on_cpu = jax.default_backend() == 'cpu'
        if self.config.model.kind != 'unet' or (on_cpu and height * width > _SHOWN_PIXELS):
            return None
        return self._picture


def _named(changes):
    """Return the changes with names in place of the functions that are values of config.guidance."""
    return {
        name: build_sampling.given_function(value, name.removeprefix('guidance.')) if callable(value) else value
        for name, value in changes.items()
    }


def _weight(value, name, count=None):
    """Return a weight as guidance takes it: one number, or float32 [count]. A traced one is not looked into.

    count: of images, of which each may have its own. Raises UserError for anything else, and for a number that is not
    finite.
    """
    traced, fits = isinstance(value, jax.core.Tracer), False
    with contextlib.suppress(TypeError, ValueError):  # of rows of different lengths, say
        found = value if traced else np.asarray(value)
        real = any(jnp.issubdtype(found.dtype, kind) for kind in (jnp.floating, jnp.integer))
        fits = real and found.shape in ((), (count,)) and (traced or np.isfinite(np.float32(found)).all())
    if not fits:
        each = '' if count is None else f', or one for each of the {count} labels'
        raise UserError(f'{name} is {value!r}; it must be one finite number{each}.')
    return jnp.asarray(value, jnp.float32) if found.shape else value


def load(workdir, *, step=None, ema=True, classifier=None) -> Model:
    """Return the trained model of a workdir. It needs the checkpoint alone, not the data.

    step: the checkpoint's; by default the newest, or, of progressive distillation's, that of the student of
    config.sample.num_steps. ema: True takes the average of the parameters, False the parameters themselves; a number,
    sigma_rel, takes the average of this length that is made of the snapshots of training. classifier: the workdir of a
    noisy classifier, to guide with it too. Raises UserError if there is no such checkpoint.
    """
    if not isinstance(ema, numbers.Real):
        raise UserError(
            f'ema is {ema!r}; it must be True (the average of the parameters), False (the parameters themselves) or a '
            'number (the length of an average, sigma_rel).'
        )
    if step is not None and (isinstance(step, bool) or not isinstance(step, numbers.Integral)):
        raise UserError(f'step is {step!r}; it must be a whole number, or None for the newest checkpoint.')
    workdir = Path(config_files.expanded(str(workdir), 'workdir'))
    changes = {} if classifier is None else {'guidance.classifier_workdir': str(classifier)}
    with _at_work(workdir):
        config = config_files.with_changes(trained.saved_config(workdir), changes)
        if step is not None and (num_steps := build.student_steps(config, step)):
            config = config_files.with_changes(config, {'sample.num_steps': num_steps})
        found = trained.load(config, workdir, step=step, ema=ema)
    return Model(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})


def grid(images, labels=None, class_names=None, *, title=''):
    """Return a picture of images, uint8 [N, H, W, C], as a `PIL.Image`: a row for each label, small images enlarged.

    labels: [N], or fewer, taken in turn as `Model.sample` does; without any, rows of ten images. class_names: names by
    label id, instead of the ids.
    """
    from PIL import Image

    from cfg_jax.evaluation import grids

    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise UserError(f'images are {images.dtype} {images.shape}; a grid needs uint8 [N, H, W, 1 or 3].')
    if labels is None:
        picture = grids.grid([images[start : start + 10] for start in range(0, len(images), 10)], title=title)
    else:
        labels = np.resize(np.atleast_1d(labels), len(images))
        names = class_names or {label: str(label) for label in labels.tolist()}
        picture = grids.class_grid(images, labels, names, title)
    return Image.fromarray(picture)


def train(config, workdir, changes=None, *, callback=None) -> Model:
    """Train as --mode=train does, resuming what `workdir` holds, and return the trained model.

    config: a `ConfigDict`, a config file, or the name of one of configs/. changes: {'section.key': value}.
    callback(step, values): called at each progress line with loss, gradient norm, images per second and more. An
    interrupt saves the step at hand and raises `Stopped`; the same call resumes from it.
    """
    if isinstance(config, str | Path):
        config = config_files.read(config, changes)
    else:
        config = config_files.with_changes(config, changes or {})
    from cfg_jax.jobs import train as job

    workdir = Path(config_files.expanded(str(workdir), 'workdir'))
    with _at_work(workdir), the_job.hosted():
        job.run(config, workdir, report=callback)
    return load(workdir)


def evaluate(workdir, changes=None, *, guidance=None) -> list[dict]:
    """Evaluate as --mode=evaluate does, and return the rows of all judges: a dict for each weight of each curve.

    The config is the workdir's own. changes: {'section.key': value}, such as {'eval.folder': 'ddim'}. guidance: see
    `Model.sample`; a function's images are drawn again if what it computes has changed.
    """
    changes = dict(changes or {})
    if guidance is not None:
        changes['guidance.function'] = guidance
    from cfg_jax.jobs import evaluate as job

    workdir = Path(config_files.expanded(str(workdir), 'workdir'))
    with _at_work(workdir):
        return job.run(config_files.with_changes(trained.saved_config(workdir), _named(changes)), workdir)


@contextlib.contextmanager
def _at_work(workdir):
    """Context manager: errors of the disk and of the devices are one line, and Orbax's log is silent but for errors."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with disk_errors(workdir), runtime.devices_errors():
            yield
    finally:
        logging.set_verbosity(verbosity)
