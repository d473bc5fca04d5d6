"""The planning job: what training a config needs on a slice of TPUs or on the devices here, before it begins."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from cfg_jax import build, files
from cfg_jax.checks import check_config
from cfg_jax.config import changed
from cfg_jax.planning import compiling, devices, estimate
from cfg_jax.planning.devices import GIB
from cfg_jax.progress import duration, shown
from cfg_jax.training import sharding


def run(config, workdir):
    """Print the plan and write it to `workdir`/plan.json."""
    target = devices.target(config.plan.topology, config.plan.compile)
    check_config(config)
    sharding.check_batch_size(
        config.train.batch_size, config.train.accumulation_steps, AbstractMesh((target.count,), ('data',))
    )
    if config.model.dtype != 'bfloat16' and 'TPU' not in target.name:
        target = target._replace(peak=None)  # known for bfloat16 alone; on TPUs JAX multiplies float32 as bfloat16 too
    peak = '' if target.peak is None else f' and {target.peak / 1e12:.0f} TFLOP/s (bfloat16, peak)'
    print(f'{target.name}: {target.count} devices, each with {_size(target.memory)}{peak}', flush=True)
    with shown('counting'):
        cost = costs(config, target.count)
    rows = estimate.variants(
        step_of(config),
        cost,
        target,
        num_steps=config.train.num_steps,
        utilisation=config.plan.utilisation,
        price=config.plan.price,
    )
    print_estimate(config, cost, target, rows)
    changes, result = find_fitting(config, cost, target)
    plan = {
        'devices': {'name': target.name, 'count': target.count, 'memory': target.memory, 'peak_flops': target.peak},
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


# ---------------------------------------------------------------- the costs of the config's step


def step_of(config):
    """Return the config's `estimate.Step`."""
    return estimate.Step(
        batch_size=config.train.batch_size,
        accumulation_steps=config.train.accumulation_steps,
        fsdp=config.train.fsdp,
        remat=config.model.remat,
        itemsize=jnp.dtype(config.model.dtype).itemsize,
        image_bytes=math.prod(build.image_shape(config)),
    )


def costs(config, count):
    """Return the `estimate.Costs` of a config on `count` devices."""
    by_remat = {remat: changed(config, {'model.remat': remat}) for remat in (False, True)}
    one, two, two_remat = step_flops(by_remat[False], 1), step_flops(by_remat[False], 2), step_flops(by_remat[True], 2)
    update = 2 * one - two
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    return estimate.Costs(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        state={fsdp: state_bytes(changed(config, {'train.fsdp': fsdp}), count) for fsdp in (False, True)},
        activations={
            remat: estimate.activation_bytes(build.loss(variant), params, build.image_shape(config), remat=remat)
            for remat, variant in by_remat.items()
        },
        flops={False: two - one, True: (two_remat - update) / 2},
        update_flops=update,
    )


def state_bytes(config, count):
    """Return the bytes on each of `count` devices of each part of the state, split if config.train.fsdp."""
    return estimate.state_bytes(build.sharded_training(config, AbstractMesh((count,), ('data',)))[1])


def step_flops(config, num_images):
    """Return the FLOPs of a training step of `num_images`: XLA's count of the lowered program, with recomputation."""
    alone = {'train.batch_size': num_images, 'train.accumulation_steps': 1, 'train.fsdp': False}
    mesh = sharding.make_mesh(jax.local_devices(backend='cpu')[:1])
    return lowered_step(changed(config, alone), mesh).cost_analysis()['flops']


def lowered_step(config, mesh):
    """Return the training step, lowered for the devices of `mesh`."""
    _, state, step = build.sharded_training(config, mesh)
    images = (config.train.batch_size, *build.image_shape(config))
    batch = {'image': jax.ShapeDtypeStruct(images, np.uint8), 'label': jax.ShapeDtypeStruct(images[:1], np.int32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return step.lower(state, sharding.abstract(batch, split), sharding.abstract(key, whole))


# ---------------------------------------------------------------- changes under which it fits


def find_fitting(config, cost, target):
    """Return (changes under which a step fits, the compiled step), printing both; None for what there is not.

    Where XLA refuses the first changes that fit by the estimate, the next are compiled.
    """
    fitting = estimate.what_fits(step_of(config), cost, target)
    changes, result = next(fitting, None), None
    if changes:
        print(f'It fits with {_flags(changes)}')
    while config.plan.compile and changes is not None:
        print(f'\ncompiling the training step {_flags(changes)}'.rstrip(), flush=True)
        result = compiled_for(changed(config, changes), target)
        print_compiled(result, target)
        if 'refused' not in result:
            break
        changes = next(fitting, None)
    if changes is None:
        print(
            'Neither more accumulation steps (config.train.accumulation_steps) nor fsdp and remat make it fit: use '
            'more devices.'
        )
    return changes, result


def compiled_for(config, target):
    """Return the config's step compiled for the devices of `target`, as `compiling.compiled` describes it."""
    name = 'jax_persistent_cache_min_compile_time_secs'
    before = getattr(jax.config, name)
    if config.plan.topology:
        jax.config.update(name, math.inf)  # programs for devices that are not here cannot be read back
    try:
        lowered = lowered_step(config, sharding.make_mesh(target.devices))
        return compiling.compiled(lowered, target.count)
    finally:
        jax.config.update(name, before)


# ---------------------------------------------------------------- printing


def _size(size):
    return f'{size / GIB:.2f} GiB' if size >= GIB / 10 else f'{size / 2**20:.2f} MiB'


def _flags(changes):
    return ' '.join(f'--config.{field}={value}' for field, value in changes.items())


def print_estimate(config, cost, target, rows):
    """Print the tables of the estimate."""
    images, parts = config.train.batch_size // target.count, config.train.accumulation_steps
    (asked,) = [row for row in rows if (row['fsdp'], row['remat']) == (config.train.fsdp, config.model.remat)]
    print(
        f'{cost.parameters:,} parameters; batch {config.train.batch_size:,}, {images} images per device in {parts} '
        'accumulation steps'
    )
    print('\nEach device needs, estimated')
    for use, size in asked['bytes'].items():
        print(f'  {use:20}{_size(size):>13}')
    fits = 'it fits' if asked['total'] <= target.usable_memory() else 'it does not fit'
    usable = f'{_size(target.usable_memory())}, {devices.USABLE_FRACTION:.0%} of its memory'
    print(f'  {"in all":20}{_size(asked["total"]):>13} of {usable}: {fits}')
    at, price = f'{config.plan.utilisation:.0%}', config.plan.price
    print(
        f'\n  fsdp  remat     per device   most images at once  TFLOP per step   days at {at}   device-hours'
        + (f'   cost at {price:g}' if price else '')
    )
    for row in rows:
        yes_no = [('no', 'yes')[row[key]] for key in ('fsdp', 'remat')]
        days = '-' if row['days'] is None else f'{row["days"]:.3g}'
        hours, costs = ('-' if row[key] is None else f'{row[key]:,.0f}' for key in ('hours', 'cost'))
        print(
            f'  {yes_no[0]:5} {yes_no[1]:5} {_size(row["total"]):>13} {row["largest_batch"]:21,} '
            f'{row["flops"] / 1e12:14.4g} {days:>13} {hours:>14}' + (f' {costs:>14}' if price else '')
        )
    if target.peak is None:
        print(f'No days: the peak FLOP/s of {target.name} in {config.model.dtype} are not known.')


def print_compiled(result, target):
    """Print the memory and the traffic of the compiled step."""
    took = f'in {duration(result["seconds"])}'
    if 'refused' in result:
        print(f'\nXLA cannot fit it (found {took}): {result["refused"]}')
        return
    print(f'\nEach device needs, compiled {took}')
    for use, size in result['bytes'].items():
        print(f'  {use:20}{_size(size):>13}')
    print(f'  {"in all":20}{_size(result["total"]):>13} of {_size(target.memory)}')
    for kind, size in result['sent'].items():
        print(f'  {kind + ", sent per step":32}{size / 1e6:12.3f} MB')
