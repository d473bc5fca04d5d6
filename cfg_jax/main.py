"""The command line: python -m cfg_jax.main --config=configs/digits.py [--mode=...] [--config.section.key=value]."""

import importlib
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cfg_jax import runtime
from cfg_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'The experiment, a file of configs/; --config.section.key=value overrides a field.',
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints, logs and pictures go; runs/<config name> if unset.')
_MODES = ('train', 'sample', 'evaluate', 'prepare', 'inspect', 'convert', 'plan')
_MODE = flags.DEFINE_enum('mode', 'train', _MODES, 'The job.')

_MODULES = {'convert': 'exchange', 'inspect': 'inspection'}  # modes whose job's module has another name


def main(argv):
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; flags start with --.')
    if _CONFIG.value is None:
        raise UserError('no config; give one of configs/, such as --config=configs/digits.py.')
    name = Path(config_flags.get_config_filename(flags.FLAGS['config']).split(':')[0]).stem
    workdir = Path(_WORKDIR.value or Path('runs') / name).expanduser()
    config, mode = _CONFIG.value, _MODE.value
    # Jobs are imported once the XLA flags stand.
    runtime.configure()
    jobs = [mode, 'sample', 'evaluate'] if mode == 'train' and config.eval.at_end else [mode]
    try:
        for job in jobs:
            importlib.import_module(f'cfg_jax.{_MODULES.get(job, job)}').run(config, workdir)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise UserError(f'{workdir} cannot be written: {error.strerror}: {error.filename} (--workdir).') from error


def _parse_flags(argv):
    """Parses the flags; whatever is wrong with them, or with a field of the config, becomes a UserError."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.to_dict()  # a file that does not load says so only when it is asked for something
        if flags.FLAGS['verbosity'].using_default_value:
            flags.FLAGS.verbosity = logging.ERROR  # Orbax tells of every file, and warns of what is asked for
        return rest
    except (AttributeError, KeyError) as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]  # the KeyError within, whose text has no quotes of its own
        raise UserError(f'unknown config field {" ".join(str(error.args[0]).split())}') from None
    except (flags.Error, ValueError, TypeError, OSError) as error:
        raise UserError(' '.join(str(error).split())) from error


def run():
    """Runs the program and exits: 0, or 2 after one line on stderr for what the user can mend."""
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print('stopped; the same command goes on from the last that was saved', file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == '__main__':
    run()
