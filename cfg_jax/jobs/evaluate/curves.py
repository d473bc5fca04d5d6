"""The curves of an evaluation, and the points on them."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from cfg_jax import build, build_sampling, trained
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
    ema: take the average of the parameters. workdir: the model's; '' is the evaluation's own.
    """

    config: ConfigDict
    suffix: str = ''
    variant: str = ''
    overrides: str = ''
    step: int | None = None
    ema: bool = True
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

    Without variants: one for every checkpoint of config.eval.steps, with and without its average (config.eval.ema), and
    interval of config.eval.intervals; or else one for every sampler of config.eval.samplers with every number of
    config.eval.num_steps.
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
        found.append(Curve(config, suffix, name, overrides, step=step, workdir=variant.workdir))
    return found


def are_named(config):
    """Return True if the curves have names of their own: variants, checkpoints or intervals."""
    return bool(config.eval.variants) or names_curves(config)


def mapped(config):
    """Return the one column that named curves differ in, 'step' or 'interval', over which FID is mapped; else ''."""
    sizes = {'step': len(config.eval.steps), 'interval': len(config.eval.intervals), '': len(config.eval.ema)}
    several = [name for name, size in sizes.items() if size > 1]
    return several[0] if len(several) == 1 else ''


def _named(config):
    """Return the `Curve`s of config.eval.steps, config.eval.ema and config.eval.intervals: every combination."""
    evaluate, found = config.eval, []
    for step in dict.fromkeys(evaluate.steps) or (None,):
        for ema in evaluate.ema:
            for interval in dict.fromkeys(map(tuple, evaluate.intervals)) or (None,):
                curve, words = config, [f'step {step}'] * (step is not None)
                words += [] if tuple(evaluate.ema) == (True,) else [('parameters', 'EMA')[ema]]
                if step is not None and (num_steps := build.student_steps(config, step)):
                    curve = changed(curve, {'sample.num_steps': num_steps})
                    words += [f'{num_steps} steps']
                if interval is not None:
                    curve = changed(curve, {'guidance.interval': interval})
                    try:
                        check_config(curve)
                    except UserError as error:
                        raise UserError(f'{error} It is one of config.eval.intervals.') from None
                    words += [f'interval {interval[0]:g} to {interval[1]:g}' if interval else 'no interval']
                name = ', '.join(words)
                found.append(Curve(curve, variants.suffix(name.replace(',', '')), name, step=step, ema=ema))
    return found


def models(every, model):
    """Return `model` as each curve's `Trained`, with the networks that its guidance names, such as a classifier.

    All are loaded before any image is drawn.
    """
    found, former, read = [], model, {('', model.step, True): model}
    for curve in every:
        is_own = not curve.workdir
        step = (
            model.step if is_own and curve.step is None else curve.step
        )  # training may have saved a newer one meanwhile
        place = curve.workdir, step, curve.ema
        if place not in read:
            config, workdir = (model.config, model.workdir) if is_own else (curve.config, Path(curve.workdir))
            read[place] = trained.load(config, workdir, step=step, ema=curve.ema, former=former)
            others = read[place].class_names
            trained.check_same_order(model.class_names, others, workdir, 'config.eval.variants')
        tag = [variants.suffix(curve.variant)[1:]] * (not is_own)
        tag += [f'step{step}'] * (is_own and curve.step is not None) + ['raw'] * (not curve.ema)
        drawing = dataclasses.replace(read[place], config=curve.config, tag='_'.join(tag))
        found.append(trained.with_helpers(drawing, former=former))
        if found[-1].classifier or found[-1].weak:
            former = found[-1]  # its networks serve the next curves that name the same ones
    return found
