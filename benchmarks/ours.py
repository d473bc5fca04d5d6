"""A contestant: cfg_jax's training step, forward pass or sampler, or the memory of its training step.

    python benchmarks/ours.py MODEL TASK [--accumulation_steps=1] [--steps=32] [--classifier] [--remat]

It measures the cfg_jax that it imports, which PYTHONPATH may choose, with this file's networks.
"""

import argparse
import json
import runpy
import time
from pathlib import Path

import contest
import numpy as np
from shapes import NUM_CLASSES, SHAPES, TASKS


def shaped(model, *, remat=False):
    """Return the config of a network of shapes.py: the digits' config of the same checkout in another shape."""
    import cfg_jax

    shape, root = SHAPES[model], Path(cfg_jax.__file__).parent.parent
    config = runpy.run_path(str(root / 'configs' / 'digits.py'))['get_config']()
    config.data.image_channels, config.data.image_size, _ = shape['image']
    config.model.channels, config.model.channel_mult, config.model.num_blocks = (
        shape['channels'],
        shape['mult'],
        shape['blocks'],
    )
    config.model.attention_resolutions, config.model.num_heads = shape['attention'], shape['heads']
    config.model.num_groups, config.model.remat = shape['groups'], remat
    config.train.batch_size, config.sample.batch_size = shape['batch'], shape['sampled']
    return config


def configure_as_main(runtime, config):
    """Make the process's settings as cfg_jax.main does; an earlier checkout's had no arguments."""
    try:
        from cfg_jax.config import needs_much_memory
    except ImportError:
        runtime.configure()
    else:
        runtime.configure(keep_memory=needs_much_memory(config))


def compiler_options():
    """Return the sampler's compiler_options, as sampling.generate has them; an earlier checkout had none."""
    from cfg_jax import runtime
    from cfg_jax.training import sharding

    return runtime.compiler_options(sharding.local_mesh()) if hasattr(runtime, 'compiler_options') else None


def training(config):
    """Return (the first state, the jitted training step), as --mode=train has them."""
    from cfg_jax import build
    from cfg_jax.training import sharding

    init, _, step = build.sharded_training(config, sharding.make_mesh())
    return init(), step


def training_step(config, state, step):
    """Return the function that takes one training step on random images, and the compiled program."""
    import jax

    from cfg_jax import build

    images = np.random.default_rng(0).integers(0, 256, (config.train.batch_size, *build.image_shape(config)), np.uint8)
    labels = np.arange(len(images), dtype=np.int32) % NUM_CLASSES
    batch, key = jax.device_put({'image': images, 'label': labels}), jax.random.key(0)
    step = step.lower(state, batch, key).compile()

    def run():
        nonlocal state
        state, metrics = step(state, batch, key)
        jax.block_until_ready((state, metrics))

    return run, step


def forward(config, state):
    """Return the function that evaluates the network once."""
    import jax
    import jax.numpy as jnp

    from cfg_jax import build

    network, count = build.network(config), config.train.batch_size
    z, logsnr = jnp.ones((count, *build.image_shape(config))), jnp.zeros(count)
    arguments = {'params': state.params}, z, logsnr, jnp.zeros(count, jnp.int32)
    compiled = jax.jit(network.apply).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def sampler(config, state, *, classifier=False):
    """Return the function that draws images with classifier-free guidance, w = 1, or with a classifier's gradient.

    classifier: the network is evaluated with the labels alone, and a classifier of its shape guides it.
    """
    import jax
    import jax.numpy as jnp

    from cfg_jax import build, build_sampling

    indices = jnp.arange(config.sample.batch_size)
    weight = np.float32(0.0 if classifier else 1.0)
    arguments = state.ema_params, np.uint32(0), indices, indices % NUM_CLASSES, weight
    configs = [config]
    if classifier:
        config.guidance.function = 'conditional'
        configs.append(config.copy_and_resolve_references())
        configs[1].model.kind = 'classifier'
        arguments += jax.jit(lambda: build.init_params(configs[1], jax.random.key(0)))(), np.float32(1.0)
    drawn = jax.jit(build_sampling.sampler(*configs), compiler_options=compiler_options())
    compiled = drawn.lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def memory(config):
    """Return {images: bytes} of a training step besides its state: 'planned' by the compiled program and 'measured'."""
    planned, measured = {}, {}
    for images in (config.train.batch_size, 2 * config.train.batch_size):
        config.train.batch_size = images
        run, step = training_step(config, *training(config))
        run()  # what the first call allocates for good is not a step's
        planned[images], measured[images] = step.memory_analysis().temp_size_in_bytes, contest.peak_growth(run)
    return {'planned': planned, 'measured': measured}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', choices=SHAPES)
    parser.add_argument('task', choices=TASKS)
    parser.add_argument('--accumulation_steps', type=int, default=1, help='config.train.accumulation_steps')
    parser.add_argument('--steps', type=int, default=32, help='steps of the sampler')
    parser.add_argument('--classifier', action='store_true', help='sample with classifier guidance')
    parser.add_argument('--remat', action='store_true', help='config.model.remat')
    options = parser.parse_args()

    from cfg_jax import runtime

    config = shaped(options.model, remat=options.remat)
    configure_as_main(runtime, config)
    import jax

    jax.config.update('jax_compilation_cache_dir', None)  # compiling is timed too
    config.train.accumulation_steps, config.sample.num_steps = options.accumulation_steps, options.steps
    state, step = training(config)
    facts = {
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        'version': f'jaxlib {jax.lib.__version__}',
    }
    began = time.perf_counter()
    if options.task == 'memory':
        del state
        print(json.dumps({**facts, **memory(config)}))
    elif options.task == 'train':
        contest.serve(training_step(config, state, step)[0], began, **facts)
    elif options.task == 'forward':
        contest.serve(forward(config, state), began, **facts)
    else:
        contest.serve(sampler(config, state, classifier=options.classifier), began, **facts)


if __name__ == '__main__':
    main()
