"""Config files, and the paths within a config: the same for the command line and for Python."""

import difflib
import os
import runpy
from pathlib import Path

from cfg_jax.config import changed
from cfg_jax.errors import UserError, first_line

PATHS = (  # the fields of a config that are files or folders
    'data.data_dir',
    'guidance.classifier_workdir',
    'guidance.weak_workdir',
    'distill.teacher',
    'eval.inception_weights',
    'eval.dinov2_weights',
    'eval.samples',
    'eval.reference',
    'eval.held_out',  # or a split
    'eval.variants',
    'prepare.path',
    'convert.path',
    'convert.to',
)
FOLDER = Path(__file__).parent.with_name('configs')  # beside the package in a checkout


def read(path, changes=None):
    """Return the `ConfigDict` of a config file, locked. changes: {'section.key': value}, in place of its own values.

    path: a file, or the name of one of configs/, such as 'digits'. Raises UserError for anything that is wrong.
    """
    path = Path(expanded(str(path), 'config'))
    if not path.suffix and not path.exists():
        path = next((f for f in (Path('configs') / f'{path}.py', FOLDER / f'{path}.py') if f.is_file()), path)
    if not path.is_file():
        raise UserError(f"there is no config file '{path}'; {existing(path)}.")
    try:
        config = runpy.run_path(str(path))['get_config']()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{path}: {type(error).__name__}: {first_line(error)}.') from error
    return with_changes(config, changes or {})


def with_changes(config, changes):
    """Return a locked copy of the config with {'section.key': value} in it, and ~ in its paths replaced.

    Raises UserError for a field that does not exist and for a value of another type.
    """
    known = [name for name, _ in _fields(config.to_dict())]
    for name, value in changes.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise UserError(f'unknown config field {name!r}; the nearest are {", ".join(nearest)}.')
        try:
            config = changed(config, {name: value})
        except (TypeError, ValueError) as error:
            raise UserError(f'config.{name} cannot be {value!r}: {first_line(error)}.') from None
    copy = changed(config, {})
    expand_paths(copy)
    return copy.lock()


def _fields(values, prefix=''):
    """Yield ('section.key', value) of every field in a nested dict."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


def expand_paths(config):
    """Replace a leading ~ in all paths of a config."""
    for field in PATHS:
        section, key = field.split('.')
        config[section][key] = expanded(config[section][key], f'config.{field}')


def expanded(path, field):
    """Return a path with its leading ~ or ~user replaced by the home folder; UserError if that is not known."""
    if not path or not path.startswith('~'):
        return path
    found = os.path.expanduser(path)
    if found == path:
        raise UserError(
            f'{field} is {path!r}, but the home folder of {path.split("/")[0]!r} is not known; write it out.'
        )
    return found


def existing(path):
    """Return a phrase with the config files that exist, those with names nearest to that of `path` first."""
    stem = Path(path).stem
    for folder in (Path(path).parent, Path('configs'), FOLDER):
        if found := names(folder):
            nearest = sorted(found, key=lambda name: -difflib.SequenceMatcher(None, stem, Path(name).stem).ratio())
            return f'there are {", ".join(nearest[:30])}'
    return 'give one of configs/, such as --config=configs/digits.py'


def names(folder):
    """Return the config files in a folder, as text, in the order of names."""
    with_function = (
        path for path in sorted(folder.glob('*.py')) if 'def get_config' in path.read_text(errors='replace')
    )
    return [shortest(path) for path in with_function]


def shortest(path):
    """Return the path as text, relative to the current folder if it is inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
