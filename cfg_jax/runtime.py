"""Settings of the whole process, made before JAX starts its first computation."""

import os
from importlib import metadata
from pathlib import Path

# XLA aborts on a flag that it does not know, so it is set only for versions seen to know it. It keeps the fast
# library for reductions and gives convolutions back to Eigen (measured in benchmarks/).
_CPU_REDUCTIONS = '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE'
_JAXLIBS_KNOWING_IT = ('0.10.2',)


def configure():
    """Sets the XLA flags for CPUs and the persistent compilation cache. What the user's environment sets stays.

    The cache is $JAX_COMPILATION_CACHE_DIR, or else ~/.cache/cfg_jax.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if metadata.version('jaxlib') in _JAXLIBS_KNOWING_IT and 'ynn_fusion_type' not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {_CPU_REDUCTIONS}'.strip()
    import jax  # behind the flags

    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', str(Path.home() / '.cache' / 'cfg_jax'))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
