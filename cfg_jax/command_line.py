"""The flags of the command line, and every mistake in them as one line."""

import dataclasses
import re
import sys
import traceback
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from cfg_jax import config_files
from cfg_jax.distributed import join
from cfg_jax.errors import UserError
from cfg_jax.training import meta

MODES = {
    'train': 'train up to config.train.num_steps, from the newest checkpoint if there is one (the default)',
    'sample': 'draw config.sample.num_images images of config.sample.labels: a PNG grid and an .npz',
    'evaluate': 'draw images at each of config.eval.guidance_weights and judge them: tables, curves, report.html',
    'prepare': 'make a data set of config.prepare.path: a folder or zip file of images, or an archive',
    'inspect': 'show the data set in pictures and numbers, and how fast it is read',
    'convert': 'read weights from config.convert.path (.pt, .safetensors), or write them to config.convert.to',
    'plan': 'estimate the memory, the time and the cost of training, without training',
    'laboratory': "study guidance on mixtures of Gaussians (the default for config.data.source='mixture')",
}
# several processes would do the same work several times
ONE_PROCESS = ('prepare', 'inspect', 'convert', 'plan', 'laboratory')
_FIELDS = Path(__file__).with_name('config.py')  # also the config file of a workdir's saved config
_HELP = """\
usage: python -m cfg_jax.main --config=FILE [--mode=MODE] [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

--mode is one of
{modes}

Examples:
  python -m cfg_jax.main --config=configs/digits.py
      train on small digits, sample and evaluate: everything in a few minutes, on a laptop
  python -m cfg_jax.main --workdir=runs/digits --mode=sample --config.sample.labels=3,8 \\
      --config.sample.guidance_weight=1 --config.sample.num_images=32
      draw 3s and 8s; without --config, the one is used that the workdir was trained with
  python -m cfg_jax.main --workdir=runs/digits --mode=evaluate --config.sample.sampler=ddim --config.eval.folder=ddim
      another curve of guidance weights, beside the first
  python -m cfg_jax.main --config=configs/folder.py --mode=inspect --config.data.data_dir=DIR \\
      --config.data.num_classes=N
      look at your own images; without --mode, train on them
  python -m cfg_jax.main --config=configs/imagenet64.py --mode=plan --config.plan.topology=v5e:4x4
      what a large experiment would need

--config is one of {configs}, or your own file.
Every field is explained in {fields}; --config.SECTION.KEY=VALUE changes one.
Results go to --workdir (runs/NAME for NAME.py if unset; runs/folder_IMAGES for the folder IMAGES): checkpoints, logs,
images, tables, report.html.
The same command again resumes what was stopped. Several processes can make one job: {join}; see docs/machines.md.
"""
_argv = []  # the arguments that ml_collections looks for overrides in


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
    sys_argv=_argv,
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'The folder for checkpoints, logs and pictures; runs/<config name> if unset, and with the name of an image folder.',
)
_MODE = flags.DEFINE_enum(
    'mode', None, list(MODES), "The job to run; train if unset, laboratory for config.data.source='mixture'."
)
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
    """Parse the flags, as `app.run` wants it; any mistake in them, or in a field of the config, is a UserError.

    Prints the help and exits if it is asked for.
    """
    if any(re.fullmatch('--?(h|help|helpshort|helpfull)', word) for word in argv[1:]):
        print(help_text(), end='')
        sys.exit(0)
    _argv[:] = _with_one_config(argv)
    try:
        rest = flags.FLAGS(_argv)
        if _CONFIG.value is not None:
            _CONFIG.value.to_dict()  # a file that cannot be loaded says so only on access
        if flags.FLAGS['verbosity'].using_default_value:
            flags.FLAGS.verbosity = logging.ERROR  # Orbax logs every file, and warns of what we ask for
        return rest
    except UserError:
        raise
    except Exception as error:
        _raise_if_in_config(error)
        if isinstance(error, (AttributeError, KeyError)):
            while error.args and isinstance(error.args[0], Exception):
                error = error.args[0]  # the KeyError within has a text without quotes
            raise UserError(f'unknown config field {" ".join(str(error.args[0]).split())}') from None
        if isinstance(error, (flags.Error, ValueError, TypeError, OSError)):
            raise UserError(' '.join(str(error).split())) from error
        raise


def arguments(argv):
    """Return the `Arguments` of the parsed flags. argv: the arguments that were not flags, the program first."""
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; flags start with --.')
    if _CONFIG.value is None:
        raise _no_config(_argv)
    name = Path(_config_path(config_flags.get_config_filename(flags.FLAGS['config']))).stem
    config = _CONFIG.value
    mode = _mode(config)
    joining = {
        'coordinator_address': _COORDINATOR_ADDRESS.value,
        'num_processes': _NUM_PROCESSES.value,
        'process_id': _PROCESS_ID.value,
        'join_seconds': _JOIN_SECONDS.value,
        'for_one': f'--mode={mode}' if mode in ONE_PROCESS else '',
    }
    config_files.expand_paths(config)
    if config.data.source == 'folder' and config.data.data_dir:
        name += f'_{Path(config.data.data_dir).absolute().stem}'  # one config serves any folder of images
    workdir = Path(config_files.expanded(_WORKDIR.value or str(Path('runs') / name), '--workdir'))
    return Arguments(config, mode, workdir, joining)


def _mode(config):
    """Return the job to run, by --mode or by the data; UserError if the two do not go together."""
    exact = config.data.source == 'mixture'
    mode = _MODE.value or ('laboratory' if exact else 'train')
    if exact != (mode == 'laboratory'):
        allowed = "'laboratory'" if exact else 'another one, or --config=configs/mixture2d.py'
        raise UserError(f'--mode={mode} does not go with config.data.source={config.data.source!r}; use {allowed}.')
    return mode


def help_text():
    """Return the text of --help."""
    width = max(map(len, MODES))
    return _HELP.format(
        modes='\n'.join(f'  {mode:{width}}  {text}' for mode, text in MODES.items()),
        configs=', '.join(config_files.names(config_files.FOLDER)) or 'the files of configs/',
        fields=config_files.shortest(_FIELDS),
        join='--coordinator_address, --num_processes, --process_id, --join_seconds',
    )


def _with_one_config(argv):
    """Return the arguments with one --config before all others: the last one given, or else the workdir's own."""
    named, rest = _split_off(argv, 'config')
    workdirs, _ = _split_off(argv, 'workdir')
    if named:
        path = _config_path(named[-1])
        if not Path(path).is_file():
            raise UserError(f'there is no config file {path!r}; {config_files.existing(path)} (--config).')
        return [argv[0], f'--config={path}{named[-1][named[-1].find(":") :] if ":" in named[-1] else ""}', *rest[1:]]
    if workdirs and meta.newest_config(config_files.expanded(workdirs[-1], '--workdir')) is not None:
        return [argv[0], f'--config={_FIELDS}:{config_files.expanded(workdirs[-1], "--workdir")}', *rest[1:]]
    if any(re.match(r'--?config\.', word) for word in argv[1:]):
        raise _no_config(argv)  # to absl these are unknown flags
    return argv


def _no_config(argv):
    """Return the UserError that no config was given, by a file or by a workdir."""
    workdirs, _ = _split_off(argv, 'workdir')
    there = f'; there is no checkpoint in {workdirs[-1]}' if workdirs else ''
    return UserError(
        f'no config{there}; give one of configs/, such as --config=configs/digits.py, or a --workdir with checkpoints.'
    )


def _split_off(argv, name):
    """Return (the values of --NAME=value and --NAME value, the other arguments)."""
    values, others, words = [], [], iter(argv)
    for word in words:
        if word == '--':
            return values, [*others, word, *words]
        found = re.fullmatch(f'--?{name}(=(.*))?', word, re.DOTALL)
        value = found and (found[2] if found[1] else next(words, None))
        if value is None:
            others.append(word)
        else:
            values.append(value)
    return values, others


def _config_path(value):
    """Return the file in the value of --config, which may end in ':' and an argument of its get_config."""
    return config_files.expanded(value.split(':', 1)[0], '--config')


def _raise_if_in_config(error):
    """Raise the UserError of an error that the config file itself has made, with its line."""
    named, _ = _split_off(_argv, 'config')
    path, chain = named and _config_path(named[-1]), []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for cause in reversed(chain):
        lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == path]
        if isinstance(cause, SyntaxError) and cause.filename == path:
            lines = [cause.lineno]
        if lines:
            text = ' '.join(str(cause).split())
            raise UserError(f'{path}, line {lines[-1]}: {type(cause).__name__}: {text} (--config).') from None
