import os
import re
import subprocess
import sys

import pytest

from cfg_jax import runtime
from tests import tiny


@pytest.mark.parametrize(
    ('version', 'known'),
    [
        *((version, True) for version in ('0.10.2', '0.11.0', '0.11.2', '0.12.0', '0.12.0.1')),
        *((version, False) for version in ('0.9.2', '0.10.1', '0.12.0.2', '0.12.1', '0.13.0', '1.0')),
    ],
)
def test_only_tried_releases_get_the_flag(version, known):
    assert runtime.knows_cpu_reductions(version) == known


def in_process(code, **environment):
    """Run a script with these variables, None to unset one, and return what has ended."""
    both = {**os.environ, **environment}
    both = {name: value for name, value in both.items() if value is not None}
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tiny.ROOT, env=both)


COMPUTE = """
import os
from cfg_jax import runtime
runtime.configure()
import jax
assert jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8))) == 512
print(os.environ.get('XLA_FLAGS', ''))
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize('given', ['', '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT'])
def test_xla_accepts_the_flag(given, tmp_path):
    """XLA aborts on a flag that it does not know; this jaxlib computes. What the user has set stays."""
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': given, 'HOME': str(tmp_path)}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    done = subprocess.run(
        [sys.executable, '-c', COMPUTE], capture_output=True, text=True, cwd=tiny.ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    flags, cache = done.stdout.splitlines()
    assert flags == (given or '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE')
    assert cache == f'{tmp_path}/.cache/cfg_jax'


DEVICES = """
import jax
from cfg_jax import runtime
from cfg_jax.errors import UserError
try:
    with runtime.devices_errors():
        jax.devices()
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize('platforms', ['cuda', 'gpu', 'tpu', 'foo', 'cpu,foo'])
def test_devices_that_are_not_there_are_one_line(platforms):
    found = in_process(DEVICES, JAX_PLATFORMS=platforms)
    if found.stdout == '' and found.returncode == 0:
        pytest.skip(f'this machine has {platforms}')
    assert found.returncode == 0, found.stderr
    line = rf'JAX does not find the devices of JAX_PLATFORMS={platforms}( \(.+\))?; install .*JAX_PLATFORMS=cpu\.\n'
    assert re.fullmatch(line, found.stdout)


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError('Unable to initialize'), AssertionError()):
        with pytest.raises(type(error)), runtime.devices_errors():
            raise error


NOBODY = """
import pwd

def unknown(number):
    raise KeyError(f'getpwuid(): uid not found: {number}')

pwd.getpwuid = unknown
"""


@pytest.mark.parametrize('home', [None, '/proc/nowhere'])
def test_without_a_home_folder_nothing_is_cached(home):
    """As in containers that run under a number without a name."""
    unset = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'JAX_COMPILATION_CACHE_DIR': None}
    done = in_process(NOBODY + COMPUTE, HOME=home, **unset)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'None'
