"""Training of a small network in memory, in seconds: no files, no checkpoints."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

from cfg_jax.progress import Progress


def fit(
    loss: Callable, params: Any, *, num_steps: int, learning_rate: float, key: jax.Array, name: str, parts: int = 10
) -> tuple[Any, list[float]]:
    """Minimise loss(params, key), which draws its own batch, by Adam with a cosine decay to 0.

    Returns (parameters, the mean loss of each part of the steps). A part is one compiled loop, after which a progress
    line with this name may be printed.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def step(carry, step_key):
        params, opt_state = carry
        value, gradient = jax.value_and_grad(loss)(params, step_key)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    steps = jax.jit(partial(jax.lax.scan, step))
    size, losses, progress = -(-num_steps // parts), [], Progress(num_steps, compiles=True)
    carry, keys = (params, optimizer.init(params)), jax.random.split(key, num_steps)
    with progress.watched(name, unit='steps'):
        for start in range(0, num_steps, size):
            carry, values = steps(carry, keys[start : start + size])
            losses.append(float(values.mean()))
            progress.show(min(start + size, num_steps), name, unit='steps', every=5.0)
    return carry[0], losses
