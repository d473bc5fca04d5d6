"""Tests run on the CPU, whatever the machine has, with the program's own runtime settings and compilation cache."""

import os
import signal

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ['JAX_PLATFORMS'] = 'cpu'
# The tests spend their time compiling: LLVM without optimisation halves it. The programs that they start inherit it.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'


from cfg_jax import runtime

runtime.configure()
