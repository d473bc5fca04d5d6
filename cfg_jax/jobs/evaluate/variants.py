"""The variants of an evaluation: a Python file that says by name what each changes in the config."""

import difflib
import runpy
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from cfg_jax import build, config_files, trained
from cfg_jax import config as fields
from cfg_jax.checks import check_config
from cfg_jax.config import changed
from cfg_jax.errors import UserError, first_line, printable

_MAY_VARY = ('guidance.', 'sample.', 'eval.guidance_weights', 'eval.classifier_weights', 'eval.num_steps')
_FIXED = ('sample.seed', 'sample.labels', 'sample.num_images')  # every variant draws the same images
_ALLOWED = (
    'fields of config.guidance and of config.sample (not seed, labels, num_images), eval.guidance_weights, '
    "eval.classifier_weights, eval.num_steps, and 'workdir' and 'step' of another model"
)
_MODEL = ('workdir', 'step')  # what says which model a variant draws with; all others are fields of the config
_LONGEST = 80  # bytes of a name, which becomes a part of file names
_FIELD = '(config.eval.variants)'
_ALONE = {  # fields that make curves or rows of their own, with the values at which they do not
    'steps': (),
    'ema': (True,),
    'weak_ema': (),
    'intervals': (),
    'samplers': (),
    'num_steps': (),
    'samples': '',
    'compare_with': '',
    'bits_per_dim': False,
}


class Variant(NamedTuple):
    """The model of a variant of an evaluation, and how it draws.

    changes: {'section.key': value} as in the file. workdir: of its model; '' is the evaluation's own. step: that of its
    checkpoint; None is the newest.
    """

    config: ConfigDict
    changes: dict
    workdir: str = ''
    step: int | None = None


def read_variants(config):
    """Return {name: `Variant`} of the file config.eval.variants, every config checked.

    Raises UserError for the first thing that is wrong.
    """
    path = config.eval.variants
    for key, unset in _ALONE.items():
        if config.eval[key] != unset:
            raise UserError(
                f'config.eval.variants and config.eval.{key} ({config.eval[key]!r}) are both set; leave '
                f"config.eval.{key} at {unset!r} (a variant's own changes say it) or config.eval.variants at ''."
            )
    return {name: _with(config, name, changes) for name, changes in _load(path).items()}


def _load(path):
    """Return VARIANTS of a file, its names and the form of its values checked."""
    shown = printable(str(path))
    if not Path(path).is_file():
        raise UserError(f'there is no file {shown}; give one such as configs/variants/guidance.py {_FIELD}.')
    try:
        found = runpy.run_path(str(path))
    except Exception as error:
        where = f', line {error.lineno}' if isinstance(error, SyntaxError) else ''
        raise UserError(f'{shown}{where}: {type(error).__name__}: {first_line(error)} {_FIELD}.') from error
    variants = found.get('VARIANTS')
    if not isinstance(variants, dict):
        kind = f'is a {type(variants).__name__}' if 'VARIANTS' in found else 'is missing'
        raise UserError(f"{shown}: VARIANTS {kind}; it must be a dict {{name: {{'section.key': value}}}} {_FIELD}.")
    if not variants:
        raise UserError(f'{shown}: VARIANTS is empty; give at least one variant, such as {{"plain": {{}}}} {_FIELD}.')
    taken = {}
    for name, changes in variants.items():
        _check_name(name)
        other = taken.setdefault(suffix(name).casefold(), name)
        if other != name:  # some file systems would hold one of the two
            raise UserError(f'the variants {other!r} and {name!r} would have the same file names; rename one {_FIELD}.')
        if not isinstance(changes, dict):
            raise UserError(
                f"variant {name!r} is {changes!r}; it must be a dict {{'section.key': value}}, {{}} for the config as "
                f'it is {_FIELD}.'
            )
    return variants


def suffix(name):
    """Return the part of file names that a variant's name makes: '_ddim_32' of 'ddim 32'."""
    return f'_{name.replace(" ", "_")}'


def _check_name(name):
    """Raise UserError unless a variant's name is text that can be a part of a file's name."""
    fits = isinstance(name, str) and name.isprintable() and 0 < len(name.encode(errors='replace')) <= _LONGEST
    if not fits or name != name.strip() or set(name) & set('/\\'):
        raise UserError(
            f'the name of a variant is {name!r}; it must be a text of up to {_LONGEST} bytes that can be a part of a '
            f'file name, without / and \\ and without spaces at its ends {_FIELD}.'
        )


def _with(config, name, changes):
    """Return a `Variant`, its config checked; errors name the variant."""
    own = {field: value for field, value in changes.items() if field not in _MODEL}
    for field, value in own.items():
        _check_field(name, field)
        _check_value(name, field, value)
    workdir, step = changes.get('workdir', ''), changes.get('step')
    if not isinstance(workdir, str) or not (step is None or type(step) is int):
        raise UserError(
            f"variant {name!r}: 'workdir' is {workdir!r} and 'step' {step!r}; they must be a text and a whole number "
            f'{_FIELD}.'
        )
    try:
        workdir = config_files.expanded(workdir, "'workdir'")
        base = of_workdir(config, workdir) if workdir else config
        varied = changed(base, {**own, 'eval.variants': ''})
        check_config(varied)
        _check_steps(varied)
    except UserError as error:
        raise UserError(f'variant {name!r}: {error}') from None
    except (TypeError, ValueError) as error:  # a tuple of texts where numbers must be, say
        given = ', '.join(f'{field}={value!r}' for field, value in changes.items())
        raise UserError(f'variant {name!r} ({given}): {first_line(error)} {_FIELD}.') from None
    return Variant(varied, changes, workdir, step)


def of_workdir(config, workdir):
    """Return the config of the model in another workdir, but with the evaluation's config.eval and config.sample."""
    copy = changed(trained.saved_unet(workdir, config, 'model', _FIELD), {})
    with copy.unlocked():
        for section in ('eval', 'sample'):
            copy[section] = changed(config, {})[section]
    return copy


def _check_steps(config):
    """Raise UserError unless several numbers of steps come with one weight: a curve is drawn over one of the two."""
    evaluate = config.eval
    weights = evaluate.classifier_weights or evaluate.guidance_weights
    if len(set(evaluate.num_steps)) > 1 and len(set(weights)) > 1:
        raise UserError(
            f'config.eval.num_steps is {tuple(evaluate.num_steps)!r}, so there must be one weight '
            '(config.eval.guidance_weights, config.eval.classifier_weights).'
        )
    for num_steps in evaluate.num_steps:
        check_config(changed(config, {'sample.num_steps': num_steps, 'eval.num_steps': ()}))
        build.student_step(config, num_steps)


def _check_field(name, field):
    """Raise UserError unless a variant may change this field."""
    plain = fields.default().to_dict()
    known = [f'{part}.{key}' for part, section in plain.items() if isinstance(section, dict) for key in section]
    if field not in known:
        near = difflib.get_close_matches(str(field), [each for each in known if _may_vary(each)], n=1, cutoff=0.0)
        raise UserError(f'variant {name!r}: unknown config field {field!r}; did you mean {near[0]!r}? {_FIELD}')
    if not _may_vary(field):
        raise UserError(f'variant {name!r}: config.{field} may not vary; allowed: {_ALLOWED} {_FIELD}.')


def _may_vary(field):
    return field.startswith(_MAY_VARY) and field not in _FIXED


def _check_value(name, field, value):
    """Raise UserError unless the value is of the field's type."""
    section, key = field.split('.')
    default = fields.default()[section]
    wanted = default.get_type(key)
    kinds = {float: (int, float), tuple: (tuple, list)}.get(wanted, (wanted,))
    fits = isinstance(value, kinds) and (wanted is object or isinstance(value, bool) == (wanted is bool))
    if not fits and not (value is None and default[key] is None):
        kind = {float: 'a number', int: 'a whole number', str: 'a text', tuple: 'a tuple', bool: 'True or False'}
        raise UserError(
            f'variant {name!r}: config.{field} is {value!r}; it must be {kind.get(wanted, wanted.__name__)} {_FIELD}.'
        )
