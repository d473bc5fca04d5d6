"""The flags of the command line, and every mistake in them as one line."""

import dataclasses
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from cfg_jax.distributed import join
from cfg_jax.errors import UserError

MODES = ('train', 'sample', 'evaluate', 'prepare', 'inspect', 'convert', 'plan')
ONE_PROCESS = ('prepare', 'inspect', 'convert', 'plan')  # several processes would do the same work several times


class _TupleParser(flags.ArgumentParser):
    """Parse a tuple as ml_collections does, whose own parser would join the tuples of a repeated flag."""

    def parse(self, argument):
        return tuple_parser.TupleParser().parse(argument)

    def flag_type(self):
        return 'tuple'


config_flags.register_flag_parser_for_type(tuple, _TupleParser())  # the last of a repeated flag wins, as for any type
_CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'The experiment: a file of configs/. --config.section.key=value overrides a field.',
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'The folder for checkpoints, logs and pictures; runs/<config name> if unset.'
)
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'The job to run.')
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    'coordinator_address', None, 'In a job of several processes: host:port of process 0.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'In a job of several processes: their number.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, "In a job of several processes: this one's number, from 0.")
_JOIN_SECONDS = flags.DEFINE_integer(
    'join_seconds',
    join.JOIN_SECONDS,
    'In a job of several processes: seconds to wait at the start for the other processes.',
    lower_bound=1,
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The parsed command line. joining: keyword arguments of `join.join`."""

    config: ConfigDict
    mode: str
    workdir: Path
    joining: dict


def parse(argv):
    """Parse the flags, as `app.run` wants it; any mistake in them, or in a field of the config, is a UserError."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.to_dict()  # a file that cannot be loaded says so only on access
        if flags.FLAGS['verbosity'].using_default_value:
            flags.FLAGS.verbosity = logging.ERROR  # Orbax logs every file, and warns of what we ask for
        return rest
    except (AttributeError, KeyError) as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]  # the KeyError within has a text without quotes
        raise UserError(f'unknown config field {" ".join(str(error.args[0]).split())}') from None
    except (flags.Error, ValueError, TypeError, OSError) as error:
        raise UserError(' '.join(str(error).split())) from error


def arguments(argv):
    """Return the `Arguments` of the parsed flags. argv: the arguments that were not flags, the program first."""
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; flags start with --.')
    if _CONFIG.value is None:
        raise UserError('no config; give one of configs/, such as --config=configs/digits.py.')
    name = Path(config_flags.get_config_filename(flags.FLAGS['config']).split(':')[0]).stem
    joining = {
        'coordinator_address': _COORDINATOR_ADDRESS.value,
        'num_processes': _NUM_PROCESSES.value,
        'process_id': _PROCESS_ID.value,
        'join_seconds': _JOIN_SECONDS.value,
        'for_one': f'--mode={_MODE.value}' if _MODE.value in ONE_PROCESS else '',
    }
    workdir = Path(_WORKDIR.value or Path('runs') / name).expanduser()
    return Arguments(_CONFIG.value, _MODE.value, workdir, joining)
