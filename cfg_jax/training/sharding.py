"""How arrays lie on the devices: one mesh of all of them, batches split over it, parameters on each or split too."""

from collections import deque

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cfg_jax.errors import UserError

# Of fewer numbers than this an array is not split: sending it whole to each device costs more time than its 4 KiB are
# worth. In ADM's networks those are norms and biases, 0.06 % of all parameters.
SPLIT_FROM = 1024


def make_mesh(devices=None):
    """A mesh of these devices, or of all devices of all processes; its one axis is named 'data'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


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


def state_shardings(tree, mesh, fsdp):
    """A sharding for each array (or shape) of a training state: whole on every device, or with `fsdp` split over them.

    Split is the longest axis that the number of devices divides, the last of equals. Whole stay arrays of fewer than
    SPLIT_FROM numbers, and those without such an axis.
    """

    def sharding(array):
        axes = [axis for axis, length in enumerate(array.shape) if length % mesh.size == 0]
        if not fsdp or array.size < SPLIT_FROM or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: (array.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, 'data'))

    return jax.tree.map(sharding, tree)


def abstract(tree, shardings):
    """Shapes and dtypes of a tree of arrays, with these shardings (a tree like it, or one for all)."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def gathered(tree, mesh):
    """Split arrays as whole ones on every device. All processes have to call this together."""
    return jax.jit(_same, out_shardings=replicated(mesh))(tree)


def _same(tree):
    return tree  # one function, so that jit compiles it once


def batch_sharding(mesh):
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def process_rows(batch_size, mesh):
    """The numbers of the rows of a batch that lie on this process's devices, increasing, int64 [b].

    They need not follow each other: a mesh of TPUs has them in the order of their places in the slice.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(*rows.indices(batch_size)) for (rows,) in parts]))


def check_batch_size(batch_size, accumulation_steps, mesh):
    """Raises UserError unless the devices divide the batch, and the accumulation steps what each of them gets."""
    if batch_size < 1 or accumulation_steps < 1 or batch_size % (mesh.size * accumulation_steps):
        raise UserError(
            f'a batch of {batch_size} images does not divide over {mesh.size} devices x {accumulation_steps} '
            f'accumulation steps; use a multiple of {mesh.size * max(accumulation_steps, 1)} (config.train.batch_size).'
        )


def to_devices(batch, mesh):
    """The `process_rows` of a batch (arrays, first axis = images) as global arrays, split over the mesh."""
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
