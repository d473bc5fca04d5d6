r"""Tables of how memory, traffic between devices and the host's work depend on the number of devices.

    PYTHONPATH=. python benchmarks/scaling.py memory     # bytes per device of parameters, EMA and optimizer state
    PYTHONPATH=. python benchmarks/scaling.py sent       # bytes that a device sends in a step, compiled for TPU v5e
    PYTHONPATH=. python benchmarks/scaling.py host       # Python calls and arrays of a process in a step
    PYTHONPATH=. python benchmarks/scaling.py slices     # the plans in the table of docs/slices.md

None of it needs accelerators. Memory is measured on virtual CPU devices for the digits and counted for ImageNet 64x64.
Traffic is read from the programs that XLA compiles for slices of up to 256 chips, for two networks with 4 images per
device (needs libtpu: pip install -e '.[tpu]'). The host's work is counted in separate processes. docs/scaling.md shows
the first three tables, docs/slices.md the last.
"""

import argparse
import cProfile
import itertools
import json
import os
import pstats
import socket
import subprocess
import sys

from tests import tiny

SLICES = {1: '1x1', 2: '2x2', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
WIDTHS = {64: tuple(SLICES), 768: (4, 16, 64, 256)}  # channels: numbers of devices
PLANNED = {
    'imagenet64': ('v5e:8x16', 'v6e:4x8'),
    'imagenet128': ('v5e:8x8', 'v6e:4x4'),
    'imagenet256': ('v5e:8x16', 'v6e:4x8'),
    'adm64': ('v5e:8x16', 'v6e:4x8'),
    'adm128': ('v5e:8x8', 'v6e:4x4'),
    'adm256': ('v5e:8x16', 'v6e:4x8'),
    'adm256_uncond': ('v5e:8x16', 'v6e:4x8'),
    'imagenet64_classifier': ('v5e:4x4',),
    'imagenet128_classifier': ('v5e:2x4',),
    'imagenet256_classifier': ('v5e:4x4',),
}
SMALL = {'model__num_groups': 32, 'model__dtype': 'bfloat16'}


def child(what, *arguments, devices=1, **environment):
    """Start a part of this script as a process with this many virtual devices."""
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
    command = [sys.executable, __file__, what, '--child', *map(str, arguments)]
    variables = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, **environment}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)


def result(process):
    """Return the last line that a process of `child` prints, read as JSON."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f'a process ended with {process.returncode}')
    return json.loads(out.splitlines()[-1])


def memory():
    """Print bytes per device, measured from the arrays of the digits and counted for ImageNet 64x64."""
    measured = result(child('memory', devices=8))
    print('| devices | digits, whole | digits, fsdp | ImageNet 64, whole | ImageNet 64, fsdp |')
    print('| --- | --- | --- | --- | --- |')
    for count, (whole, split, whole64, split64) in measured.items():
        print(f'| {count} | {whole:,} | {split:,} | {whole64 / 1e9:.3f} GB | {split64 / 1e9:.3f} GB |', flush=True)


def memory_child():
    import jax

    from cfg_jax import build
    from cfg_jax import config as configs
    from cfg_jax.jobs import plan
    from cfg_jax.training import sharding

    table, digits, imagenet = {}, tiny.load_config('digits'), tiny.load_config('imagenet64')
    for count in (1, 2, 4, 8):
        mesh, row = sharding.make_mesh(jax.devices()[:count]), []
        for fsdp in (False, True):
            state = build.sharded_training(configs.changed(digits, {'train.fsdp': fsdp}), mesh)[0]()
            leaves = jax.tree.leaves((state.params, state.ema_params, state.opt_state))
            first = [shard for leaf in leaves for shard in leaf.addressable_shards if shard.device.id == 0]
            row.append(sum(shard.data.nbytes for shard in first))
        for fsdp in (False, True):
            row.append(sum(plan.state_bytes(configs.changed(imagenet, {'train.fsdp': fsdp}), count).values()))
        table[count] = row
    print(json.dumps(table))


def sent():
    """Print the bytes that a device sends, by kind of collective."""
    cases = [(channels, count) for channels, counts in WIDTHS.items() for count in counts]
    print('| devices | | parameters | all-reduce | all-gather | reduce-scatter | other | total |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- |')
    for (channels, count), fsdp in itertools.product(cases, (False, True)):
        found = result(child('sent', count, int(fsdp), channels))
        kinds = [found['sent'].pop(kind, 0) for kind in ('all-reduce', 'all-gather', 'reduce-scatter')]
        kinds += [sum(found['sent'].values())]
        numbers = ' | '.join(f'{size:,}' for size in (*kinds, sum(kinds)))
        how = 'fsdp' if fsdp else 'data parallel'
        print(f'| {count} | {how} | {found["parameters"]:,} | {numbers} |', flush=True)


def sent_child(count, fsdp, channels):
    import jax

    from cfg_jax import build
    from cfg_jax.jobs import plan
    from cfg_jax.planning import devices

    count, fsdp, channels = int(count), bool(int(fsdp)), int(channels)
    topology = f'v5e:{SLICES[count]}'
    changes = {'model__channels': channels, 'train__batch_size': 4 * count, 'train__fsdp': fsdp}
    config = tiny.config(**SMALL, **changes, plan__topology=topology)
    target = devices.target(topology, compiling=True)
    target = target._replace(count=count, devices=target.devices[:count])  # two chips are half of a slice of four
    made = plan.compiled_for(config, target)
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    print(json.dumps({'sent': made['sent'], 'parameters': sum(leaf.size for leaf in jax.tree.leaves(params))}))


def host():
    """Print what a process does for a step: alone with several devices, and among others with one device each."""
    print('| processes | devices per process | Python calls | arrays sent to devices | bytes sent to devices |')
    print('| --- | --- | --- | --- | --- |')
    for processes, devices in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1)):
        job = [{}]
        if processes > 1:
            with socket.socket() as server:
                server.bind(('localhost', 0))
                address = f'localhost:{server.getsockname()[1]}'
            shared = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(processes)}
            job = [{**shared, 'JAX_PROCESS_ID': str(index)} for index in range(processes)]
        started = [child('host', devices=devices, **environment) for environment in job]
        found = max((result(process) for process in started), key=lambda each: each['calls'])
        print(f'| {processes} | {devices} | {found["calls"]:,} | {found["arrays"]} | {found["bytes"]:,} |', flush=True)


def host_child():
    from cfg_jax import runtime
    from cfg_jax.distributed import join

    runtime.configure()
    join.join()
    import jax

    from cfg_jax import build
    from cfg_jax.distributed import processes
    from cfg_jax.training import sharding

    mesh = sharding.make_mesh()
    config = tiny.config(train__batch_size=4 * mesh.size, train__fsdp=True)
    init, _, step = build.sharded_training(config, mesh)
    batches = build.train_batches(config, build.source(config), mesh)
    on_devices, state, key = sharding.prefetch(batches, mesh), init(), jax.random.key(0)
    step.lower(state, next(on_devices)[0], key).compile()
    processes.wait_for_all('compiled')  # as training does

    def one_step():
        nonlocal state
        batch, _ = next(on_devices)
        state, metrics = step(state, batch, key)
        jax.device_get(metrics)
        return batch

    for _ in range(3):
        batch = one_step()
    profile, steps = cProfile.Profile(), 20
    with profile:
        for _ in range(steps):
            batch = one_step()
    batches.close()
    shards = [shard.data for array in batch.values() for shard in array.addressable_shards]
    calls = round(pstats.Stats(profile).total_calls / steps)
    print(json.dumps({'calls': calls, 'arrays': len(shards), 'bytes': sum(shard.nbytes for shard in shards)}))
    if jax.process_count() > 1:
        jax.distributed.shutdown()  # waits for the others, which end when process 0 does


def slices():
    """Print a row for each ImageNet config and TPU slice, estimated as by `--mode=plan` without compiling."""
    import jax

    jax.config.update('jax_platforms', 'cpu')
    from cfg_jax import config as configs
    from cfg_jax.jobs import plan
    from cfg_jax.planning import devices, estimate

    columns = ('config', 'total FLOP', 'state', 'slice', 'images per chip', 'GiB per chip, estimated', 'step', 'days')
    print(f'| {" | ".join(columns)} | chip-hours |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- | --- |')
    for name, topologies in PLANNED.items():
        config = tiny.load_config(name)
        counted = plan.costs(config, 1)
        state = sum(counted.state[False].values()) / 1e9
        first = f'`{name}.py`'
        for topology in topologies:
            target = devices.target(topology, compiling=False)
            cost = counted._replace(
                state={fsdp: plan.state_bytes(configs.changed(config, {'train.fsdp': fsdp}), target.count)
                       for fsdp in (False, True)}
            )  # fmt: skip
            changes = next(estimate.what_fits(plan.step_of(config), cost, target))
            fitting = configs.changed(config, changes)
            need = sum(estimate.memory(plan.step_of(fitting), cost, target.count).values()) / devices.GIB
            rates = {'num_steps': config.train.num_steps, 'utilisation': config.plan.utilisation}
            (row,) = [
                row
                for row in estimate.variants(plan.step_of(fitting), cost, target, **rates)
                if (row['fsdp'], row['remat']) == (fitting.train.fsdp, fitting.model.remat)
            ]
            seconds = row['days'] * 86400 / config.train.num_steps
            total = row['flops'] * target.count * config.train.num_steps
            start = f'{first} | {total:.1e} | {state:.1f} GB' if first else ' | | '
            with_them = ', '.join(f'{field.split(".")[1]}={value}' for field, value in changes.items())
            memory = f'{need:.1f} of {target.memory / devices.GIB:.1f}' + (f' with {with_them}' if changes else '')
            kind, shape = topology.split(':')
            kind = {'v5e': 'v5litepod'}.get(kind, kind)
            print(
                f'| {start} | `{kind}-{target.count}` ({shape}) | {config.train.batch_size // target.count} | {memory} '
                f'| {seconds:.2f} s | {row["days"]:.1f} | {round(row["hours"], -1):,.0f} |',
                flush=True,
            )
            first = ''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', choices=('memory', 'sent', 'host', 'slices'))
    parser.add_argument('--child', nargs='*', help=argparse.SUPPRESS)
    options = parser.parse_args()
    name = options.table if options.child is None else f'{options.table}_child'
    globals()[name](*options.child or ())


if __name__ == '__main__':
    main()
