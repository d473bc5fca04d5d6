"""Settings of the whole process, made before JAX starts its first computation."""

import contextlib
import os
import re
import traceback
from importlib import metadata

from cfg_jax.errors import UserError

# It keeps the fast library for reductions and gives convolutions back to Eigen (measured by benchmarks/speed.py). XLA
# aborts on a flag that it does not know, so only releases that were tried get it: all between these two, inclusive.
_CPU_REDUCTIONS = '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE'
_OLDEST_TRIED, _NEWEST_TRIED = (0, 10, 2), (0, 12, 0, 1)


def knows_cpu_reductions(jaxlib_version):
    """Return True if this version of jaxlib, a string, is known to accept the flag for CPU reductions."""
    numbers = tuple(map(int, re.findall('[0-9]+', jaxlib_version)[:4]))
    return _OLDEST_TRIED <= numbers <= _NEWEST_TRIED


def configure():
    """Set the XLA flags for CPUs and the persistent compilation cache. What the user's environment sets stays.

    The cache is $JAX_COMPILATION_CACHE_DIR, or else ~/.cache/cfg_jax; there is none without a home folder to write to.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if knows_cpu_reductions(metadata.version('jaxlib')) and 'ynn_fusion_type' not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {_CPU_REDUCTIONS}'.strip()
    import jax  # behind the flags

    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', _cache_folder())
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


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
