"""The keys and values of earlier tokens, which decoding keeps for each layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from selm_jax.models.config import DecoderConfig


@flax.struct.dataclass
class LayerCache:
    """Holds the keys and values of all earlier tokens, in one layer.

    Heads come before tokens because attention reads them in this order; with the other order, every
    decoding step would copy the whole cache.
    """

    keys: Float[Array, "*layers rows kv_heads capacity head_dim"]
    values: Float[Array, "*layers rows kv_heads capacity head_dim"]


def empty_cache(
    config: DecoderConfig, rows: int, capacity: int, dtype: Any = jnp.float32
) -> tuple[LayerCache, ...]:
    """Makes a cache of zeros for each layer, with room for `capacity` tokens of each row."""

    def zeros(c: DecoderConfig) -> Array:
        return jnp.zeros((rows, c.kv_heads, capacity, c.head_dim), dtype)

    return tuple(LayerCache(zeros(c), zeros(c)) for c in config.each_layer)


def write(
    cache: LayerCache,
    keys: Float[Array, "rows time kv_heads head_dim"],
    values: Float[Array, "rows time kv_heads head_dim"],
    index: Int[Array, " rows"],
) -> LayerCache:
    """Writes each row's new keys and values into the cache at that row's index."""

    def put(old: Array, new: Array) -> Array:
        new = jnp.swapaxes(new, 1, 2).astype(old.dtype)
        if new.shape == old.shape:  # a prefill fills its whole cache
            return new
        # With vmap, XLA knows on a mesh that each row only writes into itself.
        return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))(old, new, index)

    return LayerCache(put(cache.keys, keys), put(cache.values, values))
