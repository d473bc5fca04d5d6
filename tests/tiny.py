"""The digits experiment, shrunk until a job takes seconds."""

import functools
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
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
    'train.keep_every': 0,
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
import json, os, socket, sys, time
from importlib import metadata
from pathlib import Path
from cfg_jax import main, runtime

find = metadata.Distribution.from_name

def find_others(name):
    if name.replace('-', '_') == 'cfg_jax':
        raise metadata.PackageNotFoundError(name)
    return find(name)

metadata.Distribution.from_name = find_others

runtime.configure()
import grain, matplotlib.backends.backend_agg, matplotlib.backends.backend_svg, matplotlib.figure, tensorboardX
from sklearn import datasets
from cfg_jax.evaluation.judges import trained
from cfg_jax.jobs import evaluate, sample, train
from cfg_jax.jobs.evaluate import means

means._ROWS, means._NOISES = 2, 8  # of ten classes: a whole picture, of 80 axes, takes seconds

requests = socket.socket(fileno=os.dup(0))
watchers = 0
while True:
    message, files, *_ = socket.recv_fds(requests, 2**17, 3)
    if not message:
        break
    if os.fork():
        for file in files:
            os.close(file)
        watchers += 1
        while watchers and os.waitpid(-1, os.WNOHANG)[0]:
            watchers -= 1
        continue
    # A process that waits for the program.
    out, err, ended = files
    program = os.fork()
    if program:
        os.close(out)
        os.close(err)
        os.write(ended, b'%d ' % program)
        os.write(ended, b'%d' % os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]))
        os._exit(0)
    request = json.loads(message)
    if request['new_session']:
        os.setsid()
    for stream, output in enumerate([os.open(os.devnull, os.O_RDONLY), out, err]):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = open(1, 'w'), open(2, 'w', buffering=1)
    os.close(ended)
    requests.close()
    os.environ.clear()
    os.environ.update(request['env'])
    os.chdir(request['cwd'])
    sys.argv[1:] = request['arguments']
    exec(request['patch'])
    main.run()
"""


@functools.cache
def _server():
    """Return the socket of a process that has imported everything and forks at each request."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        quiet = subprocess.DEVNULL
        subprocess.Popen([sys.executable, '-c', _SERVER], stdin=theirs, stdout=quiet, cwd=ROOT, env=environment())
    return ours


class Forked:
    """A program that `forked` started: what a `subprocess.Popen` with pipes and text can do, as far as tests need."""

    def __init__(self, arguments, **request):
        self.args, self.returncode = arguments, None
        self._errors, self._ended = tempfile.TemporaryFile(), os.pipe()  # noqa: SIM115
        reads, writes = os.pipe()
        files = [writes, self._errors.fileno(), self._ended[1]]
        request['arguments'] = list(map(str, arguments))
        socket.send_fds(_server(), [json.dumps(request).encode()], files)
        os.close(writes)
        os.close(self._ended[1])
        self.stdout = open(reads)  # noqa: SIM115
        self.pid = int(self._read_word())

    def _read_word(self):
        """Read the watcher's next word: the process id, later the exit status."""
        word = b''
        while (byte := os.read(self._ended[0], 1)).isalnum() or byte == b'-':
            word += byte
        return word

    def poll(self):
        if self.returncode is None and select.select([self._ended[0]], [], [], 0)[0]:
            self.returncode = int(self._read_word())
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None and not select.select([self._ended[0]], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout=None):
        """Return all of (stdout, stderr) once it has ended, as Popen does; stderr again at another call."""
        read = []
        reader = threading.Thread(target=lambda: read.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        self.wait(timeout)
        reader.join()
        self._errors.seek(0)
        return read[0], self._errors.read().decode()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def forked(*arguments, devices=1, cwd=ROOT, env=None, patch='', start_new_session=False):
    """Start the same as `main` as a copy of a process that has imported everything, which takes three seconds.

    To it the package is not installed, as in a bare checkout. patch: code to run first.
    """
    env = env or environment(devices)
    return Forked(arguments, env=env, cwd=str(cwd), patch=patch, new_session=start_new_session)


def forked_main(*arguments, **options):
    """Run `forked` to its end: a `subprocess.CompletedProcess`."""
    process = forked(*arguments, **options)
    output = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, *output)
