"""Estimates of what a training step needs on a number of devices: memory, FLOPs and time, without compiling it."""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np

# XLA's temporaries divided by the outputs of convolutions and products: 1.35 and 1.32 for the paper's ImageNet 64x64
# and 128x128, compiled for v5e and v4 (docs/scaling.md).
_TEMPORARIES_PER_PRODUCT = 1.34


@dataclasses.dataclass(frozen=True)
class Step:
    """The settings of a training step that its memory and speed depend on.

    itemsize: bytes of a number that the network computes with. image_bytes: of one image, uint8.
    """

    batch_size: int
    accumulation_steps: int
    fsdp: bool
    remat: bool
    itemsize: int
    image_bytes: int


class Costs(NamedTuple):
    """The costs of a training step on a number of devices.

    parameters: their number. state: bytes per device of each part of the state, {fsdp: {part: bytes}}. activations:
    bytes per image, {remat: bytes}. flops: FLOPs per image, {remat: FLOPs}. update_flops: FLOPs of the optimizer's
    update.
    """

    parameters: int
    state: dict[bool, dict[str, int]]
    activations: dict[bool, float]
    flops: dict[bool, float]
    update_flops: float


# ---------------------------------------------------------------- counting


def state_bytes(state):
    """Return the bytes per device of the parts of an abstract `TrainState` with shardings.

    They are {'parameters', 'EMA', 'optimizer'}, and 'teacher' in distillation.
    """

    def per_device(tree):
        shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
        return sum(math.prod(shape) * itemsize for shape, itemsize in shards)

    parts = {'parameters': state.params, 'EMA': state.ema_params, 'optimizer': state.opt_state}
    parts |= {} if state.teacher_params is None else {'teacher': state.teacher_params}
    return {name: per_device(tree) for name, tree in parts.items()}


def activation_bytes(loss, params, image_shape, *, remat):
    """Return roughly the bytes per image that a training step keeps for its backward pass.

    loss(params, x, labels, key) -> `losses.Loss`; params: their shapes. XLA keeps the outputs of convolutions and
    matrix products and a little more; it computes cheap things again. With remat only what passes from block to block
    is counted, not what one block needs.
    """

    def kept(num_images, policy):
        return _kept_bytes(loss, params, (num_images, *image_shape), policy)

    policies = [None] if remat else [None, _is_product]
    return _TEMPORARIES_PER_PRODUCT * min(kept(2, policy) - kept(1, policy) for policy in policies)


def _is_product(primitive, *_, **__):
    return primitive.name in ('conv_general_dilated', 'dot_general')


def _kept_bytes(loss, params, images_shape, policy):
    """Return the bytes kept for the backward pass: all that JAX keeps, or what `policy` allows."""

    def backward(params, images, labels):
        def mean_loss(params):
            return loss(params, images, labels, jax.random.key(0)).loss.mean()

        return jax.vjp(jax.checkpoint(mean_loss, policy=policy) if policy else mean_loss, params)[1]

    images = jax.ShapeDtypeStruct(images_shape, np.float32)
    kept = jax.eval_shape(backward, params, images, jax.ShapeDtypeStruct(images_shape[:1], np.int32))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


# ---------------------------------------------------------------- from costs to a plan


def memory(step, cost, count):
    """Return the estimated bytes per device by use, as a dict; the step needs their sum on `count` devices."""
    state, images = cost.state[step.fsdp], step.batch_size / count
    return {
        **state,
        # those of one part, and the sum over parts
        'gradients': state['parameters'] * (1 if step.accumulation_steps == 1 else 2),
        'gathered parameters': cost.parameters * step.itemsize if step.fsdp else 0,
        'activations': cost.activations[step.remat] * images / step.accumulation_steps,
        'images': 2 * images * step.image_bytes,  # this batch and the next
    }


def largest_batch(available, others, per_image):
    """Return how many images of `per_image` bytes fit into `available` bytes beside `others`."""
    return max(math.floor((available - others) / per_image), 0)


def variants(step, cost, target, *, num_steps, utilisation, price=0.0):
    """Return a row, a dict, for each choice of fsdp and remat; flops are those of a step on one device.

    days, hours (device-hours of all devices) and cost (in the currency of `price` per device-hour) are None if unknown.
    """
    rows = []
    for fsdp in (False, True):
        for remat in (False, True):
            need = memory(dataclasses.replace(step, fsdp=fsdp, remat=remat), cost, target.count)
            total, activations = sum(need.values()), cost.activations[remat]
            images = step.batch_size / target.count
            flops = cost.flops[remat] * images + cost.update_flops / (target.count if fsdp else 1)
            days = target.peak and num_steps * flops / (target.peak * utilisation) / 86400
            hours = days and days * 24 * target.count
            largest = largest_batch(target.usable_memory(), total - need['activations'], activations)
            row = {'fsdp': fsdp, 'remat': remat, 'bytes': need, 'total': total, 'largest_batch': largest}
            rows.append(
                {**row, 'flops': flops, 'days': days, 'hours': hours, 'cost': (hours and price * hours) or None}
            )
    return rows


def what_fits(step, cost, target):
    """Yield the changes that make a step fit, as {config field: value}, cheapest first; {} if it fits unchanged.

    The order: more accumulation steps, fsdp, remat (a third more FLOPs), fsdp and remat.
    """
    images = step.batch_size // target.count
    fields = {'accumulation_steps': 'train.accumulation_steps', 'fsdp': 'train.fsdp', 'remat': 'model.remat'}
    for remat in sorted({step.remat, True}):
        for fsdp in sorted({step.fsdp, True}):
            for parts in range(step.accumulation_steps, images + 1):
                values = {'accumulation_steps': parts, 'fsdp': fsdp, 'remat': remat}
                need = memory(dataclasses.replace(step, **values), cost, target.count)
                if images % parts == 0 and sum(need.values()) <= target.usable_memory():
                    yield {fields[key]: value for key, value in values.items() if value != getattr(step, key)}
