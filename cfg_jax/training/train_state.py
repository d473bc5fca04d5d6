"""The state that a training step reads and writes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
    """The training state. step: int32 scalar, updates done. params, ema_params: float32 trees. opt_state: optax's.

    Parts that a run does not have are None, and are left out of its checkpoints. teacher_params: what distillation
    learns from. averages: {name: tree}, those of `optim.power_ema` that config.optim.ema_lengths asks for.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    teacher_params: Any = None
    averages: Any = None

    @classmethod
    def create(cls, params, optimizer, averages=()):
        """Return the state before the first step; averages, by name, start at the parameters themselves."""

        def copied():
            return jax.tree.map(jnp.copy, params)

        named = {name: copied() for name in averages} or None
        return cls(jnp.zeros((), jnp.int32), params, copied(), optimizer.init(params), averages=named)
