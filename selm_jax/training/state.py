"""The state of training: everything that an update changes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from selm_jax.models.decoder import Params


@flax.struct.dataclass
class TrainState:
    """Policy parameters, the optimiser's moments, and the number of updates done."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState

    @classmethod
    def abstract(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """Shapes, dtypes and shardings of a state; `params` may be abstract too.

        Moments are sharded like their parameters. Other arrays, which have no parameter's shape
        (counts, Adafactor's rows and columns), are replicated on all devices.
        """
        everywhere = jax.tree.leaves(params)[0].sharding
        if isinstance(everywhere, NamedSharding):
            everywhere = NamedSharding(everywhere.mesh, PartitionSpec())
        moments = jax.eval_shape(optimizer.init, params)
        shardings = optax.tree.map_params(
            optimizer,
            lambda moment, p: p.sharding if moment.shape == p.shape else everywhere,
            moments,
            params,
            transform_non_params=lambda _: everywhere,
        )

        def placed(x, where):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        like = jax.tree.map(lambda x: placed(x, x.sharding), params)
        return cls(step, like, jax.tree.map(placed, moments, shardings))

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """A fresh state with the shardings of `abstract`."""
        like = cls.abstract(params, optimizer)
        # Explicit shardings: zeros do not depend on the parameters, so XLA would use one device.
        shardings = jax.tree.map(lambda x: x.sharding, like.opt_state)
        opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=like.step.sharding)()
        return cls(step, params, opt_state)
