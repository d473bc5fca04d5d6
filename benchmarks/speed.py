"""Time the training step and the sampler on this machine, without and with cfg_jax's optimisations for CPUs.

    python benchmarks/speed.py [--rounds=3] [--models=digits,unet8m]

Three variants, each in a process of its own, run in turn so that a machine that changes its speed affects all alike:
    plain      Flax's GroupNorm and XLA's default flags
    flag       plain, with the XLA flag of cfg_jax.runtime
    two-stage  flag, with cfg_jax's GroupNorm: sums over each channel's pixels first, then over a group's channels
Two models: `digits` (configs/digits.py, batch 64; sampling 200 images in a doubled batch) and `unet8m` (ADM-shaped, 64
channels, mult 1,2,2, two blocks, 32x32, batch 16, 8.2M parameters; sampling: one network evaluation of a doubled
batch of 16). The printed figures are medians over the rounds.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = ('plain', 'flag', 'two-stage')
ROOT = Path(__file__).parent.parent


def digits_config():
    spec = importlib.util.spec_from_file_location('digits', ROOT / 'configs' / 'digits.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def unet8m_config():
    config = digits_config()
    config.data.image_size, config.data.image_channels = 32, 3
    config.model.channels, config.model.channel_mult, config.model.num_blocks = 64, (1, 2, 2), 2
    config.model.attention_resolutions, config.model.num_heads, config.model.num_groups = (16, 8), 4, 32
    config.train.batch_size, config.sample.batch_size, config.sample.num_steps = 16, 16, 4
    return config


def measure(model, variant):
    """Return one process's figures: seconds to compile and per step, for training and for sampling."""
    if variant == 'plain':
        os.environ['XLA_FLAGS'] = ''
    else:
        from cfg_jax import runtime

        runtime.configure()
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cfg_jax import build, build_sampling
    from cfg_jax.models import blocks
    from cfg_jax.training.train_state import TrainState

    jax.config.update('jax_compilation_cache_dir', None)

    class PlainGroupNorm(nn.Module):
        num_groups: int = 32

        @nn.compact
        def __call__(self, x, scale=None, shift=None):
            y = nn.GroupNorm(self.num_groups, epsilon=1e-5)(x)
            return y if scale is None else y * (1.0 + scale[:, None, None]) + shift[:, None, None]

    if variant != 'two-stage':
        blocks.GroupNorm = PlainGroupNorm
    config = {'digits': digits_config, 'unet8m': unet8m_config}[model]()
    batch_size, key = config.train.batch_size, jax.random.key(0)
    state = jax.jit(lambda: TrainState.create(build.init_params(config, key), build.optimizer(config)))()
    batch = {
        'image': jnp.zeros((batch_size, *build.image_shape(config)), jnp.uint8),
        'label': jnp.arange(batch_size, dtype=jnp.int32) % 10,
    }
    indices = jnp.arange(config.sample.batch_size)

    def seconds(run, count):
        start = time.perf_counter()
        for _ in range(count):
            out = run()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / count

    figures = {'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params))}
    start = time.perf_counter()
    step = jax.jit(build.train_step(config), donate_argnums=0).lower(state, batch, key).compile()
    figures['train_compile'] = time.perf_counter() - start

    def train_once():
        nonlocal state
        state, metrics = step(state, batch, key)
        return metrics

    train_once()
    figures['train_step'] = seconds(train_once, 100 if model == 'digits' else 3)
    start = time.perf_counter()
    sample = jax.jit(build_sampling.sampler(config))
    arguments = state.ema_params, np.uint32(0), indices, indices % 10, np.float32(1.0)
    sample = sample.lower(*arguments).compile()
    figures['sample_compile'] = time.perf_counter() - start
    sample(*arguments)
    figures['sample_step'] = seconds(lambda: sample(*arguments), 2) / config.sample.num_steps
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--models', default='digits,unet8m')
    parser.add_argument('--child', nargs=2, metavar=('MODEL', 'VARIANT'), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    for model in options.models.split(','):
        found = {variant: [] for variant in VARIANTS}
        for _ in range(options.rounds):
            for variant in VARIANTS:
                child = [sys.executable, __file__, '--child', model, variant]
                done = subprocess.run(child, check=True, capture_output=True, text=True)
                found[variant].append(json.loads(done.stdout.splitlines()[-1]))
                print(f'{model} {variant}: {done.stdout.splitlines()[-1]}', file=sys.stderr, flush=True)
        print(f'\n{model}, {found["plain"][0]["parameters"]:,} parameters; median of {options.rounds}')
        print(f'{"":10} {"train step":>12} {"sampler step":>13} {"compile train":>14} {"compile sampler":>16}')
        medians = {
            variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for variant, runs in found.items()
        }
        for variant, m in medians.items():
            print(
                f'{variant:10} {1e3 * m["train_step"]:9.1f} ms {1e3 * m["sample_step"]:10.1f} ms '
                f'{m["train_compile"]:12.1f} s {m["sample_compile"]:14.1f} s'
            )
        ratios = [medians['plain'][key] / medians['two-stage'][key] for key in ('train_step', 'sample_step')]
        print(f'plain / two-stage: training {ratios[0]:.2f}, sampling {ratios[1]:.2f}')


if __name__ == '__main__':
    main()
