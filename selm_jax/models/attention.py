"""Grouped-query attention: one function, and what it is computed with.

Who sees whom is said by one integer per key (`models.sight`). Short rows are computed by one
product of all queries with all keys, in which what is unseen is masked (`einsum`, here); long ones
block by block, where blocks that nobody sees are left out (`models.attention_blocks`). A kernel for
TPUs does likewise (`models.attention_tpu`); it is compiled in tests but has not run on a TPU, so it
must be asked for. All give the same within rounding. Letters: r rows, t queries, s keys, k
key-value heads, g query heads per key-value head, h head_dim.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from selm_jax.config.kinds import AttentionBackEnd
from selm_jax.models.attention_blocks import blockwise
from selm_jax.models.sight import Sight
from selm_jax.parallel.mesh import platform_of

# Tokens of a row from which blocks are taken. On CPU they are faster from here on
# (docs/performance.md); elsewhere nothing has been timed, and what counts is memory.
_BLOCKS_FROM = {"cpu": 512}
_ELSEWHERE = 1024


def attention(
    query: Float[Array, "r t heads h"],
    keys: Float[Array, "r s k h"],
    values: Float[Array, "r s k h"],
    sight: Sight,
    *,
    scale: float,
    cap: float | None = None,
    back_end: AttentionBackEnd = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "r t heads h"]:
    """softmax(cap(scale * q k^T)) v, the softmax in float32.

    A query that sees nothing is padding; it gets something finite.

    Args:
      cap: of the scores, as in Gemma 2; None leaves them.
      back_end: what to compute with; `auto` chooses by platform and length.
      mesh: what the arrays lie on, rows on its axes data and fsdp, heads on tensor; None for one
        device.
    """
    platform = platform_of(mesh)
    chosen = _chosen(back_end, sight, platform)
    if chosen == "einsum":
        return einsum(query, keys, values, sight, scale, cap)

    def computed(query, keys, values, sight):
        if chosen == "blocks":
            return blockwise(query, keys, values, sight, scale, cap)
        from selm_jax.models.attention_tpu import kernel  # Pallas: nobody else waits for it

        return kernel(query, keys, values, sight, scale, cap, interpret=platform != "tpu")

    if mesh is not None and mesh.size > 1:
        # Which blocks are visited is a matter of each device's own rows.
        rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
        computed = jax.shard_map(
            computed,
            mesh=mesh,
            in_specs=(heads, heads, heads, Sight(*cast(Any, (rows, rows, rows, rows, P())))),
            out_specs=heads,
            check_vma=False,
        )
    return cast(Array, computed(query, keys, values, sight))


def _chosen(back_end: AttentionBackEnd, sight: Sight, platform: str) -> AttentionBackEnd:
    if sight.place is not None:  # queries that look into a cache are few
        return "einsum"
    if back_end != "auto":
        return back_end
    longest = sight.position.shape[1]
    return "blocks" if longest >= _BLOCKS_FROM.get(platform, _ELSEWHERE) else "einsum"


def einsum(
    query: Float[Array, "r t heads h"],
    keys: Float[Array, "r s k h"],
    values: Float[Array, "r s k h"],
    sight: Sight,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "r t heads h"]:
    """All scores at once. A query that sees nothing gets the mean of all values."""
    r, t, heads, h = query.shape
    k = keys.shape[2]
    query = query.reshape(r, t, k, heads // k, h) * scale
    scores = jnp.einsum("rtkgh,rskh->rkgts", query, keys, preferred_element_type=jnp.float32)
    scores = soft_cap(scores, cap)
    # A large finite number, not -inf: rows of padding see nothing and must not become NaN.
    scores = jnp.where(sight.mask()[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    # Heads in front, then moved: asked for "rtkgh" at once, XLA on CPU copies the values
    # transposed.
    context = jnp.einsum("rkgts,rskh->rkgth", weights, values)
    return context.transpose(0, 3, 1, 2, 4).reshape(r, t, heads, h)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap): nearly x where it is small, and never beyond the cap (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
