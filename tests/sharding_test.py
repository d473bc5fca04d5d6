"""How a state lies on the devices. A process of eight virtual devices writes what the tests compare."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from cfg_jax import build
from cfg_jax.config import changed
from cfg_jax.jobs import plan
from cfg_jax.planning import hlo
from cfg_jax.training import sharding
from cfg_jax.training.checkpoints import Checkpoints
from tests import tiny

STEPS, COUNTS = 8, (1, 2, 8)
COMPOSED = {
    'accumulation': {'train.accumulation_steps': 2},
    'all': {'train.accumulation_steps': 4, 'model.remat': True, 'model.dtype': 'bfloat16'},
}


def tiny_config(**changes):
    return changed(tiny.config(model__channels=16, train__num_steps=STEPS, optim__learning_rate=0.005), changes)


def mesh_of(count):
    return sharding.make_mesh(jax.devices()[:count])


def trained(count, changes):
    """(losses, the state) after STEPS steps on so many devices."""
    config, mesh = tiny_config(**changes), mesh_of(count)
    init, _, step = build.sharded_training(config, mesh)
    state, key, losses = init(), jax.random.key(3), []
    batches = build.train_batches(config, build.source(config))
    for _ in range(STEPS):
        state, metrics = step(state, sharding.to_devices(next(batches), mesh), key)
        losses.append(float(metrics['loss']))
    batches.close()
    return losses, state


def bytes_a_device(state):
    """Of parameters, EMA and optimizer state, as they lie on the first device."""
    leaves = jax.tree.leaves((state.params, state.ema_params, state.opt_state))
    return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device.id == 0)


def restored(folder, state):
    """The checkpoint of `state` on other devices, with and without fsdp: [[bytes a device, planned, as saved?]]."""
    checkpoints, found = Checkpoints(folder, {}), {False: [], True: []}
    checkpoints.save(STEPS, state, config={}, class_names=())
    for fsdp in found:
        config = tiny_config(**{'train.fsdp': fsdp})
        for count in COUNTS:
            tree = checkpoints.restore(build.sharded_training(config, mesh_of(count))[1]).tree
            same = jax.tree.map(np.array_equal, jax.device_get(tree), jax.device_get(state))
            planned = sum(plan.state_bytes(config, count).values())
            found[fsdp].append([bytes_a_device(tree), planned, all(jax.tree.leaves(same))])
    checkpoints.close()
    return found


def known_collectives():
    """`hlo.collectives` of a program whose collectives are known: [kind, bytes, times] each."""
    mesh = mesh_of(8)

    def body(x):  # [3, 100] on each device
        total = jax.lax.psum(x, 'data')
        every = jax.lax.all_gather(total[0], 'data')  # [8, 100]
        part = jax.lax.psum_scatter(every.ravel(), 'data', tiled=True)  # [100] of 800
        return jax.lax.fori_loop(0, 5, lambda i, y: jax.lax.psum(y * (i + 1), 'data'), part)

    split = PartitionSpec('data')
    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
    return hlo.collectives(program.lower(jnp.zeros((24, 100))).compile().as_text(), 8)


def write(folder):
    results = {'data parallel': trained(4, {})[0]}
    results['fsdp'], state = trained(4, {'train.fsdp': True})
    results['whole'], results['split'] = restored(folder / 'c', state).values()
    results['collectives'] = known_collectives()
    (folder / 'results.json').write_text(json.dumps(results))


def write_composed(folder):
    pairs = [[trained(4, {**how, 'train.fsdp': fsdp})[0] for fsdp in (False, True)] for how in COMPOSED.values()]
    (folder / 'results.json').write_text(json.dumps(pairs))


def on_eight_devices(part, folder):
    code = 'from tests import sharding_test\ngetattr(sharding_test, sys.argv[1])(Path(sys.argv[2]))\nsys.exit()'
    done = tiny.forked_main(part, folder, devices=8, patch=code)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / 'results.json').read_text())


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    return on_eight_devices('write', tmp_path_factory.mktemp('eight'))


def test_fsdp_trains_as_data_parallel_does(results):
    """Eight steps, to 1e-5 of the loss."""
    assert results['fsdp'][-1] < 0.9 * results['fsdp'][0]
    np.testing.assert_allclose(results['fsdp'], results['data parallel'], rtol=1e-5)


def test_a_checkpoint_reads_back_on_any_number_of_devices(results):
    """One of four devices with fsdp: on 1, 2 and 8, with and without, the same numbers in the bytes planned."""
    for size, planned, same in results['whole'] + results['split']:
        assert same and size == planned


def test_the_state_of_a_device_shrinks_with_their_number(results):
    whole, split = ([size for size, _, _ in results[key]] for key in ('whole', 'split'))
    assert whole == [whole[0]] * len(COUNTS) and split[0] == whole[0]
    leaves = jax.tree.leaves(jax.eval_shape(lambda: build.init_params(tiny_config(), jax.random.key(0))))
    small = 4 * 4 * sum(leaf.size for leaf in leaves if leaf.size < sharding.SPLIT_FROM)
    assert small < whole[0] / 4
    for count, size in zip(COUNTS, split):
        # 1/N of what is split (parameters, EMA, two moments), all of the rest: small arrays, counters
        np.testing.assert_allclose(size, small + (whole[0] - small) / count, atol=16)


def test_collectives_are_counted(results):
    assert sorted(results['collectives']) == [
        ['all-gather', 3200, 1],
        ['all-reduce', 400, 5],
        ['all-reduce', 1200, 1],
        ['reduce-scatter', 3200, 1],
    ]


@pytest.mark.slow
def test_fsdp_goes_with_accumulation_remat_and_bfloat16(tmp_path):
    """Each against data parallel, in the relative difference of any loss."""
    for (whole, split), allowed in zip(on_eight_devices('write_composed', tmp_path), (1e-5, 2e-2)):
        np.testing.assert_allclose(split, whole, rtol=allowed)


def test_the_longest_axis_that_divides_is_split():
    mesh = AbstractMesh((4,), ('data',))
    shapes = {
        (3, 3, 64, 128): PartitionSpec(None, None, None, 'data'),
        (3, 3, 128, 64): PartitionSpec(None, None, 'data'),
        (64, 64): PartitionSpec(None, 'data'),  # of equals the last
        (1001, 768): PartitionSpec(None, 'data'),  # four does not divide 1001
        (1023,): PartitionSpec(),  # small
        (1024,): PartitionSpec('data'),
        (35, 35): PartitionSpec(),
        (): PartitionSpec(),
    }
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    split, whole = (sharding.state_shardings(arrays, mesh, fsdp) for fsdp in (True, False))
    assert [each.spec for each in split] == list(shapes.values())
    assert {each.spec for each in whole} == {PartitionSpec()}
