"""Drawing any number of images with one compiled program, a unit of them on each device at a time."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cfg_jax import diffusion, runtime
from cfg_jax.errors import UserError
from cfg_jax.sampling.labels import check_labels


def image_batches(sample, mesh, *, batch_size, num_classes):
    """Return the jitted function (params, labels, weight, seed, ...) -> units.

    sample(params, seed, image indices [B], labels [B], weight, classifier_params, classifier_weight, weak_params) -> x
    in [-1, 1]. The last three are None, 0 and None by default.
    mesh: of this process's devices; all params lie on each of them (`sharding.to_local`). labels: int [N] on the host,
    checked here.

    A unit is `batch_size` consecutive images, which one device draws at once. Its program is the same for any number
    of devices and processes, so image i is the same to the bit wherever and with whichever other units it is drawn.
    units: the numbers of the wanted units; all of them by default. Yields one uint8 [B, H, W, C] numpy array per unit,
    in order; the last of the N images may end a shorter one. It compiles once, for any N. Raises UserError for an image
    whose numbers are not finite.
    """
    whole, split = PartitionSpec(), PartitionSpec('data')
    specs = {'in_specs': (whole, whole, split, split, whole, whole, whole, whole), 'out_specs': (split, split)}

    @partial(jax.jit, compiler_options=runtime.compiler_options(mesh))
    @partial(jax.shard_map, mesh=mesh, check_vma=False, **specs)
    def drawn(*arguments):
        x = sample(*arguments)
        return diffusion.to_uint8(x), jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))

    def batches(
        params, labels, weight, seed, classifier_params=None, classifier_weight=0.0, weak_params=None, *, units=None
    ):
        check_labels(labels, num_classes)
        guiding = np.float32(weight), classifier_params, np.float32(classifier_weight), weak_params
        units = range(math.ceil(len(labels) / batch_size)) if units is None else units

        def fetched(units, of_devices):
            images, finite = map(np.asarray, of_devices)
            for place, unit in enumerate(units):
                first, count = unit * batch_size, min(batch_size, len(labels) - unit * batch_size)
                rows = slice(place * batch_size, place * batch_size + count)
                check_finite(finite[rows], first, labels)
                yield images[rows]

        computing = None  # each batch is fetched after the next one has been dispatched
        for start in range(0, len(units), mesh.size):
            now = units[start : start + mesh.size]
            indices = np.add.outer(np.resize(now, mesh.size) * batch_size, np.arange(batch_size)).ravel()
            filled = labels[np.minimum(indices, len(labels) - 1)]
            on_devices = jax.device_put(
                (indices.astype(np.uint32), filled.astype(np.int32)), NamedSharding(mesh, split)
            )
            dispatched = now, drawn(params, np.uint32(seed), *on_devices, *guiding)
            if computing is not None:
                yield from fetched(*computing)
            computing = dispatched
        if computing is not None:
            yield from fetched(*computing)

    return batches


def check_finite(finite, first, labels):
    """Raise UserError unless all images are finite: bool [n], which begin with image `first` of those with `labels`."""
    if not finite.all():
        image = first + int(np.argmin(finite))
        raise UserError(
            f'image {image} (label {labels[image]}) holds NaN or infinity: use a smaller guidance weight '
            '(config.sample.guidance_weight, config.eval.guidance_weights, config.guidance.classifier_weight) or '
            "config.model.dtype='float32', or check your own guidance (config.guidance.function)."
        )
