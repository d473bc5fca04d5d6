"""How arrays lie on the devices: one mesh of all of them, parameters on each, batches split over it."""

from collections import deque

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cfg_jax.errors import UserError


def make_mesh():
    """A mesh of all devices of all processes, its one axis named 'data'."""
    return jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))


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


def whole_to_devices(values, mesh):
    """A host array that every process holds whole, as a global one split over the mesh."""
    return jax.make_array_from_callback(values.shape, batch_sharding(mesh), lambda part: values[part])


def to_host(array):
    """A global array as a whole numpy array, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def prefetch(batches, mesh, depth=2):
    """(batch on the devices, position after it) for each of `data.pipeline.Batches`, sent `depth` - 1 ahead of use.

    The copies run while the devices compute; the position is that of the batch handed out, not of the one sent last.
    """
    ahead = deque()
    while True:
        while len(ahead) < depth:
            ahead.append((to_devices(next(batches), mesh), batches.position))
        yield ahead.popleft()
