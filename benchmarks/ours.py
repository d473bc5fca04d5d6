"""A contestant: cfg_jax's training step, forward pass or sampler. `python benchmarks/ours.py MODEL TASK`."""

import argparse
import runpy
import time
from pathlib import Path

import contest
import numpy as np

ROOT = Path(__file__).parent.parent


def digits_config():
    """Return the config of the digits: 0.2M parameters, 8x8 pixels, batches of 64."""
    return runpy.run_path(str(ROOT / 'configs' / 'digits.py'))['get_config']()


def unet8m_config():
    """Return the config of a network of ADM's shape: 8.0M parameters, 32x32 pixels, batches of 16."""
    config = digits_config()
    config.data.image_size, config.data.image_channels = 32, 3
    config.model.channels, config.model.channel_mult, config.model.num_blocks = 64, (1, 2, 2), 2
    config.model.attention_resolutions, config.model.num_heads, config.model.num_groups = (16, 8), 4, 32
    config.train.batch_size, config.sample.batch_size = 16, 64
    return config


CONFIGS = {'digits': digits_config, 'unet8m': unet8m_config}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', choices=CONFIGS)
    parser.add_argument('task', choices=('train', 'forward', 'sample'))
    parser.add_argument('--steps', type=int, default=32, help='steps of the sampler')
    options = parser.parse_args()

    from cfg_jax import runtime

    runtime.configure()
    import jax
    import jax.numpy as jnp

    from cfg_jax import build, build_sampling
    from cfg_jax.training.train_state import TrainState

    jax.config.update('jax_compilation_cache_dir', None)  # compiling is timed too
    config = CONFIGS[options.model]()
    config.sample.num_steps = options.steps
    key = jax.random.key(0)
    state = jax.jit(lambda: TrainState.create(build.init_params(config, key), build.optimizer(config)))()
    began = time.perf_counter()
    if options.task == 'train':
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (config.train.batch_size, *build.image_shape(config)), np.uint8)
        batch = jax.device_put({'image': images, 'label': np.arange(len(images), dtype=np.int32) % 10})
        step = jax.jit(build.train_step(config), donate_argnums=0).lower(state, batch, key).compile()

        def run():
            nonlocal state
            state, metrics = step(state, batch, key)
            jax.block_until_ready((state, metrics))

    elif options.task == 'forward':
        network = build.network(config)
        arguments = (
            state.params,
            jnp.ones((config.train.batch_size, *build.image_shape(config))),
            jnp.zeros(config.train.batch_size),
            jnp.zeros(config.train.batch_size, jnp.int32),
        )
        forward = jax.jit(lambda params, *inputs: network.apply({'params': params}, *inputs)).lower(*arguments)
        forward = forward.compile()

        def run():
            jax.block_until_ready(forward(*arguments))

    else:
        indices = jnp.arange(config.sample.batch_size)
        arguments = state.ema_params, np.uint32(0), indices, indices % 10, np.float32(1.0)
        sample = jax.jit(build_sampling.sampler(config)).lower(*arguments).compile()

        def run():
            jax.block_until_ready(sample(*arguments))

    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    contest.serve(run, parameters=parameters, compile=time.perf_counter() - began, version=f'jaxlib {jax.lib.__version__}')


if __name__ == '__main__':
    main()
