"""The digits experiment, shrunk until a job takes seconds."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

OVERRIDES = {
    'model.channels': 8,
    'model.channel_mult': (1,),
    'model.attention_resolutions': (),
    'model.num_heads': 1,
    'model.num_groups': 4,
    'optim.learning_rate': 0.02,  # four steps have to show
    'optim.decay': 'constant',  # so that runs of any length share one compiled step
    'optim.ema_decay': 0.5,
    'optim.warmup_steps': 0,
    'train.batch_size': 16,
    'train.num_steps': 4,
    'train.log_every': 2,
    'train.checkpoint_every': 2,
    'train.grid_every': 0,
    'sample.num_steps': 3,
    'sample.num_images': 20,
    'sample.batch_size': 20,
    'eval.at_end': False,
    'eval.judge_steps': 200,
    'eval.num_samples': 40,
    'eval.allow_few_samples': True,
    'eval.guidance_weights': (0.0, 1.0),
}


def load_config(name):
    """The config of configs/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'configs' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def config(**changes):
    """The tiny config; changes are named with '__' for '.'."""
    tiny = load_config('digits')
    with tiny.unlocked():
        tiny.update_from_flattened_dict({**OVERRIDES, **{k.replace('__', '.'): v for k, v in changes.items()}})
    return tiny


def flags(**changes):
    """The same, as command-line flags of configs/digits.py."""
    every = {**OVERRIDES, **{k.replace('__', '.'): v for k, v in changes.items()}}
    return [f'--config={ROOT}/configs/digits.py', *(f'--config.{key}={value}' for key, value in every.items())]


def environment(devices=1):
    """Return the environment variables of a process with `devices` virtual devices."""
    virtual = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
    return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': virtual}


def optimised():
    """Return those of a process that computes for minutes, without the flag that shortens compiling."""
    return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}


def main(*arguments, devices=1, start=subprocess.run, **options):
    """Starts `python -m cfg_jax.main` with these arguments as a process of its own."""
    piped = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    defaults = {'cwd': ROOT, 'env': environment(devices), **piped}
    return start([sys.executable, '-m', 'cfg_jax.main', *map(str, arguments)], **{**defaults, **options})


_SERVER = """
import json, os, sys
from importlib import metadata
from cfg_jax import main, runtime

find = metadata.Distribution.from_name

def find_others(name):
    if name.replace('-', '_') == 'cfg_jax':
        raise metadata.PackageNotFoundError(name)
    return find(name)

metadata.Distribution.from_name = find_others

runtime.configure()
from sklearn import datasets
from cfg_jax.jobs import evaluate, sample, train

for line in sys.stdin:
    folder, arguments, outputs = json.loads(line)
    child = os.fork()
    if not child:
        for stream, output in enumerate([os.devnull, *outputs]):
            os.dup2(os.open(output, os.O_RDWR | os.O_CREAT), stream)
        os.chdir(folder)
        sys.argv[1:] = arguments
        main.run()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server():
    command = [sys.executable, '-c', _SERVER]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )


def forked_main(*arguments, cwd=ROOT):
    """The same as `main`, on one device, in a process that need not import anything: a copy of one that has.

    To it the package is not installed, as in a bare checkout.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ('out', 'err')]
        request = [str(cwd), list(map(str, arguments)), list(map(str, outputs))]
        print(json.dumps(request), file=_server().stdin, flush=True)
        code = int(_server().stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(output.read_text() for output in outputs))
