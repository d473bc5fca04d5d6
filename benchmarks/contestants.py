"""The commands of the contestants, and the options that the benchmarks share.

ours                          this checkout, by the Python that runs the benchmark
before                        the checkout in --before=FOLDER, by the same Python
guided_diffusion, diffusers   the same in PyTorch (peers.py), by --torch_python
.../channels_last, .../compile   with that memory format, and under torch.compile
"""

import argparse
import itertools
import sys
from pathlib import Path

import contest
from shapes import SHAPES

HERE = Path(__file__).parent
NO_PEERS = 'no --torch_python: the PyTorch peers are left out'


def parser(description, *, rounds, models=()):
    """Return the parser of a benchmark's options. rounds, models: its defaults; without models, it has no peers."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument('--rounds', type=int, default=rounds, help=f'rounds of the contest (default: {rounds})')
    made.add_argument('--before', metavar='FOLDER', help='another checkout of this project, measured as `before`')
    made.add_argument(
        '--results',
        default=contest.RESULTS,
        metavar='FILE',
        help=f'append a line of JSON here (default: {contest.RESULTS})',
    )
    if models:
        default = ','.join(models)
        made.add_argument('--models', default=default, help=f'networks of shapes.py (default: {default})')
        made.add_argument(
            '--torch_python', metavar='PYTHON', help='of an environment with torch, and perhaps diffusers'
        )
        made.add_argument('--guided_diffusion', metavar='FOLDER', help="OpenAI's repository, to measure its network")
        made.add_argument('--only', default='', metavar='NAMES', help='measure these contestants alone, with commas')
    return made


def parse(made, arguments=None):
    """Return the parsed options, `models` as a list. A mistake ends the program with a line that says what is wrong."""
    options = made.parse_args(arguments)
    if options.rounds < 1:
        made.error(f'--rounds={options.rounds}: it must be 1 or more')
    if options.before and not (Path(options.before) / 'cfg_jax').is_dir():
        made.error(f'--before={options.before}: there is no folder cfg_jax in it')
    if not hasattr(options, 'models'):
        return options
    options.models = options.models.split(',')
    for model in options.models:
        if model not in SHAPES:
            made.error(f'--models={model}: no such network; allowed: {", ".join(SHAPES)}')
    if options.guided_diffusion and not (Path(options.guided_diffusion) / 'guided_diffusion').is_dir():
        made.error(f'--guided_diffusion={options.guided_diffusion}: there is no folder guided_diffusion in it')
    if not options.torch_python:
        print(NO_PEERS, file=sys.stderr, flush=True)
    return options


def checkout(folder):
    """Return the start of a command that imports cfg_jax from a checkout, an absolute path, and computes on the CPU."""
    return ['env', f'PYTHONPATH={folder}', 'JAX_PLATFORMS=cpu', sys.executable]


def checkouts(options):
    """Return {'ours': this checkout} and, where it is given, 'before', the folders' absolute paths."""
    folders = {'ours': contest.ROOT} | ({'before': Path(options.before)} if options.before else {})
    return {name: folder.absolute() for name, folder in folders.items()}


def own(options, *arguments):
    """Return the commands of ours and, where it is given, the checkout before."""
    return {name: [*checkout(folder), HERE / 'ours.py', *arguments] for name, folder in checkouts(options).items()}


def peers(options, *arguments, variants):
    """Return the commands of the peers, each network with each of `variants`, tuples of flags of peers.py."""
    if not options.torch_python:
        return {}
    networks = {'diffusers': []}
    if options.guided_diffusion:
        networks = {'guided_diffusion': [f'--path={Path(options.guided_diffusion).absolute()}'], **networks}
    return {
        '/'.join([network, *variant]): [
            options.torch_python, HERE / 'peers.py', network, *arguments, *given, *(f'--{flag}' for flag in variant)
        ]
        for (network, given), variant in itertools.product(networks.items(), variants)
    }  # fmt: skip


def chosen(options, commands):
    """Return the commands that --only names, or all."""
    names = options.only.split(',') if options.only else commands
    return {name: command for name, command in commands.items() if name in names}


def contenders(options, *arguments, alone=()):
    """Return the commands of all that can serve a task: our own, and the peers in both memory formats.

    alone: flags that our own know and the peers do not, which are then left out.
    """
    found = own(options, *arguments, *alone)
    if not alone:
        variants = [(), ('channels_last',)]
        if options.compile:
            variants += [('compile',), ('channels_last', 'compile')]
        found |= peers(options, *arguments, variants=variants)
    return chosen(options, found)
