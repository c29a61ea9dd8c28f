"""Attention of one decoding step as a Pallas kernel for TPUs, which reads live tokens only.

In a step, each slot has one query per head, and its time is that of reading the slot's keys and
values. The cache has room for the longest slot. A product with the cache reads all of this room for
each slot; this kernel reads only the blocks with tokens that the slot's query sees. They are known
at run time, from the slot's place in the cache and the layer's window.

The grid goes through the slots and, for each, through the blocks of the cache. Steps before the
first live block and behind the last one do nothing. Their index is that of a live block, so that
they move no data. The softmax is computed online (FlashAttention, arXiv 2205.14135).

Letters: r slots, s tokens of the cache, k key-value heads, g query heads per key-value head, padded
to a multiple of 8, h head_dim, b tokens of a block.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from selm_jax.models.attention_blocks import FLOOR, UNSEEN, capped
from selm_jax.models.sight import Sight

_LANES, _SUBLANES = 128, 8
# Bytes of a block of keys. Keys and values have two buffers each in VMEM, which holds 16 MiB.
# Reading so much takes longer than a step of the grid costs; smaller blocks read fewer dead tokens.
_BLOCK_BYTES = 2**19
_LONGEST = 512  # tokens of a block

# Products per key head: of a matrix with another, and with the transpose of another.
_NN = (((2,), (1,)), ((0,), (0,)))
_NT = (((2,), (2,)), ((0,), (0,)))


def decode_kernel(
    query: Float[Array, "r 1 heads h"],
    keys: Float[Array, "r s k h"],
    values: Float[Array, "r s k h"],
    sight: Sight,
    scale: float,
    cap: float | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "r 1 heads h"], Float[Array, "r 1 heads"]]:
    """Computes softmax(cap(scale * q k^T)) v for one query per slot, and its scores' logsumexp.

    The softmax is in float32.

    Args:
      keys, values: the cache with its axes swapped, as `attention` takes them. They are swapped
        back here, which XLA cancels: the kernel reads the cache where it is.
      sight: the mask; each query has a `place` in the cache, and entry i of it has position i.
      interpret: whether to run without a TPU, slowly; for tests.
    """
    assert sight.place is not None and sight.end is None
    place = sight.place[:, 0]
    length = place + 1
    first = jnp.zeros_like(place)
    if sight.window is not None:
        # The window may be the largest integer, which is why nothing is added to it.
        first = jnp.maximum(sight.position[:, 0] - sight.window, -1) + 1
    rows, _, heads, h = query.shape
    cache = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    query = query.reshape(rows, cache[0].shape[1], -1, h)
    context, logsumexp = ragged(query, *cache, first, length, scale, cap, interpret=interpret)
    return context.reshape(rows, 1, heads, h), logsumexp.reshape(rows, 1, heads)


def ragged(
    query: Float[Array, "r k g h"],
    keys: Float[Array, "r k s h"],
    values: Float[Array, "r k s h"],
    first: Int[Array, " r"],
    length: Int[Array, " r"],
    scale: float,
    cap: float | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "r k g h"], Float[Array, "r k g"]]:
    """Attention of each slot's queries to the entries `first` to `length - 1` of its cache.

    A slot without such entries gets zeros, and `FLOOR` as the logsumexp of its scores.
    """
    rows, k, capacity, h = keys.shape
    group = query.shape[2]
    b = block_of(k, capacity, h, keys.dtype.itemsize)
    blocks = pl.cdiv(capacity, b)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, -group % _SUBLANES), (0, 0)))
    padded = query.shape[2]

    def live(r, j, first, length):
        # lax.div, because // asks for the sign, and that asks which TPU is here.
        last = jax.lax.div(jnp.clip(length[r] - 1, 0, capacity - 1), b)
        j = jnp.minimum(jnp.maximum(j, jax.lax.div(first[r], b)), last)
        return r, 0, j, 0

    of_query = pl.BlockSpec((None, k, padded, h), lambda r, j, *_: (r, 0, 0, 0))
    of_cache = pl.BlockSpec((None, k, b, h), live)
    of_lanes = pl.BlockSpec((None, k, padded, _LANES), lambda r, j, *_: (r, 0, 0, 0))
    per_query = pltpu.VMEM((k, padded, _LANES), jnp.float32)
    products = rows * k * padded * capacity  # with nothing skipped
    context, logsumexp = pl.pallas_call(
        partial(_kernel, scale=scale, cap=cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, blocks),
            in_specs=[of_query, of_cache, of_cache],
            out_specs=(of_query, of_lanes),
            scratch_shapes=[per_query, per_query, pltpu.VMEM((k, padded, h), jnp.float32)],
        ),
        out_shape=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((*query.shape[:-1], _LANES), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * products * h,
            transcendentals=products,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (query, query, keys, values)),
        ),
        interpret=interpret,
        name="decode_attention",
    )(first, length, query, keys, values)
    return context[:, :, :group], logsumexp[:, :, :group, 0]  # all lanes are equal


def block_of(k: int, capacity: int, h: int, item: int) -> int:
    """Tokens of a block: a multiple of 128 by its bytes, or all tokens of a cache that is shorter.

    Args:
      item: bytes of one number of the cache.
    """
    token = k * (-(-h // _LANES) * _LANES) * item
    tokens = _BLOCK_BYTES // token // _LANES * _LANES
    return min(max(tokens, _LANES), _LONGEST, capacity)


def _kernel(
    first, length, q, k, v, out, logsumexp, most, total, context, *, scale: float, cap: float | None
):
    """One slot and one block; `most` (running maximum), `total` (running sum): [k, g, 128]."""
    r, j = pl.program_id(0), pl.program_id(1)
    b = k.shape[1]
    begin, end = jnp.maximum(first[r], j * b), jnp.minimum(length[r], (j + 1) * b)

    @pl.when(j == 0)
    def _():
        most[...] = jnp.full_like(most, FLOOR)
        total[...] = jnp.zeros_like(total)
        context[...] = jnp.zeros_like(context)

    def body(masked: bool) -> None:
        x = jax.lax.dot_general(q[...], k[...], _NT, preferred_element_type=jnp.float32)
        x, _ = capped(x * scale, cap)
        own = v[...]
        if masked:
            at = j * b + jax.lax.broadcasted_iota(jnp.int32, x.shape, 2)
            x = jnp.where((begin <= at) & (at < end), x, UNSEEN)
            # Behind the cache's end a block holds anything, and 0 times that may be NaN.
            at = j * b + jax.lax.broadcasted_iota(jnp.int32, own.shape, 1)
            own = jnp.where(at < end, own, jnp.zeros_like(own))
        before = most[...]
        now = jnp.maximum(before, x.max(axis=2, keepdims=True))
        weights, keep = jnp.exp(x - now[..., :1]), jnp.exp(before - now)
        most[...] = now
        total[...] = keep * total[...] + weights.sum(axis=2, keepdims=True)
        weights = weights.astype(own.dtype)
        more = jax.lax.dot_general(weights, own, _NN, preferred_element_type=jnp.float32)
        context[...] = keep[..., :1] * context[...] + more

    pl.when(end - begin == b)(lambda: body(False))
    pl.when((begin < end) & (end - begin < b))(lambda: body(True))

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        safe = jnp.where(total[...] > 0, total[...], 1.0)
        out[...] = (context[...] / safe[..., :1]).astype(out.dtype)
        # In all lanes: to turn one number a row into lanes takes a gather, which v4 does not have.
        logsumexp[...] = most[...] + jnp.log(safe)
