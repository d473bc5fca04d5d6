"""Tests run on the CPU, whatever the machine has, with the program's own runtime settings and compilation cache."""

import importlib.util
import os
import signal

from tests.modules import MATHEMATICS

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ['JAX_PLATFORMS'] = 'cpu'
# The tests spend their time compiling: LLVM without optimisation halves it. The programs that they start inherit it.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
# Most programs of a test are tiny and many: kept as well, both workers, all processes and the next run share them.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

# Types and shapes are checked at every call of these modules, provided that the checkers are installed.
CHECKED = (*MATHEMATICS, 'models')
if importlib.util.find_spec('jaxtyping') and importlib.util.find_spec('beartype'):
    import jaxtyping

    from tests import typechecker

    jaxtyping.install_import_hook([f'cfg_jax.{name}' for name in CHECKED], f'{typechecker.__name__}.check')

from cfg_jax import runtime  # noqa: E402

runtime.configure()

# The files that take longest (20 CPU seconds and more), longest first: begun late, one would keep one worker busy while
# the other has nothing left to do. It needs --no-loadscope-reorder.
LONGEST = (
    *('main', 'variants', 'train', 'distillation', 'ema', 'curves', 'build_sampling', 'processes', 'mixtures'),
    *('samplers', 'api', 'data', 'evaluate', 'adm', 'notebooks', 'sharding', 'sample_sets', 'signals', 'models'),
    *('config', 'laboratory', 'exchange', 'prepare', 'launch', 'sampling', 'memorisation', 'recipes'),
)


def pytest_collection_modifyitems(items):
    order = {f'{name}_test.py': number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
