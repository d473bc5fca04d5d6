"""Settings of the whole process, made before JAX starts its first computation, and how programs are compiled."""

import contextlib
import ctypes
import os
import platform
import re
import subprocess
import sys
import traceback
from importlib import metadata

from cfg_jax.errors import UserError

# It keeps the fast library for reductions and gives convolutions back to Eigen: benchmarks/RESULTS.md.
_CPU_REDUCTIONS = '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE'
_OLDEST_TRIED, _NEWEST_TRIED = (0, 10, 0), (0, 12, 0, 1)  # all between these two, inclusive, know it
# Make XLA read its flags: the first way takes 0.2 s; should a later jaxlib not have it, the second takes a second.
_READ_FLAGS = """
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, OSError, ValueError):
    pass
try:
    from jaxlib import xla_client
    xla_client.make_cpu_client()
except Exception:
    import jax
    jax.devices()
"""
_TRIAL_SECONDS = 60
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # malloc.h


def configure(*, keep_memory=False):
    """Set the XLA flags for CPUs and the persistent compilation cache. What the user's environment sets stays.

    keep_memory: keep the temporary memory of programs on CPUs from call to call; for networks whose activations take
    more than the 64 MB that are kept anyway. Small networks are better off without: they gain by asynchronous calls.
    The cache is $JAX_COMPILATION_CACHE_DIR, or else ~/.cache/cfg_jax; there is none without a home folder to write to.
    """
    _set_cpu_flags()
    import jax  # behind the flags

    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', _cache_folder())
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        # small programs too: a start compiles forty of them, at 0.05 to 0.15 s each
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    if keep_memory:
        _keep_memory()


def _keep_memory():
    """Tell malloc to keep what is freed, and JAX to run programs on CPUs in the calling thread, where malloc does so.

    XLA asks malloc for a program's temporary memory at each call. In other threads than the first, glibc maps more than
    64 MB anew whatever it is told, and Linux clears each page of it: a sixth of a training step of 8M parameters.
    """
    options = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if options is None or any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
        return
    import jax

    options(_MMAP_THRESHOLD, 2**31 - 1)
    options(_TRIM_THRESHOLD, -1)
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def _set_cpu_flags():
    """Add the flag for CPU reductions to $XLA_FLAGS, if this jaxlib knows it and the user has not chosen."""
    flags = os.environ.get('XLA_FLAGS', '')
    if 'ynn_fusion_type' not in flags and knows_flag(_CPU_REDUCTIONS, metadata.version('jaxlib')):
        os.environ['XLA_FLAGS'] = f'{flags} {_CPU_REDUCTIONS}'.strip()


def knows_flag(flag, jaxlib_version):
    """Return True if the installed jaxlib, whose version is given, accepts the flag for XLA on CPUs.

    XLA aborts the process on a flag that it does not know, so a version that was not tried here is tried once, in a
    child process; the answer is kept in a small file beside the compilation cache. Where that cannot be written, each
    start tries again: a fifth of a second, less than a slow training step loses.
    """
    numbers = tuple(map(int, re.findall('[0-9]+', jaxlib_version)[:4]))
    if flag == _CPU_REDUCTIONS and _OLDEST_TRIED <= numbers <= _NEWEST_TRIED:
        return True
    folder = os.environ.get('JAX_COMPILATION_CACHE_DIR', '')
    if not folder or '://' in folder:  # no cache, or one in a bucket
        folder = _cache_folder()
    words = f'{flag.strip("-")}-jaxlib-{jaxlib_version}-{platform.machine()}'
    path = folder and os.path.join(folder, re.sub('[^A-Za-z0-9_.+-]+', '-', words))
    kept = _read_answer(path)
    if kept is not None:
        return kept
    accepted = _try_flag(flag)
    if accepted is not None and path:
        _write_answer(path, accepted)
    return accepted is True


def _try_flag(flag):
    """Return True if XLA starts on the CPU with this flag alone, False if it refuses it, None if the trial fails."""
    if not sys.executable:
        return None  # Python inside another program
    given = {name: value for name, value in os.environ.items() if not name.startswith(('XLA_', 'JAX_', 'TF_XLA_'))}
    given |= {'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', _READ_FLAGS]
    try:
        done = subprocess.run(command, env=given, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode == 0:
        return True
    named = flag.strip('-').partition('=')[0].encode() in done.stderr  # in "Unknown flag in XLA_FLAGS: ..."
    return False if named else None


def _read_answer(path):
    """Return the answer of an earlier trial; None if there is none that can be read."""
    try:
        with open(path or '', encoding='utf-8') as file:
            return {'yes\n': True, 'no\n': False}.get(file.read(8))
    except (OSError, ValueError):
        return None


def _write_answer(path, accepted):
    """Keep the answer of a trial, whole or not at all; several processes may do so at once."""
    temporary = f'{path}.{os.getpid()}.tmp'
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(temporary, 'w', encoding='utf-8') as file:
                file.write('yes\n' if accepted else 'no\n')
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _cache_folder():
    """Return the folder of the compilation cache, or None if it cannot be written."""
    folder = os.path.expanduser('~/.cache/cfg_jax')
    if folder.startswith('~'):
        return None  # no HOME, and a user that the machine does not know, as in some containers
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def compiler_options(mesh):
    """Return jax.jit's compiler_options for a mesh of devices: for CPUs LLVM's level 1 instead of the highest.

    The programs are as fast and give the same bits. Training steps and samplers are compiled in 0.8 of the time, the
    program that makes the first state in a seventh. None for other devices, and for an abstract mesh, which has none.
    """
    from jax.sharding import Mesh

    on_cpus = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == 'cpu'
    return {'xla_backend_optimization_level': 1} if on_cpus else None


@contextlib.contextmanager
def devices_errors():
    """Context manager: turn JAX's failure to find the devices that are asked for into a UserError."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        place = os.path.basename(traceback.extract_tb(error.__traceback__)[-1].filename)
        missing = place == 'xla_bridge.py' or str(error).startswith('Unable to initialize backend')
        if not missing or re.search('UNAVAILABLE|in use|busy', str(error)):
            raise  # another error, or devices that a later start may find free
        asked = os.environ.get('JAX_PLATFORMS')
        wanted = f'the devices of JAX_PLATFORMS={asked}' if asked else 'its devices'
        reason = re.sub("^Unable to initialize backend '.*?': | [(](set|you may) .*", '', str(error)).rstrip('.')
        reason = f' ({reason.splitlines()[0]})' if reason else ''
        raise UserError(
            f'JAX does not find {wanted}{reason}; install JAX for them (extra cuda or tpu), or set JAX_PLATFORMS=cpu.'
        ) from error
