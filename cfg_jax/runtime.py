"""Settings of the whole process, to be made before JAX starts its first computation."""

import os
from importlib import metadata
from pathlib import Path

from cfg_jax.errors import UserError

# XLA aborts on a flag that it does not know, so it is set only for versions seen to know it. It keeps the fast
# library for reductions and gives convolutions back to Eigen (measured in benchmarks/).
_CPU_REDUCTIONS = '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE'
_JAXLIBS_KNOWING_IT = ('0.10.2',)


def configure():
    """Sets the XLA flags for CPUs and the persistent compilation cache. What the user's environment sets stays.

    The cache is $JAX_COMPILATION_CACHE_DIR, or else ~/.cache/cfg_jax. Where $JAX_COORDINATOR_ADDRESS (host:port of
    process 0), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID are set, the process joins the others in one job.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if metadata.version('jaxlib') in _JAXLIBS_KNOWING_IT and 'ynn_fusion_type' not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {_CPU_REDUCTIONS}'.strip()
    import jax  # behind the flags

    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', str(Path.home() / '.cache' / 'cfg_jax'))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
    if 'JAX_COORDINATOR_ADDRESS' in os.environ:
        numbers = {'num_processes': 'JAX_NUM_PROCESSES', 'process_id': 'JAX_PROCESS_ID'}
        try:
            numbers = {key: int(os.environ[name]) for key, name in numbers.items()}
        except (KeyError, ValueError):
            raise UserError(
                'JAX_COORDINATOR_ADDRESS is set: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers beside it.'
            ) from None
        jax.distributed.initialize(**numbers)
