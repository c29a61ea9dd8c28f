"""The state of training: everything that an update changes."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from selm_jax.models.decoder import Params


@flax.struct.dataclass
class TrainState:
    """Policy parameters, the optimiser's moments, and the number of updates done."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """A fresh state; the moments are laid out like the parameters they belong to."""
        return cls(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
