"""The command line: python -m cfg_jax.main --config=configs/digits.py [--mode=...] [--config.section.key=value]."""

import errno
import importlib
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cfg_jax import runtime
from cfg_jax.distributed import join
from cfg_jax.distributed.job import INTERRUPTED, PREEMPTED, USER_ERROR, Preempted, the_job
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

_COORDINATOR_ADDRESS = flags.DEFINE_string('coordinator_address', None, 'Of several processes: host:port of the first.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes the job has.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this one is, from 0.')
_JOIN_SECONDS = flags.DEFINE_integer('join_seconds', join.JOIN_SECONDS, 'How long to wait for them.', lower_bound=1)

_ONE_PROCESS = ('prepare', 'inspect', 'convert', 'plan')  # modes that several processes would do several times
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    joined = join.join(
        coordinator_address=_COORDINATOR_ADDRESS.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        join_seconds=_JOIN_SECONDS.value,
        for_one=f'--mode={mode}' if mode in _ONE_PROCESS else '',
    )
    if joined:
        the_job.joined()
    jobs = [mode, 'sample', 'evaluate'] if mode == 'train' and config.eval.at_end else [mode]
    try:
        if joined:
            from cfg_jax.distributed import processes  # behind the flags, as the jobs

            if mode == 'train' and processes.is_first():
                workdir.mkdir(parents=True, exist_ok=True)
            processes.check_shared(workdir)
        for job in jobs:
            importlib.import_module(f'cfg_jax.jobs.{job}').run(config, workdir)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        place = Path(error.filename or '/').absolute()
        if workdir.absolute() not in (place, *place.parents) and place not in workdir.absolute().parents:
            raise
        raise UserError(f'{workdir} cannot be written: {error.strerror}: {error.filename} (--workdir).') from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f'{workdir} cannot be written: {error.strerror} (--workdir).') from error
    the_job.finish()


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
    """Runs the program and exits, in a job of several processes all of them with the same status.

    0: done. 2: one line on stderr says what the user can mend. 75: stopped by SIGTERM, the same command goes on. 130:
    stopped by Ctrl-C. Anything else: a crash, of which another start may know nothing.
    """
    the_job.watch()
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        the_job.end(USER_ERROR, f'error: {error}')
    except Preempted as stopped:
        the_job.end(PREEMPTED, str(stopped))
    except KeyboardInterrupt:
        the_job.end(INTERRUPTED, 'stopped; the same command goes on from the last that was saved')
    except Exception as error:
        the_job.crash(error)


if __name__ == '__main__':
    run()
