"""The parts of `accelerator.py` that JAX measures: a process that prints a line of JSON for each figure it has.

    python benchmarks/accelerator_parts.py --parts='rate,train 64,sample w=1' --deadline=SECONDS [--tiny]

It needs jax, flax, optax and numpy alone. deadline: the Unix time by which it has to be done; a part that is unlikely
to fit is skipped, with a line that says so. A part that fails, or does not fit into memory, is one line too.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from cfg_jax import runtime
from cfg_jax.progress import shown

# ---------------------------------------------------------------- what is measured


def adm64():
    """Return the settings of configs/imagenet64.py that the network, its training and sampling read.

    They are ADM's network for 64x64, 296M parameters, with a null label. They stand here because configs need a library
    that a bare machine lacks; a test holds the two together.
    """
    return {
        'data': {'image_size': 64, 'image_channels': 3, 'num_classes': 1000},
        'diffusion': {
            **{'schedule': 'cosine', 'logsnr_min': -20.0, 'logsnr_max': 20.0},
            **{'prediction': 'eps', 'sigma_data': 0.5},
        },
        'model': {
            **{'kind': 'unet', 'labels': 'null', 'learn_variance': False, 'dtype': 'bfloat16', 'remat': False},
            'guidance_input': False,
            **{'channels': 192, 'channel_mult': (1, 2, 3, 4), 'num_blocks': 3, 'num_groups': 32, 'dropout': 0.1},
            **{'attention_resolutions': (32, 16, 8), 'num_heads': 1, 'head_channels': 64},
        },
        'loss': {
            **{'p_uncond': 0.1, 'target': 'eps', 'low_discrepancy': False},
            **{'guided': '', 'weighting': '', 'times': 'uniform'},
        },
        'distill': {'method': '', 'rounds': ()},
        'optim': {
            **{'name': 'adam', 'learning_rate': 3e-4, 'warmup_steps': 10_000, 'decay': 'constant', 'clip_norm': 1.0},
            **{'b1': 0.9, 'b2': 0.999, 'eps': 1e-8, 'weight_decay': 0.0, 'ema_decay': 0.9999},
            'ema_lengths': (),
        },
        'train': {'accumulation_steps': 1, 'fsdp': False, 'num_steps': 400_000},
        'guidance': {'attention_resolutions': ()},
        'sample': {'v': 0.3},
    }


TINY = {
    'data': {'image_size': 8, 'num_classes': 10},
    'model': {
        **{'channels': 32, 'channel_mult': (1,), 'num_blocks': 1},
        **{'attention_resolutions': (8,), 'head_channels': 16, 'dtype': 'float32'},
    },
}


def settings(tiny):
    """Return the settings as a config's attributes, those of a tiny network if asked."""
    found = adm64()
    for section, values in TINY.items() if tiny else ():
        found[section] |= values
    return SimpleNamespace(**{section: SimpleNamespace(**values) for section, values in found.items()})


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured. matrices: sides of square products. steps: of the sampler. seconds: of each timing."""

    matrices: tuple[int, ...] = (4096, 8192, 16384)
    steps: int = 8
    sampled: int = 64
    layer_batch: int = 64
    seconds: float = 4.0


SIZES = {False: Sizes(), True: Sizes((64, 128), 2, 4, 2, 0.02)}
FULL_STEPS = 256  # of the sampler, to which its time is scaled
# Seconds that a part is likely to need, before one like it has been measured.
NEEDS = {'rate': 15, 'train': 120, 'sample': 60, 'attention': 60, 'norm': 45}


def levels(config):
    """Return (image size, channels, heads) of each level of the network."""
    found = []
    for level, mult in enumerate(config.model.channel_mult):
        channels = config.model.channels * mult
        found.append((config.data.image_size // 2**level, channels, channels // config.model.head_channels))
    return found


# ---------------------------------------------------------------- telling and timing


def tell(kind, **facts):
    """Print a line for `accelerator.py`: the kind of message and its facts."""
    print(json.dumps({'message': kind, **facts}), flush=True)


@contextlib.contextmanager
def stage(what):
    """Context manager: print what begins, and for how long it has been running."""
    print(what, flush=True)
    with shown(what):
        yield


def seconds_per_call(run, wanted, wait=None):
    """Return the median over three rounds of seconds per call of run(), whose result may still be being computed.

    wanted: seconds that all rounds together take, roughly. run has compiled before. wait(result) waits for it; None:
    jax.block_until_ready.
    """
    if wait is None:
        from jax import block_until_ready as wait

    wait(run())
    began = time.perf_counter()
    wait(run())
    count = min(max(round(wanted / 3 / (time.perf_counter() - began)), 1), 200)
    rounds = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(count):
            result = run()
        wait(result)
        rounds.append((time.perf_counter() - began) / count)
    return statistics.median(rounds)


def product_flops(jaxpr):
    """Return the FLOPs of all matrix products and convolutions of a jaxpr, counted from their shapes.

    A scan's body counts once for each turn; a multiplication and an addition are two. It is the same on every device,
    also where XLA's count leaves out what a library computes.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == 'dot_general':
            (contracted, _), _ = parameters['dimension_numbers']
            length = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * length
        elif name == 'conv_general_dilated':
            total += convolution_flops(equation)
        else:
            inner = [getattr(value, 'jaxpr', value) for value in parameters.values()]
            turns = parameters['length'] if name == 'scan' else 1
            total += turns * sum(product_flops(each) for each in inner if hasattr(each, 'eqns'))
    return total


def convolution_flops(equation):
    """Return the FLOPs of a convolution of a jaxpr, without those of padding, which XLA does not count either."""
    import numpy as np

    parameters, (image, kernel) = equation.params, (each.aval.shape for each in equation.invars)
    out, numbers = equation.outvars[0].aval.shape, parameters['dimension_numbers']
    total = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for axis, (before, _) in enumerate(parameters['padding']):
        stride, spread, gap = (parameters[name][axis] for name in ('window_strides', 'lhs_dilation', 'rhs_dilation'))
        places, taps = np.arange(out[numbers.out_spec[2 + axis]]), np.arange(kernel[numbers.rhs_spec[2 + axis]])
        read = np.add.outer(places * stride - before, taps * gap)
        inside = (read >= 0) & (read <= (image[numbers.lhs_spec[2 + axis]] - 1) * spread) & (read % spread == 0)
        total *= int(inside.sum())
    return total


def compiled(function, arguments, what, **options):
    """Return (the compiled function, facts: seconds to trace and to compile, FLOPs and bytes)."""
    import jax

    with stage(f'compiling {what}'):
        began = time.perf_counter()
        traced = jax.jit(function, **options).trace(*arguments)
        lowered = traced.lower()
        between = time.perf_counter()
        program = lowered.compile()
        ended = time.perf_counter()
    facts = {
        'trace_seconds': between - began,
        'compile_seconds': ended - between,
        'flops': product_flops(traced.jaxpr.jaxpr),
    }
    with contextlib.suppress(Exception):  # not every device's compiler tells
        facts['xla_flops'] = program.cost_analysis()['flops']
    with contextlib.suppress(Exception):
        sizes = program.memory_analysis()
        facts |= {'temporary_bytes': sizes.temp_size_in_bytes, 'argument_bytes': sizes.argument_size_in_bytes}
    return program, facts


def peak_bytes():
    """Return {'peak_bytes': the most that this process has held on the device}; {} where the device does not tell."""
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return {'peak_bytes': statistics['peak_bytes_in_use']} if 'peak_bytes_in_use' in statistics else {}


def random_params(config):
    """Return random parameters of the network, numpy: zeros would let a GPU run faster than it does."""
    import jax
    import numpy as np

    from cfg_jax import build

    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim == 1:
            return np.full(leaf.shape, path[-1].key == 'scale', np.float32)
        fan_in = 1 if path[-1].key == 'embedding' else math.prod(leaf.shape[:-1])
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(math.sqrt(fan_in))

    with stage('drawing the parameters'):
        shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
        return jax.tree_util.tree_map_with_path(draw, shapes)


# ---------------------------------------------------------------- the parts


def rate(sizes, config, params):
    """Measure the rate of bfloat16 products of square matrices, in FLOP/s, of each size."""
    import jax
    import jax.numpy as jnp

    del config, params
    for side in sizes.matrices:
        a, b = (jax.random.normal(jax.random.key(seed), (side, side), jnp.bfloat16) for seed in (0, 1))
        program, _ = compiled(lambda a, b: a @ b, (a, b), f'a product of {side}x{side} matrices')
        seconds = seconds_per_call(lambda program=program, a=a, b=b: program(a, b), sizes.seconds / 4)
        yield {'side': side, 'seconds': seconds, 'flops_per_second': 2 * side**3 / seconds}


def train(sizes, config, params, batch_size):
    """Measure a training step of cfg_jax, as --mode=train takes it, on random images."""
    import jax
    import numpy as np

    from cfg_jax import build
    from cfg_jax.training.train_state import TrainState

    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (batch_size, *build.image_shape(config)), np.uint8)
    labels = (np.arange(batch_size) % config.data.num_classes).astype(np.int32)
    with stage('placing the training state'):
        batch, key = jax.device_put({'image': images, 'label': labels}), jax.random.key(0)
        state = jax.jit(lambda params: TrainState.create(params, build.optimizer(config)))(params)
        jax.block_until_ready(state)
    what = f'the training step, batch {batch_size}'
    step, facts = compiled(build.train_step(config), (state, batch, key), what, donate_argnums=0)

    def run():
        nonlocal state
        state, metrics = step(state, batch, key)
        return metrics

    with stage(f'timing {what}'):
        seconds = seconds_per_call(run, sizes.seconds)
    yield {
        'batch': batch_size,
        'seconds': seconds,
        'images_per_second': batch_size / seconds,
        'loss': float(run()['loss']),
        **facts,
        **peak_bytes(),
    }


def sample(sizes, config, params, weight):
    """Measure the ancestral sampler: at w = 0 the network is evaluated once a step, as cfg_jax does, else twice."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cfg_jax import build, diffusion, guidance, samplers, schedules

    logsnrs = np.asarray(schedules.logsnr_grid(build.schedule(config), sizes.steps))
    guide = guidance.classifier_free if weight else guidance.conditional

    def draw(params, seed, indices, labels, weight):
        keys = samplers.image_keys(seed, indices)
        denoise = guide(build.model(config, params), labels, weight, null_label=build.null_label(config))
        z = samplers.step_noise(keys, 0, build.image_shape(config))
        return diffusion.to_uint8(samplers.ancestral(denoise, z, logsnrs, keys, v=config.sample.v))

    indices = jnp.arange(sizes.sampled, dtype=jnp.uint32)
    labels = (indices % config.data.num_classes).astype(jnp.int32)
    arguments = jax.device_put(params), np.uint32(0), indices, labels, np.float32(weight)
    what = f'the sampler at w = {weight:g}, {sizes.sampled} images, {sizes.steps} steps'
    program, facts = compiled(draw, arguments, what)
    with stage(f'timing {what}'):
        seconds = seconds_per_call(lambda: program(*arguments), sizes.seconds)
    yield {
        'weight': weight,
        'batch': sizes.sampled,
        'steps': sizes.steps,
        'seconds': seconds,
        'images_per_second': sizes.sampled / (seconds * FULL_STEPS / sizes.steps),
        **facts,
        **peak_bytes(),
    }


def forward_and_both(function, arguments, cotangent, seconds, what):
    """Return {'forward_ms', 'both_ms'}: of a layer, and of it with its gradients; {'note'} if it cannot be computed."""
    import jax

    def both(arguments, cotangent):
        out, gradients = jax.vjp(function, *arguments)
        return out, gradients(cotangent)

    try:
        forward, _ = compiled(function, arguments, what)
        with_gradients, _ = compiled(both, (arguments, cotangent), f'{what}, with gradients')
        return {
            'forward_ms': 1e3 * seconds_per_call(lambda: forward(*arguments), seconds),
            'both_ms': 1e3 * seconds_per_call(lambda: with_gradients(arguments, cotangent), seconds),
        }
    except Exception as error:
        return {'note': reason(error)}


def attention(sizes, config, params):
    """Measure attention from queries, keys and values [B, T, 3, heads, D] to [B, T, C], in three implementations."""
    import jax
    import jax.numpy as jnp

    from cfg_jax.models import blocks

    del params

    def ours(qkv):
        B, T, _, heads, D = qkv.shape
        query, key, value = qkv.transpose(2, 0, 3, 1, 4).reshape(3, B * heads, T, D)
        return blocks.attend(query, key, value).reshape(B, heads, T, D).swapaxes(1, 2).reshape(B, T, heads * D)

    def of_jax(implementation):
        def attend(qkv):
            query, key, value = (qkv[:, :, part] for part in range(3))
            found = jax.nn.dot_product_attention(query, key, value, implementation=implementation)
            return found.reshape(*qkv.shape[:2], -1)

        return attend

    variants = {'cfg_jax': ours, 'jax.nn, xla': of_jax('xla')}
    if jax.devices()[0].platform == 'gpu':
        variants['jax.nn, cudnn'] = of_jax('cudnn')
    for size, channels, heads in levels(config):
        if size not in config.model.attention_resolutions:
            continue
        B, T, D = sizes.layer_batch, size * size, channels // heads
        qkv = jax.random.normal(jax.random.key(0), (B, T, 3, heads, D), jnp.bfloat16)
        cotangent = jax.random.normal(jax.random.key(1), (B, T, channels), jnp.bfloat16)
        for name, function in variants.items():
            row = {'shape': f'{B}x{T}, {heads} heads of {D}', 'variant': name}
            what = f'attention, {name}, T = {T}'
            yield row | forward_and_both(function, (qkv,), cotangent, sizes.seconds / 16, what)


def norm(sizes, config, params):
    """Measure a group norm and the SiLU after it, on bfloat16, in four implementations."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from cfg_jax.models import blocks

    del params
    groups = config.model.num_groups

    def single_pass(x, scale, bias, applied):
        """Return the norm with float32 sums over all of a group at once, applied in another type."""
        grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
        mean = grouped.mean((1, 3), dtype=jnp.float32)
        squares = jnp.square(grouped.astype(jnp.float32)).mean((1, 3))
        inverse = jax.lax.rsqrt(jnp.maximum(squares - jnp.square(mean), 0.0) + 1e-5)
        factor = jnp.repeat(inverse, x.shape[-1] // groups, axis=-1) * scale
        offset = bias - jnp.repeat(mean, x.shape[-1] // groups, axis=-1) * factor
        factor, offset = (each.astype(applied)[:, None, None] for each in (factor, offset))
        return (x.astype(applied) * factor + offset).astype(x.dtype)

    def module(cls, **options):
        layer = cls(groups, epsilon=1e-5, **options)
        return lambda x, scale, bias: layer.apply({'params': {'scale': scale, 'bias': bias}}, x)

    def with_silu(function):
        return lambda *arguments: nn.silu(function(*arguments))

    variants = {
        'cfg_jax': module(blocks.GroupNorm),
        'flax': module(nn.GroupNorm, dtype=jnp.bfloat16),
        'one sum, float32': lambda *arguments: single_pass(*arguments, jnp.float32),
        'one sum, applied in bfloat16': lambda *arguments: single_pass(*arguments, jnp.bfloat16),
    }
    for size, channels, _ in levels(config):
        shape = (sizes.layer_batch, size, size, channels)
        x, cotangent = (jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in (0, 1))
        arguments = x, jnp.ones(channels), jnp.zeros(channels)
        for name, function in variants.items():
            row = {'shape': 'x'.join(map(str, shape)), 'variant': name}
            what = f'a norm, {name}, {size}x{size}'
            yield row | forward_and_both(with_silu(function), arguments, cotangent, sizes.seconds / 16, what)


# ---------------------------------------------------------------- one part after the other


def reason(error):
    """Return an exception as the note of a row."""
    text = f'{type(error).__name__}: {error}'
    if 'RESOURCE_EXHAUSTED' in text or 'out of memory' in text.lower():
        return 'out of memory'
    return text.splitlines()[0][:200]


def measure(part, sizes, config, params):
    """Return the rows of a part, an iterator: 'rate', 'train BATCH', 'sample w=WEIGHT', 'attention' or 'norm'."""
    kind, _, rest = part.partition(' ')
    if kind == 'train':
        return train(sizes, config, params, int(rest))
    if kind == 'sample':
        return sample(sizes, config, params, float(rest.removeprefix('w=')))
    return {'rate': rate, 'attention': attention, 'norm': norm}[kind](sizes, config, params)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', required=True)
    parser.add_argument('--deadline', type=float, required=True)
    parser.add_argument('--needs', type=json.loads, default={}, help='seconds that parts took, {kind: seconds}')
    parser.add_argument('--tiny', action='store_true')
    options = parser.parse_args()
    with stage('starting JAX'):
        runtime.configure()
        import jax

        jax.config.update('jax_compilation_cache_dir', None)  # compiling is timed too
        device = jax.devices()[0]
        versions = {'jax': jax.__version__, 'jaxlib': jax.lib.__version__, 'python': sys.version.split()[0]}
        tell('machine', device=device.device_kind, platform=device.platform, versions=versions)
    config, sizes, params = settings(options.tiny), SIZES[options.tiny], None
    needs = dict.fromkeys(NEEDS, 1) if options.tiny else NEEDS | options.needs
    for part in options.parts.split(','):
        kind, left = part.split()[0], options.deadline - time.time()
        if left < needs[kind]:
            tell('row', part=part, note=f'skipped: it needs some {needs[kind]:.0f} s, {max(left, 0):.0f} s are left')
            continue
        tell('begin', part=part)
        began = time.time()
        try:
            if params is None and kind in ('train', 'sample'):
                params = random_params(config)
            for row in measure(part, sizes, config, params):
                tell('row', part=part, **row)
        except Exception as error:
            tell('row', part=part, note=reason(error))
        needs[kind] = 1.2 * (time.time() - began)
        tell('end', part=part, needs=needs[kind])


if __name__ == '__main__':
    main()
