import os
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
