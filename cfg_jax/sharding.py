"""How arrays lie on the devices: one mesh of all of them, parameters on each, batches split over it."""

from collections import deque

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cfg_jax.errors import UserError


def make_mesh():
    """A mesh of all devices of all processes, its one axis named 'data'."""
    return jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))


def local_mesh():
    """A mesh of this process's own devices, for work that processes share out instead of doing it together.

    Of virtual CPU devices the first alone: they have the same cores, and XLA's convolutions differ from run to run in
    the last bit where two of them compute at once.
    """
    devices = jax.local_devices()
    if devices[0].platform == 'cpu':
        devices = devices[:1]
    return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def to_local(tree, mesh):
    """Global replicated arrays as arrays on the devices of a `local_mesh`, without a copy."""

    def local(array):
        if isinstance(array, np.ndarray):
            return jax.device_put(array, replicated(mesh))
        parts = [shard.data for shard in array.addressable_shards if shard.device in mesh.devices]
        return jax.make_array_from_single_device_arrays(array.shape, replicated(mesh), parts)

    return jax.tree.map(local, tree)


def replicated(mesh):
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def check_batch_size(batch_size, accumulation_steps, mesh):
    """Raises UserError unless the devices divide the batch, and the accumulation steps what each of them gets."""
    if batch_size < 1 or accumulation_steps < 1 or batch_size % (mesh.size * accumulation_steps):
        raise UserError(
            f'a batch of {batch_size} images does not divide over {mesh.size} devices x {accumulation_steps} '
            f'accumulation steps; use a multiple of {mesh.size * max(accumulation_steps, 1)} (config.train.batch_size).'
        )


def to_devices(batch, mesh):
    """This process's part of a batch (arrays, first axis = images) as global arrays, split over the mesh."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(batch_sharding(mesh), np.asarray(a)), batch)


def prefetch(batches, mesh, depth=2):
    """(batch on the devices, position after it) for each of `data.pipeline.Batches`, sent `depth` - 1 ahead of use.

    The copies run while the devices compute; the position is that of the batch handed out, not of the one sent last.
    """
    ahead = deque()
    while True:
        while len(ahead) < depth:
            ahead.append((to_devices(next(batches), mesh), batches.position))
        yield ahead.popleft()
