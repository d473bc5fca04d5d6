"""Tests run on the CPU, whatever the machine has, with the program's own runtime settings and compilation cache."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'

from cfg_jax import runtime

runtime.configure()
