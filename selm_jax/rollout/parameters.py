"""A model's parameters as decoding wants them: other dtype, other layout, other places."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params, abstract_params, unstack
from selm_jax.parallel.rules import DECODE, shardings


def decoding_params(params: Params, dtype: Any, where: Any = None) -> Params:
    """Training parameters as the engine wants them: one tree per layer, in the dtype of decoding,
    and laid out as `where` (`decoding_shardings`) says."""
    return jax.jit(
        lambda p: unstack(jax.tree.map(lambda x: x.astype(dtype), p)), out_shardings=where
    )(params)


def decoding_shardings(config: DecoderConfig, mesh: Mesh) -> Any:
    """Where the parameters lie that generate, by `rules.DECODE`. The mesh has the devices of the
    training parameters, in the same order (`parallel.mesh.decode_mesh`).

    Raises:
      MeshError: a parameter that the mesh does not cut evenly; it is named.
    """
    stacked = shardings(abstract_params(config), mesh, DECODE)
    where = {k: v for k, v in stacked.items() if k != "layers"}
    layer = jax.tree.map(lambda x: NamedSharding(mesh, P(*x.spec[1:])), stacked["layers"])
    return where | {f"layer_{i}": layer for i in range(config.layers)}
