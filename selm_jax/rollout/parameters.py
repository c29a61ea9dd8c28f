"""A model's parameters in the form for decoding: another dtype, layout and sharding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params, abstract_params, unstack
from selm_jax.parallel.rules import DECODE, shardings


def decoding_params(params: Params, dtype: Any, where: Any = None) -> Params:
    """Training parameters in the form that the engine needs.

    The result has one tree per layer, in the dtype of decoding, with the shardings `where`
    (`decoding_shardings`). Routers of experts keep their dtype: rounding them would send tokens to
    other experts than in training.
    """

    places, form = jax.tree.flatten(where)
    return _converter(jnp.dtype(dtype), tuple(places), form)(params)


@functools.lru_cache(maxsize=16)  # or every policy would be traced and compiled again
def _converter(
    dtype: np.dtype, places: tuple[Sharding, ...], form: Any
) -> Callable[[Params], Params]:
    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x if path[-1].key == "router" else x.astype(dtype)

    return jax.jit(
        lambda p: unstack(jax.tree_util.tree_map_with_path(cast, p)),
        out_shardings=jax.tree.unflatten(form, places),
    )


def decoding_shardings(config: DecoderConfig, mesh: Mesh) -> Any:
    """The shardings of the parameters for decoding, by `rules.DECODE`.

    The mesh must have the devices of the training parameters in the same order
    (`parallel.mesh.decode_mesh`).

    Raises:
      MeshError: the mesh does not divide a parameter evenly; the message names it.
    """
    stacked = shardings(abstract_params(config), mesh, DECODE)
    where = {k: v for k, v in stacked.items() if k != "layers"}
    layer = jax.tree.map(lambda x: NamedSharding(mesh, P(*x.spec[1:])), stacked["layers"])
    return where | {f"layer_{i}": layer for i in range(config.layers)}
