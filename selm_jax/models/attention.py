"""Grouped-query attention: one function with three back ends.

One integer per key determines which queries see it (`models.sight`). For short rows, one product of
all queries with all keys is masked (`einsum`, in this file). For long rows, attention is computed
block by block, without the blocks that no query sees: on TPUs by a kernel (`models.attention_tpu`),
elsewhere in plain JAX (`models.attention_blocks`). A decoding step has a kernel for TPUs as well
(`models.decode_tpu`), and is one product elsewhere. The kernels have been compiled for TPUs and
interpreted on CPU, but have not run on a TPU. All back ends agree up to rounding.

A model may have an attention sink: a learned logit per head that takes a share of the softmax and
has no value (gpt-oss). Blocks and kernels know nothing of it: it is applied to what they return
(`with_sinks`).

Letters: r rows, t queries, s keys, k key-value heads, g query heads per key-value head, h head_dim.
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
from selm_jax.parallel.rules import ROWS

# Number of tokens of a row from which `auto` leaves out blocks that no query sees. On CPU, this is
# faster from this length on (docs/performance.md). Elsewhere nothing has been timed, and the reason
# is memory.
_LONG_FROM = {"cpu": 512}
_ELSEWHERE = 1024


def attention(
    query: Float[Array, "r t heads h"],
    keys: Float[Array, "r s k h"],
    values: Float[Array, "r s k h"],
    sight: Sight,
    *,
    scale: float,
    cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    back_end: AttentionBackEnd = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "r t heads h"]:
    """Computes softmax(cap(scale * q k^T)) v, with the softmax in float32.

    A query that sees no key is padding; its result is finite and has no meaning.

    Args:
      cap: soft cap of the scores, as in Gemma 2; None for no cap.
      sinks: one more score of each head, whose value is zero; None for no sinks.
      back_end: how to compute it; `auto` chooses by platform and length.
      mesh: the mesh of the arrays, with rows sharded over the axes data and fsdp, and heads over
        tensor; None for one device.
    """
    platform = platform_of(mesh)
    chosen = _chosen(back_end, sight, platform)
    interpret = platform != "tpu"
    if chosen == "einsum":
        return einsum(query, keys, values, sight, scale, cap, sinks)

    def computed(query, keys, values, sight):
        if chosen == "blocks":
            return blockwise(query, keys, values, sight, scale, cap)
        # These import Pallas, which takes time.
        if sight.place is None:
            from selm_jax.models.attention_tpu import kernel

            return kernel(query, keys, values, sight, scale, cap, interpret=interpret)
        from selm_jax.models.decode_tpu import decode_kernel

        return decode_kernel(query, keys, values, sight, scale, cap, interpret=interpret)

    if mesh is not None and mesh.size > 1:
        # Each device decides from its own rows which blocks to visit.
        rows, heads = P(ROWS), P(ROWS, None, "tensor")
        key_position = P() if sight.place is not None else rows  # of a cache it is the same for all
        computed = jax.shard_map(
            computed,
            mesh=mesh,
            in_specs=(
                heads,
                heads,
                heads,
                Sight(*cast(Any, (rows, key_position, rows, rows, P()))),
            ),
            out_specs=heads,
            check_vma=False,
        )
    context, logsumexp = cast(Any, computed(query, keys, values, sight))
    return context if sinks is None else with_sinks(context, logsumexp, sinks)


def with_sinks(
    context: Float[Array, "r t heads h"],
    logsumexp: Float[Array, "r t heads"],
    sinks: Float[Array, " heads"],
) -> Float[Array, "r t heads h"]:
    """Attention with sinks, from attention without them and the logsumexp of its scores.

    A sink takes exp(sink) / (exp(sink) + exp(logsumexp)) of the softmax, and the keys keep the
    rest.
    """
    share = jax.nn.sigmoid(logsumexp - sinks.astype(jnp.float32))
    return (context * share[..., None]).astype(context.dtype)


def _chosen(back_end: AttentionBackEnd, sight: Sight, platform: str) -> AttentionBackEnd:
    kernel = back_end == "kernel" or (back_end == "auto" and platform == "tpu")
    longest = sight.position.shape[1]
    if sight.place is not None:  # a cache: one query in a decoding step, few queries otherwise
        return "kernel" if kernel and longest == 1 else "einsum"
    if back_end != "auto":
        return back_end
    if holds_all_scores(back_end, longest, platform):
        return "einsum"
    return "kernel" if kernel else "blocks"


def holds_all_scores(back_end: AttentionBackEnd, length: int, platform: str) -> bool:
    """Says whether attention over rows of `length` tokens holds all scores of a row at once."""
    if back_end == "auto":
        return length < _LONG_FROM.get(platform, _ELSEWHERE)
    return back_end == "einsum"


def einsum(
    query: Float[Array, "r t heads h"],
    keys: Float[Array, "r s k h"],
    values: Float[Array, "r s k h"],
    sight: Sight,
    scale: float,
    cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "r t heads h"]:
    """Attention with all scores at once. A query that sees no key gets the mean of all values."""
    r, t, heads, h = query.shape
    k = keys.shape[2]
    query = query.reshape(r, t, k, heads // k, h) * scale
    scores = jnp.einsum("rtkgh,rskh->rkgts", query, keys, preferred_element_type=jnp.float32)
    scores = soft_cap(scores, cap)
    # A large finite number, not -inf: queries of padding see no key and must not become NaN.
    scores = jnp.where(sight.mask()[:, None, None], scores, -1e30)
    if sinks is not None:  # one more key, without a value
        sink = sinks.astype(jnp.float32).reshape(k, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], -1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[1]].astype(values.dtype)
    # Heads come first and are moved afterwards: for "rtkgh", XLA on CPU would copy the values to
    # transpose them.
    context = jnp.einsum("rkgts,rskh->rkgth", weights, values)
    return context.transpose(0, 3, 1, 2, 4).reshape(r, t, heads, h)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap), which is near x for small x and never exceeds the cap (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
