"""Settings of the whole process, made before JAX starts its first computation."""

import os
import re
from importlib import metadata
from pathlib import Path

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

    The cache is $JAX_COMPILATION_CACHE_DIR, or else ~/.cache/cfg_jax.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if knows_cpu_reductions(metadata.version('jaxlib')) and 'ynn_fusion_type' not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {_CPU_REDUCTIONS}'.strip()
    import jax  # behind the flags

    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', str(Path.home() / '.cache' / 'cfg_jax'))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
