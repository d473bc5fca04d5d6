"""The curves of an evaluation, and the points on them."""

import dataclasses
import itertools
from pathlib import Path

from ml_collections import ConfigDict

from cfg_jax import build, build_sampling, phema, trained
from cfg_jax.checks import check_config, names_curves
from cfg_jax.config import changed
from cfg_jax.errors import UserError
from cfg_jax.evaluation import columns
from cfg_jax.jobs.evaluate import variants


@dataclasses.dataclass(frozen=True)
class Point:
    """One place of a curve: its two weights, and its name, such as 'w=0.3'."""

    guidance_weight: float
    classifier_weight: float
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """A config whose weights are swept.

    suffix: the part of file names that tells it from other curves. variant: its name, such as that in
    config.eval.variants, or ''. overrides: what the variant changes, as text. step: the checkpoint's; None: the newest.
    ema: the parameters, as config.eval.ema names them. workdir: the model's; '' is the evaluation's own.
    """

    config: ConfigDict
    suffix: str = ''
    variant: str = ''
    overrides: str = ''
    step: int | None = None
    ema: bool | float = True
    workdir: str = ''


def swept(config):
    """Return ('guidance_weight' or 'classifier_weight', the one that varies along a curve; its values, increasing)."""
    over = 'classifier_weight' if config.eval.classifier_weights else 'guidance_weight'
    return over, sorted(set(config.eval[f'{over}s']))


def point(config, weight):
    """Return the `Point` of a curve at a value of the weight that varies."""
    over, _ = swept(config)
    fixed = config.guidance.classifier_weight
    pair = {'guidance_weight': build_sampling.guidance_weight(config), 'classifier_weight': fixed, over: weight}
    return Point(**pair, name=f'{columns.SYMBOLS[over]}={weight:g}')


def sweep(config):
    """Return the `Point`s of a curve by increasing weight, and the name of the weight that varies."""
    over, weights = swept(config)
    return [point(config, weight) for weight in weights], over


def interval_text(config):
    """Return config.guidance.interval as text, such as 'from -3 to 2'; '' for ()."""
    interval = config.guidance.interval
    return f'from {interval[0]:g} to {interval[1]:g}' if interval else ''


def curves(config):
    """Return the `Curve`s: one for each of config.eval.variants.

    Without variants: one for every checkpoint of config.eval.steps, average of its parameters (config.eval.ema) and of
    the weak model's (config.eval.weak_ema), and interval of config.eval.intervals; or else one for every sampler of
    config.eval.samplers with every number of config.eval.num_steps.
    """
    if config.eval.variants:
        return [
            curve for name, variant in variants.read_variants(config).items() for curve in _of_variant(name, variant)
        ]
    if names_curves(config):
        return _named(config)
    configs = []
    for sampler in dict.fromkeys(config.eval.samplers or (config.sample.sampler,)):
        for num_steps in dict.fromkeys(config.eval.num_steps or (config.sample.num_steps,)):
            curve = changed(config, {'sample.sampler': sampler, 'sample.num_steps': num_steps})
            check_config(curve)
            configs.append(curve)
    several = len(config.eval.samplers) > 1 or len(config.eval.num_steps) > 1
    return [
        Curve(
            curve,
            f'_{curve.sample.sampler}{len(build_sampling.sampling_logsnrs(curve))}' if several else '',
            step=build.student_step(curve, curve.sample.num_steps),
        )
        for curve in configs
    ]


def _of_variant(name, variant):
    """Return the `Curve`s of a variant: one for each number of its config.eval.num_steps."""
    found, numbers = [], tuple(dict.fromkeys(variant.config.eval.num_steps))
    overrides = ', '.join(f'{field}={value}' for field, value in variant.changes.items())
    for number in numbers or (variant.config.sample.num_steps,):
        config = changed(variant.config, {'sample.num_steps': number, 'eval.num_steps': ()})
        suffix = f'{variants.suffix(name)}_{number}' if len(numbers) > 1 else variants.suffix(name)
        step = build.student_step(config, number) if variant.step is None else variant.step
        made_for = None if step is None else build.student_steps(config, step)
        if made_for not in (None, number):
            raise UserError(
                f"variant {name!r}: step {step} is the student of {made_for} steps and 'sample.num_steps' is {number}; "
                f"set it to {made_for}, or leave out 'step' (config.eval.variants)."
            )
        found.append(Curve(config, suffix, name, overrides, step=step, workdir=variant.workdir))
    return found


def are_named(config):
    """Return True if the curves have names of their own: variants, checkpoints or intervals."""
    return bool(config.eval.variants) or names_curves(config)


def mapped(config):
    """Return the one column that named curves differ in, 'step' or 'interval', over which FID is mapped; else ''."""
    several = _varying(config)
    return {'steps': 'step', 'intervals': 'interval'}.get(several[0], '') if len(several) == 1 else ''


def over_ema(config):
    """Return the columns of lengths over which FID is drawn: those that vary, if nothing else does; else ()."""
    several = _varying(config)
    if not several or not set(several) <= {'ema', 'weak_ema'}:
        return ()
    lengths = [sum(not isinstance(value, bool) for value in config.eval[name]) for name in several]
    return tuple(f'{name}_length' for name in several) if min(lengths) > 1 else ()


def _varying(config):
    """Return the fields of config.eval that make several named curves."""
    return [name for name in ('steps', 'ema', 'weak_ema', 'intervals') if len(config.eval[name]) > 1]


def _named(config):
    """Return the `Curve`s of config.eval.steps, ema, weak_ema and intervals: every combination."""
    evaluate, found = config.eval, []
    steps, weak = dict.fromkeys(evaluate.steps) or (None,), evaluate.weak_ema or (None,)
    intervals = dict.fromkeys(map(tuple, evaluate.intervals)) or (None,)
    for step, ema, weak_ema, interval in itertools.product(steps, evaluate.ema, weak, intervals):
        changes = {} if weak_ema is None else {'guidance.weak_ema': weak_ema}
        num_steps = None if step is None else build.student_steps(config, step)
        changes |= {} if num_steps is None else {'sample.num_steps': num_steps}
        changes |= {} if interval is None else {'guidance.interval': interval}
        curve = changed(config, changes)
        try:
            check_config(curve)
        except UserError as error:
            raise UserError(
                str(error) if interval is None else f'{error} It is one of config.eval.intervals.'
            ) from None
        words = [f'step {step}'] * (step is not None)
        words += [] if tuple(evaluate.ema) == (True,) else [_average_name(ema)]
        words += [] if weak_ema is None else [f'weak {_average_name(weak_ema)}']
        words += [] if num_steps is None else [f'{num_steps} steps']
        if interval is not None:
            words += [f'interval {interval[0]:g} to {interval[1]:g}' if interval else 'no interval']
        name = ', '.join(words)
        found.append(Curve(curve, variants.suffix(name.replace(',', '')), name, step=step, ema=ema))
    return found


def that_guide(every, newest_step):
    """Return the curves without those of config.eval.weak_ema whose weak model is the model itself.

    Guidance would change nothing. newest_step: that of the workdir. Raises UserError if no curve is left.
    """

    def guides(curve):
        settings = curve.config.guidance
        own = curve.ema, newest_step if curve.step is None else curve.step
        weak = settings.weak_ema, newest_step if settings.weak_step is None else settings.weak_step
        return own != weak or settings.weak_workdir or not settings.weak_conditional

    left = [curve for curve in every if not curve.config.eval.weak_ema or guides(curve)]
    if not left:
        raise UserError(
            f'config.eval.weak_ema is {every[0].config.eval.weak_ema!r}, the parameters of the model itself '
            '(config.eval.ema); guidance would change nothing.'
        )
    return left


def check_to_come(config, every, workdir):
    """Raise UserError unless a run that trains with this config leaves all parameters that the curves need."""
    for curve in every:
        settings = curve.config.guidance
        if not curve.workdir:
            _check_kept(config, workdir, curve.step, curve.ema, ('config.eval.steps', 'config.eval.ema'))
            if build_sampling.weak_name(curve.config) == 'checkpoint' and not settings.weak_workdir:
                fields = 'config.guidance.weak_step', 'config.eval.weak_ema, config.guidance.weak_ema'
                _check_kept(config, workdir, settings.weak_step, settings.weak_ema, fields)
        for other in filter(None, (settings.weak_workdir, settings.classifier_workdir)):
            trained.saved_config(other)


def _check_kept(config, workdir, step, ema, fields):
    """Raise UserError unless the run will have a step (None: the last) and an average of it. fields: that name them."""
    kept = build.kept_steps(config)
    if step not in (None, *kept) and not (Path(workdir) / 'checkpoints' / str(step)).exists():
        raise UserError(
            f'there will be no checkpoint of step {step} ({fields[0]}) when the run is evaluated; it keeps '
            f'{", ".join(map(str, kept))} (config.train.keep_every, config.train.keep_checkpoints).'
        )
    if isinstance(ema, bool):
        return
    step, snapshots = step or config.train.num_steps, build.snapshot_steps(config)
    if step not in snapshots:
        raise UserError(
            f'there will be no snapshot of step {step} to make an EMA of length {ema:g} of ({fields[1]}); set '
            'config.optim.ema_lengths and config.optim.ema_snapshot_every.'
        )
    phema.snapshot_weights(config.optim.ema_lengths, [each for each in snapshots if each <= step], ema, step)


def _average_name(ema):
    return ('parameters', 'EMA')[ema] if isinstance(ema, bool) else f'EMA {ema:g}'


def length(ema):
    """Return sigma_rel of an average as a column has it: None for True and False, which name none."""
    return None if isinstance(ema, bool) else ema


def check_models(every, model):
    """Raise UserError unless all parameters that the curves need are there, before the first image is drawn."""
    checked = []
    for curve in every:
        workdir, step, ema = place = _place(curve, model)
        wanted = place, {key: curve.config.guidance[key] for key in _NETWORKS}
        if wanted not in checked:
            checked.append(wanted)
            trained.check_there(curve.config, workdir or model.workdir, step=step, ema=ema)
            names = trained.saved_class_names(workdir) if workdir else model.class_names
            trained.check_same_order(model.class_names, names, workdir, 'config.eval.variants')


# fields of config.guidance that networks are read by
_NETWORKS = (
    *('function', 'classifier_workdir', 'weak'),
    *('weak_workdir', 'weak_step', 'weak_ema', 'weak_conditional'),
)


def models(every, model):
    """Yield `model`, a checkpoint's average, as each curve's `Trained`, with the networks that its guidance names.

    Parameters are read when their curve comes, so that the devices never hold those of all curves. The networks of a
    curve serve the next ones that name the same.
    """
    read, place, former = model, ('', model.step, True), model
    for curve in every:
        wanted = _place(curve, model)
        if wanted != place:
            read, place = None, wanted  # free the memory
            read = model if wanted == ('', model.step, True) else _read(curve, model)
        is_own, step = not curve.workdir, wanted[1]
        tag = [variants.suffix(curve.variant)[1:]] * (not is_own)
        tag += [f'step{step}'] * (is_own and curve.step is not None) + _tags(curve.ema)
        own = trained.with_helpers(dataclasses.replace(read, config=curve.config, tag='_'.join(tag)), former=former)
        if own.classifier or own.weak:
            former = dataclasses.replace(own, params=None)  # its networks alone
        yield own


def _read(curve, model):
    """Return the parameters of a curve as `Trained`, without the networks that guide."""
    workdir, step, ema = _place(curve, model)
    if not workdir:
        return trained.load_alone(model.config, model.workdir, step=step, ema=ema)
    return trained.load_alone(curve.config, workdir, step=step, ema=ema)


def _place(curve, model):
    """Return (workdir, '' for the model's own; step; ema) of a curve's parameters."""
    step = curve.step
    if step is None and curve.workdir:
        step = build.student_step(curve.config, curve.config.sample.num_steps)
    elif step is None:
        step = model.step  # training may have saved a newer one meanwhile
    return curve.workdir, step, curve.ema


def _tags(ema):
    if isinstance(ema, bool):
        return ['raw'] * (not ema)
    return [f'ema{ema:g}']
