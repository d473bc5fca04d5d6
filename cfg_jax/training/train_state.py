"""The state that a training step reads and writes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
    """The training state. step: int32 scalar, updates done. params, ema_params: float32 trees. opt_state: optax's."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any

    @classmethod
    def create(cls, params, optimizer):
        """Return the state before the first step; the average starts at the parameters themselves."""
        return cls(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
