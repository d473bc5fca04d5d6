"""Placing arrays on the devices: one mesh of all devices; batches are split over it, parameters copied or split."""

from collections import deque

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cfg_jax.errors import UserError

# Arrays with fewer numbers than this are not split: gathering one takes longer than its 4 KiB are worth. In ADM's
# networks these are norms and biases, 0.06 % of all parameters.
SPLIT_FROM = 1024


def make_mesh(devices=None):
    """Return a mesh of the given devices, by default of all devices of all processes; its one axis is 'data'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def local_mesh():
    """Return a mesh of this process's own devices, for work that processes divide instead of doing it together.

    On CPUs it has one device: virtual devices share the same cores, and XLA's convolutions differ from run to run in
    the last bit when two of them compute at once.
    """
    devices = jax.local_devices()
    if devices[0].platform == 'cpu':
        devices = devices[:1]
    return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def to_local(tree, mesh):
    """Return global replicated arrays as arrays on the devices of a `local_mesh`, without copying."""

    def local(array):
        if isinstance(array, np.ndarray):
            return jax.device_put(array, replicated(mesh))
        parts = [shard.data for shard in array.addressable_shards if shard.device in mesh.devices]
        return jax.make_array_from_single_device_arrays(array.shape, replicated(mesh), parts)

    return jax.tree.map(local, tree)


def replicated(mesh):
    """Return the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(tree, mesh, fsdp):
    """Return a sharding for each array (or shape) of a training state: whole on every device, or split with `fsdp`.

    The split axis is the longest that the number of devices divides, the last one among equals. Arrays of fewer than
    SPLIT_FROM numbers, and arrays without such an axis, stay whole.
    """

    def sharding(array):
        axes = [axis for axis, length in enumerate(array.shape) if length % mesh.size == 0]
        if not fsdp or array.size < SPLIT_FROM or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: (array.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, 'data'))

    return jax.tree.map(sharding, tree)


def abstract(tree, shardings):
    """Return shapes and dtypes of a tree of arrays with the given shardings (a like tree, or one for all)."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def gathered(tree, mesh):
    """Return split arrays as whole arrays on every device. All processes have to call it together."""
    return jax.jit(_same, out_shardings=replicated(mesh))(tree)


def _same(tree):
    return tree  # a named function, so that jit compiles it once


def whole(tree, placed):
    """Return host arrays, which are the same in all processes, as arrays with a `replicated` sharding."""
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, placed, lambda _: a), tree)


def batch_sharding(mesh):
    """Return the sharding that splits the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def process_rows(batch_size, mesh):
    """Return the numbers of the batch's rows on this process's devices, increasing, int64 [b].

    They need not be consecutive: a mesh of TPUs is in the order of their places in the slice.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(*rows.indices(batch_size)) for (rows,) in parts]))


def check_batch_size(batch_size, accumulation_steps, mesh):
    """Raise UserError unless the batch divides evenly over the devices and the accumulation steps."""
    if batch_size < 1 or accumulation_steps < 1 or batch_size % (mesh.size * accumulation_steps):
        raise UserError(
            f'a batch of {batch_size} images does not divide over {mesh.size} devices x {accumulation_steps} '
            f'accumulation steps; use a multiple of {mesh.size * max(accumulation_steps, 1)} (config.train.batch_size, '
            'config.train.accumulation_steps).'
        )


def to_devices(batch, mesh):
    """Return the `process_rows` of a batch (arrays, first axis: images) as global arrays, split over the mesh."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(batch_sharding(mesh), np.asarray(a)), batch)


def prefetch(batches, mesh, depth=2):
    """Yield (batch on the devices, position after it) for each of `data.pipeline.Batches`, sent `depth` - 1 ahead.

    Copies run while the devices compute. The position is that of the batch yielded, not of the last one sent.
    """
    ahead = deque()
    while True:
        while len(ahead) < depth:
            ahead.append((to_devices(next(batches), mesh), batches.position))
        yield ahead.popleft()
