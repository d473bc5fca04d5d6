"""The planning job: what training a config needs on a slice of TPUs or on the devices at hand, before it begins."""

import contextlib
import math
import os
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from cfg_jax import build, files
from cfg_jax.checks import check_config
from cfg_jax.config import changed
from cfg_jax.errors import UserError
from cfg_jax.jobs import train
from cfg_jax.planning import hlo
from cfg_jax.progress import duration
from cfg_jax.training import sharding

_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16')


class Kind(NamedTuple):
    """A kind of TPU. name: JAX's. memory: GiB that XLA lets a program have. peak: bfloat16 FLOP/s of a chip."""

    name: str
    memory: float
    peak: float
    slices: tuple[str, ...]


# The memory is what libtpu's compiler names as available, a little less than the makers' 32, 16, 96 and 32 GiB.
TPUS = {
    'v4': Kind('TPU v4', 30.75, 275e12, _CUBES),
    'v5e': Kind('TPU v5 lite', 15.75, 197e12, _FLAT),
    'v5p': Kind('TPU v5', 95.74, 459e12, _CUBES),
    'v6e': Kind('TPU v6 lite', 31.25, 918e12, _FLAT),
}
# Of devices at hand, bfloat16 and dense, by JAX's names: other cards of the same families are slower.
_PEAKS = {tpu.name: tpu.peak for tpu in TPUS.values()} | {
    'NVIDIA H200': 989e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
}
# libtpu asks the machine what TPU it has unless this is said; the topology's name is what counts.
_LIBTPU = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_MIN_LOG_LEVEL': '3',
}
GIB = 2**30
_TO_FILL = 0.9  # of the memory, by an estimate: XLA needs room for what is not counted, such as the program itself
# XLA's temporaries over what convolutions and products keep: 1.35 and 1.32 where the paper's ImageNet 64x64 and 128x128
# were compiled, for v5e and v4 (docs/scaling.md).
_BESIDE_PRODUCTS = 1.34
_PROGRESS_SECONDS = 20


class Target(NamedTuple):
    """What is planned for. memory: bytes that a program may have on each device. peak: FLOP/s of one, or None."""

    name: str
    count: int
    memory: float
    peak: float | None
    devices: list | None = None

    def to_fill(self):
        """The bytes of each device that an estimate may fill."""
        return _TO_FILL * self.memory


def target(topology, compiling):
    """The `Target` of config.plan.topology; `compiling`: with its devices. UserError for one that does not exist."""
    if topology:
        kind, _, shape = topology.partition(':')
        if kind not in TPUS or shape not in TPUS[kind].slices:
            allowed = '; '.join(f'{kind}: {" ".join(tpu.slices)}' for kind, tpu in TPUS.items())
            raise UserError(
                f"config.plan.topology is {topology!r}; allowed: '' (the devices at hand) or kind:shape, of {allowed}."
            )
        # This machine's devices are left alone; and JAX would look for the TPU that libtpu is there to drive.
        jax.config.update('jax_platforms', 'cpu')
        count = math.prod(map(int, shape.split('x')))
        devices = tpu_devices(kind, shape) if compiling else None
        return Target(f'TPU {topology}', count, TPUS[kind].memory * GIB, TPUS[kind].peak, devices)
    devices = jax.devices()
    kind = devices[0].device_kind
    statistics = devices[0].memory_stats() if devices[0].platform != 'cpu' else None
    if statistics:
        memory = statistics['bytes_limit']
    else:  # the machine's, which its devices share
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / len(jax.local_devices())
    return Target(f'{kind} (at hand)', len(devices), memory, _PEAKS.get(kind), devices)


def tpu_devices(kind, shape):
    """The devices of a TPU slice that need not be there, from libtpu; UserError where that is not installed."""
    if find_spec('libtpu') is None:
        raise UserError(
            "compiling for a TPU needs libtpu: pip install -e '.[tpu]' (on any x86 Linux); or "
            'estimate without it: --config.plan.compile=False (config.plan.topology).'
        )
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = {}
    if kind == 'v4':  # both cores of a chip as one device, which is what JAX shows on such machines
        options['chip_config_name'] = 'megacore'
    if shape == '1x1':
        options['chips_per_host_bounds'] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=f'{kind}:{shape}', **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"config.plan.topology is '{kind}:{shape}', which libtpu refuses: {reason}") from None


# What a step costs, counted without compiling it


class Costs(NamedTuple):
    """What a training step of a config costs on so many devices.

    state: bytes a device of each part of the state, {fsdp: {part: bytes}}. activations: bytes an image, {remat: bytes}.
    flops: of an image, {remat: FLOPs}. update_flops: of the update of all parameters.
    """

    parameters: int
    state: dict[bool, dict[str, int]]
    activations: dict[bool, float]
    flops: dict[bool, float]
    update_flops: float


def state_bytes(config, count):
    """Bytes on each of so many devices of {'parameters', 'EMA', 'optimizer'}, by config.train.fsdp."""
    state = train.sharded(config, AbstractMesh((count,), ('data',)))[1]

    def a_device(tree):
        shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
        return sum(math.prod(shape) * itemsize for shape, itemsize in shards)

    parts = {'parameters': state.params, 'EMA': state.ema_params, 'optimizer': state.opt_state}
    return {name: a_device(tree) for name, tree in parts.items()}


def _is_product(primitive, *_, **__):
    return primitive.name in ('conv_general_dilated', 'dot_general')


def kept_bytes(config, num_images, policy=None):
    """Bytes that the backward pass of so many images finds kept: all that JAX would keep, or what `policy` lets it."""
    loss, params = build.loss(config), jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))

    def backward(params, images, labels):
        def mean_loss(params):
            return loss(params, images, labels, jax.random.key(0)).loss.mean()

        return jax.vjp(jax.checkpoint(mean_loss, policy=policy) if policy else mean_loss, params)[1]

    images = jax.ShapeDtypeStruct((num_images, *build.image_shape(config)), np.float32)
    kept = jax.eval_shape(backward, params, images, jax.ShapeDtypeStruct((num_images,), np.int32))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def activation_bytes(config):
    """Bytes an image that a training step keeps for its backward pass, about.

    Of what JAX would keep, XLA computes anew what is cheap and keeps the outputs of convolutions and matrix products,
    and some more beside them. With config.model.remat it is what goes from block to block, and what one block needs is
    not counted.
    """
    policies = [None] if config.model.remat else [None, _is_product]
    return _BESIDE_PRODUCTS * min(kept_bytes(config, 2, policy) - kept_bytes(config, 1, policy) for policy in policies)


def step_flops(config, num_images):
    """FLOPs of a training step of so many images: XLA's count of the lowered program, recomputation included."""
    alone = {'train.batch_size': num_images, 'train.accumulation_steps': 1, 'train.fsdp': False}
    mesh = sharding.make_mesh(jax.local_devices(backend='cpu')[:1])
    return lowered_step(changed(config, alone), mesh).cost_analysis()['flops']


def costs(config, count):
    """The `Costs` of a config on so many devices."""
    variants = {remat: changed(config, {'model.remat': remat}) for remat in (False, True)}
    one, two, two_remat = step_flops(variants[False], 1), step_flops(variants[False], 2), step_flops(variants[True], 2)
    update = 2 * one - two
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    return Costs(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        state={fsdp: state_bytes(changed(config, {'train.fsdp': fsdp}), count) for fsdp in (False, True)},
        activations={remat: activation_bytes(variant) for remat, variant in variants.items()},
        flops={False: two - one, True: (two_remat - update) / 2},
        update_flops=update,
    )


def memory(config, cost, count):
    """Bytes a device by use, estimated, as a dict: what a step of the config needs on so many devices is their sum."""
    state, parts = cost.state[config.train.fsdp], config.train.accumulation_steps
    images, weight = config.train.batch_size / count, jnp.dtype(config.model.dtype).itemsize
    return {
        **state,
        'gradients': state['parameters'] * (1 if parts == 1 else 2),  # a part's, and their sum
        'gathered parameters': cost.parameters * weight if config.train.fsdp else 0,
        'activations': cost.activations[config.model.remat] * images / parts,
        'images': 2 * images * math.prod(build.image_shape(config)),  # this batch and the next, uint8
    }


def largest_batch(available, others, an_image):
    """Images that a device can compute at once, each taking `an_image` bytes, with `others` for all else."""
    return max(math.floor((available - others) / an_image), 0)


def variants(config, cost, aim):
    """A row for each choice of fsdp and remat, as dicts; flops: of a step on one device.

    days, hours (of all devices together) and cost (in the currency of config.plan.price): None where not known.
    """
    rows = []
    for fsdp in (False, True):
        for remat in (False, True):
            need = memory(changed(config, {'train.fsdp': fsdp, 'model.remat': remat}), cost, aim.count)
            total, activations = sum(need.values()), cost.activations[remat]
            images = config.train.batch_size / aim.count
            flops = cost.flops[remat] * images + cost.update_flops / (aim.count if fsdp else 1)
            days = aim.peak and config.train.num_steps * flops / (aim.peak * config.plan.utilisation) / 86400
            hours = days and days * 24 * aim.count
            cost_of_all = config.plan.price and hours and hours * config.plan.price
            largest = largest_batch(aim.to_fill(), total - need['activations'], activations)
            rows.append({'fsdp': fsdp, 'remat': remat, 'bytes': need, 'total': total, 'largest_batch': largest,
                         'flops': flops, 'days': days, 'hours': hours, 'cost': cost_of_all or None})  # fmt: skip
    return rows


def what_fits(config, cost, aim):
    """Yields the changes under which a step fits, as {field: value}, the least first: {} if it fits as it is.

    In the order of what they cost: the batch in more parts, fsdp, remat (a third more FLOPs), and both.
    """
    images = config.train.batch_size // aim.count
    asked = {'train.accumulation_steps': config.train.accumulation_steps, 'train.fsdp': config.train.fsdp,
             'model.remat': config.model.remat}  # fmt: skip
    for remat in sorted({config.model.remat, True}):
        for fsdp in sorted({config.train.fsdp, True}):
            for parts in range(config.train.accumulation_steps, images + 1):
                values = dict(zip(asked, (parts, fsdp, remat)))
                if (
                    images % parts == 0
                    and sum(memory(changed(config, values), cost, aim.count).values()) <= aim.to_fill()
                ):
                    yield {field: value for field, value in values.items() if value != asked[field]}


# The step itself, compiled


def lowered_step(config, mesh):
    """The training step that training runs, lowered for the devices of `mesh`."""
    _, state, step = train.sharded(config, mesh)
    images = (config.train.batch_size, *build.image_shape(config))
    batch = {'image': jax.ShapeDtypeStruct(images, np.uint8), 'label': jax.ShapeDtypeStruct(images[:1], np.int32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return step.lower(state, sharding.abstract(batch, split), sharding.abstract(key, whole))


@contextlib.contextmanager
def shown(what):
    """Within, prints every so often for how long `what` has been going on."""
    finished, start = threading.Event(), time.monotonic()

    def show():
        while not finished.wait(_PROGRESS_SECONDS):
            print(f'{what} for {duration(time.monotonic() - start)}', flush=True)

    threading.Thread(target=show, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


def compiled(lowered, count):
    """What XLA makes of a lowered step, as a dict: seconds, and bytes a device; or why it 'refused', not fitting it."""
    start = time.monotonic()
    try:
        with shown('compiling'):
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return {'seconds': time.monotonic() - start, 'refused': str(error).splitlines()[0]}
    seconds, sizes = time.monotonic() - start, program.memory_analysis()
    parts = {
        'arguments': sizes.argument_size_in_bytes,
        'temporary': sizes.temp_size_in_bytes,
        'results': sizes.output_size_in_bytes - sizes.alias_size_in_bytes,  # what is not written over the arguments
        'code': sizes.generated_code_size_in_bytes,
    }
    sent = hlo.sent_bytes(program.as_text(), count)
    return {'seconds': seconds, 'bytes': parts, 'total': sum(parts.values()), 'sent': sent}


def compiled_for(config, aim):
    """`compiled` of the config's step on the devices of `aim`."""
    name = 'jax_persistent_cache_min_compile_time_secs'
    before = getattr(jax.config, name)
    if config.plan.topology:
        jax.config.update(name, math.inf)  # programs for devices that are not there cannot be read back
    try:
        return compiled(lowered_step(config, sharding.make_mesh(aim.devices)), aim.count)
    finally:
        jax.config.update(name, before)


# What is shown


def _size(size):
    return f'{size / GIB:9.2f} GiB' if size >= GIB / 10 else f'{size / 2**20:9.2f} MiB'


def _flags(changes):
    return ' '.join(f'--config.{field}={value}' for field, value in changes.items())


def show_estimate(config, cost, aim, rows):
    """Prints the tables of what was counted."""
    images, parts = config.train.batch_size // aim.count, config.train.accumulation_steps
    (ours,) = [row for row in rows if (row['fsdp'], row['remat']) == (config.train.fsdp, config.model.remat)]
    print(
        f'{cost.parameters:,} parameters; batch {config.train.batch_size:,}, {images} images a device in {parts} parts'
    )
    print('\nA device needs, estimated')
    for use, size in ours['bytes'].items():
        print(f'  {use:20}{_size(size)}')
    fits = 'it fits' if ours['total'] <= aim.to_fill() else 'it does not fit'
    room = f'{aim.to_fill() / GIB:.2f}, {_TO_FILL:.0%} of what there is'
    print(f'  {"in all":20}{_size(ours["total"])} of {room}: {fits}')
    at, price = f'{config.plan.utilisation:.0%}', config.plan.price
    print(
        f'\n  fsdp  remat       a device   most images at once   TFLOP a step   days at {at}   device-hours'
        + (f'   cost at {price:g}' if price else '')
    )
    for row in rows:
        yes_no = [('no', 'yes')[row[key]] for key in ('fsdp', 'remat')]
        days = '-' if row['days'] is None else f'{row["days"]:.3g}'
        hours, costs = ('-' if row[key] is None else f'{row[key]:,.0f}' for key in ('hours', 'cost'))
        print(
            f'  {yes_no[0]:5} {yes_no[1]:5} {_size(row["total"])} {row["largest_batch"]:21,} '
            f'{row["flops"] / 1e12:14.4g} {days:>13} {hours:>14}' + (f' {costs:>14}' if price else '')
        )
    if aim.peak is None:
        print(f'No days: the peak FLOP/s of {aim.name} in {config.model.dtype} are not known here.')


def show_compiled(result, aim):
    """Prints what XLA made of the step."""
    took = f'in {duration(result["seconds"])}'
    if 'refused' in result:
        print(f'\nXLA cannot fit it (found {took}): {result["refused"]}')
        return
    print(f'\nA device needs, compiled {took}')
    for use, size in result['bytes'].items():
        print(f'  {use:20}{_size(size)}')
    print(f'  {"in all":20}{_size(result["total"])} of {aim.memory / GIB:.2f}')
    for kind, size in result['sent'].items():
        print(f'  {kind + ", sent a step":32}{size / 1e6:12.3f} MB')


def run(config, workdir):
    """Prints the plan and writes it to `workdir`/plan.json."""
    aim = target(config.plan.topology, config.plan.compile)
    check_config(config)
    sharding.check_batch_size(
        config.train.batch_size, config.train.accumulation_steps, AbstractMesh((aim.count,), ('data',))
    )
    if config.model.dtype != 'bfloat16' and 'TPU' not in aim.name:
        aim = aim._replace(peak=None)  # a TPU's products of float32 are of bfloat16 too, as JAX has them
    peak = '' if aim.peak is None else f' and {aim.peak / 1e12:.0f} TFLOP/s (bfloat16, peak)'
    print(f'{aim.name}: {aim.count} devices, each with {aim.memory / GIB:.2f} GiB{peak}\ncounting', flush=True)
    with shown('counting'):
        cost = costs(config, aim.count)
    rows = variants(config, cost, aim)
    show_estimate(config, cost, aim, rows)
    fitting = what_fits(config, cost, aim)
    changes, result = next(fitting, None), None
    if changes:
        print(f'It fits with {_flags(changes)}')
    while config.plan.compile and changes is not None:
        print(f'\ncompiling the training step {_flags(changes)}'.rstrip(), flush=True)
        result = compiled_for(changed(config, changes), aim)
        show_compiled(result, aim)
        if 'refused' not in result:
            break
        changes = next(fitting, None)
    if changes is None:
        print('Neither more parts (config.train.accumulation_steps) nor fsdp and remat make it fit: use more devices.')
    plan = {
        'devices': {'name': aim.name, 'count': aim.count, 'memory': aim.memory, 'peak_flops': aim.peak},
        'parameters': cost.parameters,
        'estimates': rows,
        'utilisation': config.plan.utilisation,
        'fits_with': changes,
        'compiled': result,
        'config': config.to_dict(),
    }
    path = Path(workdir) / 'plan.json'
    files.write_json(path, plan)
    print(f'wrote {path}', flush=True)
