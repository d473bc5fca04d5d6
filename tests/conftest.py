"""Tests run on the CPU, whatever the machine has, with the program's own runtime settings and compilation cache."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
# The tests spend their time compiling: LLVM without optimisation halves it. The programs that they start inherit it.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'

from cfg_jax import runtime

runtime.configure()
