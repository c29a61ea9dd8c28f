"""A model's parameters in the form for decoding: another dtype, layout and sharding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from selm_jax.config.kinds import RolloutWeights
from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params, abstract_params
from selm_jax.models.experts import ROUTER
from selm_jax.models.quantize import quantize
from selm_jax.models.stacked import stacks, unstack
from selm_jax.parallel.rules import DECODE, shardings


def decoding_params(
    params: Params, dtype: Any, where: Any = None, weights: RolloutWeights = "full"
) -> Params:
    """Training parameters in the form that the engine needs.

    The result has one tree per layer, in the dtype of decoding, with the shardings `where`
    (`decoding_shardings`). Routers of experts keep their dtype: rounding them would send tokens to
    other experts than in training. With `weights: int8` the layers' kernels are rounded to 8 bits,
    with a float32 scale for each output; the engine's decoder is then `quantized`.
    """
    places, form = jax.tree.flatten(where)
    return _converter(jnp.dtype(dtype), weights, tuple(places), form)(params)


@functools.lru_cache(maxsize=16)  # or every policy would be traced and compiled again
def _converter(
    dtype: np.dtype, weights: RolloutWeights, places: tuple[Sharding, ...], form: Any
) -> Callable[[Params], Params]:
    return jax.jit(
        lambda params: unstack(_cast(params, dtype, weights)),
        out_shardings=jax.tree.unflatten(form, places),
    )


def _cast(params: Params, dtype: Any, weights: RolloutWeights) -> Params:
    exact = params
    if weights == "int8":
        in_full = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        exact = quantize(in_full, weights, block=None)
    flat = {
        path: x.astype(dtype) if isinstance(x, jax.Array) and path[-1] not in ROUTER else x
        for path, x in flatten_dict(exact).items()
    }
    return unflatten_dict(flat)


def decoding_shardings(config: DecoderConfig, mesh: Mesh, weights: RolloutWeights = "full") -> Any:
    """The shardings of the parameters for decoding, by `rules.DECODE`.

    The mesh must have the devices of the training parameters in the same order
    (`parallel.mesh.decode_mesh`).

    Raises:
      MeshError: the mesh does not divide a parameter evenly; the message names it.
    """
    boxed = abstract_params(config)
    stacked = shardings(boxed, mesh, DECODE)
    if weights == "int8":
        stacked = _of_integers(nn.unbox(boxed), stacked)
    where = {k: v for k, v in stacked.items() if k != "layers"}
    each = stacks(jax.tree.map(lambda x: NamedSharding(mesh, P(*x.spec[1:])), stacked["layers"]))
    return where | {f"layer_{i}": each[i % len(each)] for i in range(config.layers)}


def _of_integers(params: Params, where: Params) -> Params:
    """The shardings of quantised parameters: of the integers as before, of scales as far as cut."""
    quantized = flatten_dict(jax.eval_shape(lambda p: _cast(p, jnp.float32, "int8"), params))

    def of(path: tuple[str, ...], at: Any) -> Any:
        def cut(x: jax.ShapeDtypeStruct) -> NamedSharding:
            axes = (*at.spec, *(None,) * (x.ndim - len(at.spec)))
            return NamedSharding(
                at.mesh, P(*(a if n > 1 else None for a, n in zip(axes, x.shape, strict=True)))
            )

        return jax.tree.map(cut, quantized[path])

    return unflatten_dict({path: of(path, at) for path, at in flatten_dict(where).items()})
