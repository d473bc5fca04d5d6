"""The state that a training step reads and writes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
    """The training state. step: int32 scalar, updates done. params, ema_params: float32 trees. opt_state: optax's.

    Parts that a run does not have are None, and are left out of its checkpoints. teacher_params: what distillation
    learns from. averages: {length: tree}, the power-function averages of `config.optim.ema_lengths`.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    teacher_params: Any = None
    averages: Any = None

    @classmethod
    def create(cls, params, optimizer):
        """Return the state before the first step; the average starts at the parameters themselves."""
        return cls(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
