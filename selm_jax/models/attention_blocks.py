"""Blockwise attention in plain JAX, which skips the blocks that no query sees.

A row of queries and keys is cut into blocks. A block of queries and a block of keys are visited
only if some query may see some key, which is known at run time from `end` (and the window). These
pairs of blocks are visited one after the other. The softmax is computed online (FlashAttention,
arXiv 2205.14135): each block of queries keeps the largest score so far, the sum of exponentials
relative to it, and the weighted sum of values. The backward pass recomputes the scores from the
queries, the keys and the logsumexp, one float per query and head. No array has size time x time.

The length of the loop depends on the data. JAX cannot differentiate such a loop in reverse, so the
derivative is written by hand. Letters: r rows, t tokens, k key-value heads, g query heads per
key-value head, h head_dim; n blocks of all rows together, b tokens of a block, q = g * b queries of
a block with one key head.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from selm_jax.models.sight import Sight, whole_blocks

BLOCK = 128

# The running maximum starts at FLOOR, far above the score of unseen keys. So the weight of an
# unseen key is exp(UNSEEN - FLOOR) = 0 even for a query that sees no key.
UNSEEN, FLOOR = -1e30, -1e20


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def blockwise(
    query: Float[Array, "r t heads h"],
    keys: Float[Array, "r t k h"],
    values: Float[Array, "r t k h"],
    sight: Sight,
    scale: float,
    cap: float | None = None,
    block: int = BLOCK,
) -> tuple[Float[Array, "r t heads h"], Float[Array, "r t heads"]]:
    """Computes softmax(cap(scale * q k^T)) v, with the softmax in float32, and its logsumexp.

    A query that sees no key gets zeros, and a logsumexp of 1e20.

    Args:
      sight: the mask, with queries and keys that are the same tokens (`place` is None).
      block: number of tokens of a block; it need not divide t.
    """
    return _forward(query, keys, values, sight, scale, cap, block)[0]


class Visits(NamedTuple):
    """The pairs of query block and key block to compute; only the first `count` pairs are valid.

    Blocks are numbered through all rows.
    """

    queries: Int[Array, " visits"]
    keys: Int[Array, " visits"]
    count: Int[Array, ""]


def visits(sight: Sight, block: int) -> Visits:
    """The pairs of blocks that a mask requires to be computed, row by row."""
    padded = sight.padded(block)
    i, j, meet, _ = padded.meeting(block)
    order = jnp.argsort(~meet.reshape(-1), stable=True)
    first = order // len(i) * (padded.position.shape[1] // block)  # of the row
    i, j = (first + jnp.asarray(x)[order % len(i)] for x in (i, j))
    return Visits(i, j, jnp.sum(meet))


def _forward(query, keys, values, sight, scale, cap, block):
    time, k = query.shape[1], keys.shape[2]
    pad = partial(whole_blocks, block=block)
    scores = partial(_scores, sight.padded(block), scale, cap, block)
    q, key_blocks, value_blocks = (_cut(pad(x), k, block) for x in (query, keys, values))
    meeting = visits(sight, block)

    def visit(step, state):
        i, j = meeting.queries[step], meeting.keys[step]
        most, total, context = (_at(x, i) for x in state)
        s, _ = scores(_at(q, i), _at(key_blocks, j), i, j)
        now = jnp.maximum(most, s.max(-1))
        weights, keep = jnp.exp(s - now[..., None]), jnp.exp(most - now)
        more = _product("kqs,ksh->kqh", weights.astype(values.dtype), _at(value_blocks, j))
        new = now, keep * total + weights.sum(-1), keep[..., None] * context + more
        return tuple(_put(x, y, i) for x, y in zip(state, new, strict=True))

    zeros = jnp.zeros(q.shape, jnp.float32)
    start = zeros[..., 0] + FLOOR, zeros[..., 0], zeros
    most, total, context = jax.lax.fori_loop(0, meeting.count, visit, start)
    sees = total > 0
    total = jnp.where(sees, total, 1)
    # For a query that sees no key, this value makes exp(score - logsumexp) zero.
    logsumexp = jnp.where(sees, most + jnp.log(total), -FLOOR)
    context = _join((context / total[..., None]).astype(query.dtype), query.shape[0], block)[
        :, :time
    ]
    # Both get a name: if rematerialization kept only the context, it would compute all of this
    # again for the logsumexp.
    context, logsumexp = (checkpoint_name(x, "context") for x in (context, logsumexp))
    sums = _join(logsumexp[..., None], query.shape[0], block)[:, :time, :, 0]
    return (context, sums), (query, keys, values, sight, context, logsumexp)


def _backward(scale, cap, block, kept, gradients):
    """The gradients: ds = p * (do v^T - do . o + dl), dv = p^T do, dq = ds k, dk = ds^T q.

    Here p are the weights, o is the context, l the logsumexp and s are the scores.
    """
    query, keys, values, sight, context, logsumexp = kept
    rows, time, k = query.shape[0], query.shape[1], keys.shape[2]
    pad = partial(whole_blocks, block=block)
    scores = partial(_scores, sight.padded(block), scale, cap, block)
    d_context, d_sums = gradients
    q, key_blocks, value_blocks, d_context, context, d_sums = (
        _cut(pad(x), k, block) for x in (query, keys, values, d_context, context, d_sums[..., None])
    )
    along = jnp.sum(d_context.astype(jnp.float32) * context.astype(jnp.float32), -1)
    along = along - d_sums[..., 0]
    meeting = visits(sight, block)

    def visit(step, state):
        i, j = meeting.queries[step], meeting.keys[step]
        d_q, d_keys, d_values = state
        s, slope = scores(_at(q, i), _at(key_blocks, j), i, j)
        weights = jnp.exp(s - _at(logsumexp, i)[..., None])
        d_weights = _product("kqh,ksh->kqs", _at(d_context, i), _at(value_blocks, j))
        d_s = weights * (d_weights - _at(along, i)[..., None]) * slope * scale
        weights, d_s = weights.astype(values.dtype), d_s.astype(query.dtype)
        more = _product("kqs,ksh->kqh", d_s, _at(key_blocks, j))
        d_q = _put(d_q, _at(d_q, i) + more, i)
        more = _product("kqs,kqh->ksh", d_s, _at(q, i))
        d_keys = _put(d_keys, _at(d_keys, j) + more, j)
        more = _product("kqs,kqh->ksh", weights, _at(d_context, i))
        return d_q, d_keys, _put(d_values, _at(d_values, j) + more, j)

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, key_blocks, value_blocks))
    found = jax.lax.fori_loop(0, meeting.count, visit, start)
    like = query, keys, values
    found = (
        _join(d, rows, block)[:, :time].astype(x.dtype) for d, x in zip(found, like, strict=True)
    )
    return *found, None


blockwise.defvjp(_forward, _backward)


def _scores(sight, scale, cap, block, q, keys, i, j):
    """Capped and masked scores [k, q, b] of a query and a key block, and the cap's derivative."""
    n = sight.position.shape[1] // block
    s = _product("kqh,ksh->kqs", q, keys) * scale
    s, slope = capped(s, cap)
    at = jnp.arange(block)
    place = i % n * block + at
    end, position, key_position = (
        _at(x.reshape(-1, block), at)
        for x, at in ((sight.end, j), (sight.position, i), (sight.key_position, j))
    )
    seen = (j % n * block + at <= place[:, None]) & (place[:, None] < end)
    if sight.window is not None:
        seen &= position[:, None] - key_position < sight.window
    return jnp.where(jnp.tile(seen, (q.shape[1] // block, 1)), s, UNSEEN), slope


def capped(scores: Array, cap: float | None) -> tuple[Array, float | Array]:
    """The soft-capped scores, and the cap's derivative."""
    if cap is None:
        return scores, 1.0
    scores = cap * jnp.tanh(scores / cap)
    return scores, 1 - (scores / cap) ** 2


def _product(form: str, a: Array, b: Array) -> Array:
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _cut(x: Float[Array, "r t heads h"], k: int, block: int) -> Float[Array, "n k q h"]:
    """Cuts rows into blocks and concatenates the query heads that share a key-value head."""
    h = x.shape[-1]
    x = x.reshape(-1, block, k, x.shape[2] // k, h)
    return x.transpose(0, 2, 3, 1, 4).reshape(x.shape[0], k, -1, h)


def _join(x: Float[Array, "n k q h"], rows: int, block: int) -> Float[Array, "r t heads h"]:
    """Joins blocks of queries to whole rows again; the inverse of `_cut`."""
    n, k, _, h = x.shape
    x = x.reshape(n, k, -1, block, h).transpose(0, 3, 1, 2, 4)
    return x.reshape(rows, -1, k * x.shape[3], h)


def _at(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: Array, new: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
