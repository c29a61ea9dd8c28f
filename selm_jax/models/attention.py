"""Grouped-query attention under an explicit mask.

The mask is the only thing that says who sees whom: packing, padding, prompt trees, sliding windows
and the cache of a rollout are all masks. Letters: r rows, t queries, s keys, k key-value heads,
g query heads per key-value head, h head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    query: Float[Array, "r t heads h"],
    keys: Float[Array, "r s k h"],
    values: Float[Array, "r s k h"],
    mask: Bool[Array, "r t s"],
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "r t heads h"]:
    """softmax(cap(scale * q k^T)) v, the softmax in float32. A query that sees nothing gets a mean."""
    r, t, heads, h = query.shape
    k = keys.shape[2]
    query = query.reshape(r, t, k, heads // k, h) * scale
    scores = jnp.einsum("rtkgh,rskh->rkgts", query, keys, preferred_element_type=jnp.float32)
    scores = soft_cap(scores, cap)
    # A large finite number, not -inf: rows of padding see nothing and must not become NaN.
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    # Heads in front, then moved: asked for "rtkgh" at once, XLA on CPU copies the values transposed.
    context = jnp.einsum("rkgts,rskh->rkgth", weights, values)
    return context.transpose(0, 3, 1, 2, 4).reshape(r, t, heads, h)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap): nearly x where it is small, and never beyond the cap (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def tree_mask(
    segment: Int[Array, "rows time"], branch: Int[Array, "rows time"]
) -> Bool[Array, "rows time time"]:
    """Who sees whom in rows of packed prompt trees (see `preferences.packing`).

    A token sees, causally, the prompt of its own segment (branch 0) and its own branch. Windows are
    the decoder's: it counts them in positions, which go along the branch, so that sibling branches
    that lie between in the row do not use a window up.
    """
    time = jnp.arange(segment.shape[1])
    causal = time[:, None] >= time[None, :]
    same_segment = segment[:, :, None] == segment[:, None, :]
    own_path = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return causal & same_segment & own_path & (segment[:, :, None] > 0)
