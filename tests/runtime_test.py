import os
import re
import subprocess
import sys

import pytest

from cfg_jax import runtime
from tests import tiny

FLAG = runtime._CPU_REDUCTIONS
NO_FLAG = '--xla_cpu_no_such_flag=1'


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """The list of flags that were tried in a child process; answers are kept in tmp_path."""
    tried, really = [], runtime._try_flag
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(runtime, '_try_flag', lambda flag: tried.append(flag) or really(flag))
    return tried


@pytest.mark.parametrize(
    ('version', 'known'),
    [
        *((version, True) for version in ('0.10.0', '0.10.2', '0.11.0', '0.11.2', '0.12.0', '0.12.0.1')),
        *((version, False) for version in ('0.9.2', '0.12.0.2', '0.12.1', '0.13.0', '0.13.0.dev20270101', '1.0')),
    ],
)
def test_only_versions_that_were_not_tried_pay_a_trial(version, known, monkeypatch, trials):
    monkeypatch.setattr(runtime, '_try_flag', lambda flag: trials.append(flag))  # and None: the trial failed
    assert runtime.knows_flag(FLAG, version) == known
    assert trials == ([] if known else [FLAG])


@pytest.mark.parametrize(('flag', 'known'), [(FLAG, True), (NO_FLAG, False)])
def test_a_new_version_is_tried_once(flag, known, monkeypatch, trials, tmp_path):
    """With XLA itself: XLA ends the child on a flag that XLA does not know, and the user's flags do not reach it."""
    monkeypatch.setenv('XLA_FLAGS', '--xla_another_unknown_flag=1')
    assert runtime.knows_flag(flag, '99.1') == known
    assert runtime.knows_flag(flag, '99.1') == known
    assert trials == [flag]
    assert len(list(tmp_path.iterdir())) == 1  # and no core file, no temporary file
    assert runtime.knows_flag(flag, '99.2') == known
    assert len(trials) == 2


def test_a_damaged_answer_is_asked_again(trials, tmp_path):
    assert not runtime.knows_flag(NO_FLAG, '99.1')
    (kept,) = tmp_path.iterdir()
    for content in (b'', b'y', b'\xff\xfe', b'yes\nno\n'):
        kept.write_bytes(content)
        assert not runtime.knows_flag(NO_FLAG, '99.1')
        assert kept.read_bytes() == b'no\n'
    assert len(trials) == 5


@pytest.mark.parametrize('folder', ['/proc/nowhere', '/dev/null/cache'])
def test_an_answer_that_cannot_be_kept_is_used(folder, monkeypatch, trials):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', folder)
    assert not runtime.knows_flag(NO_FLAG, '99.1')
    assert not runtime.knows_flag(NO_FLAG, '99.1')
    assert len(trials) == 2


@pytest.mark.parametrize('folder', ['', 'gs://bucket/cache'])
def test_without_a_local_cache_the_answer_is_kept_at_home(folder, monkeypatch, trials, tmp_path):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', folder)
    monkeypatch.setenv('HOME', str(tmp_path))
    runtime.knows_flag(NO_FLAG, '99.1')
    runtime.knows_flag(NO_FLAG, '99.1')
    assert len(trials) == 1
    assert len(list((tmp_path / '.cache/cfg_jax').iterdir())) == 1


@pytest.mark.parametrize(
    'code', ['import time; time.sleep(60)', 'raise SystemExit(1)', 'import os; os.kill(os.getpid(), 9)']
)
def test_a_trial_that_fails_says_nothing(code, monkeypatch, trials, tmp_path):
    """It ran out of time, or jaxlib was not found, or the machine ended it: no flag, and the next start tries again."""
    monkeypatch.setattr(runtime, '_READ_FLAGS', code)
    monkeypatch.setattr(runtime, '_TRIAL_SECONDS', 1)
    assert not runtime.knows_flag(FLAG, '99.1')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('python', [None, '', '/no/such/python'])
def test_without_a_python_to_start_there_is_no_flag(python, monkeypatch, trials):
    monkeypatch.setattr(sys, 'executable', python)
    assert not runtime.knows_flag(FLAG, '99.1')


TRY = """
from cfg_jax import runtime
print(runtime.knows_flag('--xla_cpu_no_such_flag=1', '99.1'), runtime.knows_flag(runtime._CPU_REDUCTIONS, '99.1'))
"""


def test_processes_that_start_at_once_agree(tmp_path):
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path)}
    jobs = [
        subprocess.Popen([sys.executable, '-c', TRY], stdout=subprocess.PIPE, text=True, cwd=tiny.ROOT, env=environment)
        for _ in range(3)
    ]
    assert [job.communicate()[0] for job in jobs] == ['False True\n'] * 3
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ['no\n', 'yes\n']


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


FAULTS = """
import resource
from cfg_jax import runtime
runtime.configure(keep_memory=True)
import jax
x = jax.numpy.ones((6000, 8))
step = jax.jit(lambda x: jax.lax.optimization_barrier(x @ x.T).sum())  # 144 MB of temporary memory
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(sys.platform != 'linux' or not os.confstr('CS_GNU_LIBC_VERSION'), reason='for glibc')
def test_kept_memory_is_not_mapped_again():
    """A program with 35,000 pages of 4 kB: all of them are cleared again in each call unless memory is kept.

    On a busy machine a call may begin before another thread has freed the memory of the one before; not every time.
    """
    given = dict.fromkeys([name for name in os.environ if name.startswith(('MALLOC_', 'GLIBC_'))])
    done = in_process(FAULTS, JAX_PLATFORMS='cpu', **given)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5_000


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
