"""Attention as a Pallas kernel for TPUs, which skips the blocks that no query sees.

A row is cut into blocks. Which blocks of queries meet which blocks of keys follows from `end`, at
run time (`steps`); the grid's last axis goes through that list, whose length is bounded by the
causal half, and steps behind its end do nothing and move no data. Softmax is online
(FlashAttention, arXiv 2205.14135), and the backward pass computes the scores again: one kernel for
the queries' gradient, one for that of keys and values. A block that is seen whole is not masked.

A block and the one before it at the same place are the same buffer to Mosaic, so every block of
queries (or keys) stands in one run of steps, that begins by clearing and ends by writing. Its own
diagonal is always among them, so that blocks of padding are written too.

Letters: r rows, t tokens, k key-value heads, g query heads per key-value head, h head_dim, b tokens
of a block, s steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from selm_jax.models.attention_blocks import FLOOR, UNSEEN, capped
from selm_jax.models.sight import Sight, whole_blocks

LANES = 128
_LARGEST = 640  # tokens of a block; 3,200 = 5 x 640. Scores of a block then take 1.6 MiB of VMEM
_ALL = np.iinfo(np.int32).max

_NT = (((1,), (1,)), ((), ()))  # a b^T
_NN = (((1,), (0,)), ((), ()))  # a b
_TN = (((0,), (0,)), ((), ()))  # a^T b


class _How(NamedTuple):
    scale: float
    cap: float | None
    windowed: bool
    interpret: bool


class Steps(NamedTuple):
    """The block pairs that a kernel computes, in order; after `count` the last pair is repeated."""

    queries: Int[Array, "r s"]
    keys: Int[Array, "r s"]
    whole: Int[Array, "r s"]  # 1 if every query of the pair sees all of its keys
    count: Int[Array, " r"]


def kernel(
    query: Float[Array, "r t heads h"],
    keys: Float[Array, "r t k h"],
    values: Float[Array, "r t k h"],
    sight: Sight,
    scale: float,
    cap: float | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "r t heads h"], Float[Array, "r t heads"]]:
    """Computes softmax(cap(scale * q k^T)) v, with the softmax in float32, and its logsumexp.

    A query that sees no key gets zeros, and a logsumexp of 1e20.

    Args:
      sight: the mask; queries and keys must be the same tokens (`place` is None).
      interpret: whether to run without a TPU, slowly; for tests.
    """
    heads_first = (whole_blocks(x, LANES).swapaxes(1, 2) for x in (query, keys, values))
    how = _How(scale, cap, sight.window is not None, interpret)
    found: Any = _attend(*heads_first, row_of(sight), how)
    context, sums = (x.swapaxes(1, 2)[:, : query.shape[1]] for x in found)
    return context, sums


def row_of(sight: Sight) -> Sight:
    """The mask as the kernels read it: padded to a multiple of 128, with a window of shape [1]."""
    window = jnp.int32(_ALL) if sight.window is None else sight.window
    return sight.padded(LANES)._replace(window=jnp.reshape(window, 1))


def block_of(time: int) -> int:
    """The largest block size that divides a row's length, which is a multiple of 128."""
    return next(b for b in range(_LARGEST, 0, -LANES) if time % b == 0)


def steps(row: Sight, block: int, by_keys: bool) -> Steps:
    """The block pairs of each row; pairs of one query block (or key block) are consecutive."""
    i, j, some, whole = row.meeting(block)
    if by_keys:
        order = np.lexsort((i, j))
        i, j, some, whole = i[order], j[order], some[:, order], whole[:, order]
    some |= i == j
    count = some.sum(1).astype(jnp.int32)
    order = jnp.argsort(~some, axis=1, stable=True)
    last = jnp.minimum(jnp.arange(len(i)), count[:, None] - 1)
    order = jnp.take_along_axis(order, last, axis=1)
    whole = jnp.take_along_axis(whole, order, axis=1).astype(jnp.int32)
    i, j = (jnp.asarray(x, jnp.int32)[order] for x in (i, j))
    return Steps(i, j, whole, count)


# --- the kernels: blocks are [b, h], the integers [1, b], accumulators float32 -------------------


def _run(at: Any, listed: Any, count: Any) -> tuple[Any, Any, Any]:
    """Says whether the grid step `at` is valid, the first of its block, and the last of it."""
    r, s = at
    own, most = listed[r, s], count[r]
    live = s < most
    before = listed[r, jnp.maximum(s - 1, 0)]
    behind = listed[r, jnp.minimum(s + 1, most - 1)]
    return live, live & ((s == 0) | (before != own)), live & ((s == most - 1) | (behind != own))


def _scores(q, k, end, position, key_position, window, i, j, how: _How, masked: bool):
    """Capped and masked scores [b, b] of a query and a key block, and the cap's derivative."""
    s = jax.lax.dot_general(q[...], k[...], _NT, preferred_element_type=jnp.float32) * how.scale
    s, slope = capped(s, how.cap)
    if masked:
        b = s.shape[0]
        place = i * b + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
        key_place = j * b + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        seen = (key_place <= place) & (place < end[...])
        if how.windowed:
            seen &= jnp.expand_dims(position[0], -1) - key_position[...] < window
        s = jnp.where(seen, s, UNSEEN)
    return s, slope


def _each(live, whole, body: Callable[[bool], None]) -> None:
    pl.when(live & (whole == 0))(lambda: body(True))
    pl.when(live & (whole == 1))(lambda: body(False))


def _forward_kernel(
    queries, keys, whole, count, window, q, k, v, end, position, key_position,
    out, logsumexp, most, total, context, *, how: _How,
):  # fmt: skip
    """The forward kernel; `most` (running maximum) and `total` (running sum) are [b, 128]."""
    r, s = pl.program_id(0), pl.program_id(2)
    live, begins, ends = _run((r, s), queries, count)

    @pl.when(begins)
    def _():
        most[...] = jnp.full_like(most, FLOOR)
        total[...] = jnp.zeros_like(total)
        context[...] = jnp.zeros_like(context)

    def body(masked: bool) -> None:
        i, j = queries[r, s], keys[r, s]
        x, _ = _scores(q, k, end, position, key_position, window[0], i, j, how, masked)
        before = most[...]
        now = jnp.maximum(before, x.max(axis=1, keepdims=True))
        weights, keep = jnp.exp(x - now[:, :1]), jnp.exp(before - now)
        most[...] = now
        total[...] = keep * total[...] + weights.sum(axis=1, keepdims=True)
        weights = weights.astype(v.dtype)
        more = jax.lax.dot_general(weights, v[...], _NN, preferred_element_type=jnp.float32)
        context[...] = keep[:, :1] * context[...] + more

    _each(live, whole[r, s], body)

    @pl.when(ends)
    def _():
        sees = total[...] > 0
        safe = jnp.where(sees, total[...], 1.0)
        out[...] = (context[...] / safe[:, :1]).astype(out.dtype)
        logsumexp[...] = jnp.where(sees, most[...] + jnp.log(safe), -FLOOR).T[:1]


def _weights(given, window, i, j, how: _How, masked: bool):
    """The weights p, and the gradient of the scores, p * (do v^T - along): [b, b] each."""
    q, k, v, end, position, key_position, logsumexp, d_out, along = given
    x, slope = _scores(q, k, end, position, key_position, window, i, j, how, masked)
    weights = jnp.exp(x - jnp.expand_dims(logsumexp[0], -1))
    d = jax.lax.dot_general(d_out[...], v[...], _NT, preferred_element_type=jnp.float32)
    return weights, weights * (d - jnp.expand_dims(along[0], -1)) * slope


def _d_query_kernel(queries, keys, whole, count, window, *rest, how: _How):
    *given, d_query, total = rest
    r, s = pl.program_id(0), pl.program_id(2)
    live, begins, ends = _run((r, s), queries, count)

    @pl.when(begins)
    def _():
        total[...] = jnp.zeros_like(total)

    def body(masked: bool) -> None:
        _, d = _weights(given, window[0], queries[r, s], keys[r, s], how, masked)
        k = given[1]
        d = d.astype(k.dtype)
        total[...] += jax.lax.dot_general(d, k[...], _NN, preferred_element_type=jnp.float32)

    _each(live, whole[r, s], body)

    @pl.when(ends)
    def _():
        d_query[...] = (total[...] * how.scale).astype(d_query.dtype)


def _d_keys_kernel(queries, keys, whole, count, window, *rest, how: _How):
    """The kernel for gradients of keys and values; the last grid axis is a key head's queries."""
    *given, d_keys, d_values, of_keys, of_values = rest
    r, s, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    live, begins, ends = _run((r, s), keys, count)

    @pl.when(begins & (n == 0))
    def _():
        of_keys[...] = jnp.zeros_like(of_keys)
        of_values[...] = jnp.zeros_like(of_values)

    def body(masked: bool) -> None:
        weights, d = _weights(given, window[0], queries[r, s], keys[r, s], how, masked)
        q, d_out = given[0], given[-2]
        weights, d = weights.astype(d_out.dtype), d.astype(q.dtype)
        product = partial(jax.lax.dot_general, dimension_numbers=_TN)
        of_values[...] += product(weights, d_out[...], preferred_element_type=jnp.float32)
        of_keys[...] += product(d, q[...], preferred_element_type=jnp.float32)

    _each(live, whole[r, s], body)

    @pl.when(ends & (n == pl.num_programs(3) - 1))
    def _():
        d_keys[...] = (of_keys[...] * how.scale).astype(d_keys.dtype)
        d_values[...] = of_values[...].astype(d_values.dtype)


# --- their calls ----------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, keys, values, row: Sight, how: _How):
    return _forward(query, keys, values, row, how)[0]


def _forward(query, keys, values, row: Sight, how: _How):
    (rows, heads, time, h), k = query.shape, keys.shape[1]
    b = block_of(time)
    at = _places(b, h, heads // k, of_keys=False)
    sums = jax.ShapeDtypeStruct((rows, heads, 1, time), jnp.float32)
    out, logsumexp = _call(
        _forward_kernel, how, steps(row, b, by_keys=False), row.window, (rows, heads, 1),
        [(query, at.query), (keys, at.keys), (values, at.keys), *_integers(row, at)],
        [(query, at.query), (sums, at.per_query)],
        [(b, LANES), (b, LANES), (b, h)],
    )  # fmt: skip
    # Named, or rematerialisation that keeps the context would compute all of this again for the
    # sum.
    out, logsumexp = (checkpoint_name(x, "context") for x in (out, logsumexp))
    return (out, logsumexp[:, :, 0]), (query, keys, values, row, out, logsumexp)


def _backward(how: _How, kept, gradients):
    query, keys, values, row, out, logsumexp = kept
    (rows, heads, time, h), k = query.shape, keys.shape[1]
    b, group = block_of(time), heads // k
    d_out, d_sums = gradients
    along = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_sums
    along = along[:, :, None]

    def given(at: _Places):
        return [
            (query, at.query), (keys, at.keys), (values, at.keys), *_integers(row, at),
            (logsumexp, at.per_query), (d_out, at.query), (along, at.per_query),
        ]  # fmt: skip

    at = _places(b, h, group, of_keys=False)
    (d_query,) = _call(
        _d_query_kernel, how, steps(row, b, by_keys=False), row.window, (rows, heads, 1),
        given(at), [(query, at.query)], [(b, h)],
    )  # fmt: skip
    at = _places(b, h, group, of_keys=True)
    d_keys, d_values = _call(
        _d_keys_kernel, how, steps(row, b, by_keys=True), row.window, (rows, k, group),
        given(at), [(keys, at.keys), (values, at.keys)], [(b, h), (b, h)],
    )  # fmt: skip
    return d_query, d_keys, d_values, None


_attend.defvjp(_forward, _backward)


class _Places(NamedTuple):
    """Pallas block specs: which block of each kind of array a step of the grid reads or writes."""

    query: pl.BlockSpec  # [r, heads, t, h], for the step's queries
    keys: pl.BlockSpec  # [r, k, t, h], for its keys
    per_query: pl.BlockSpec  # [r, heads, 1, t]
    of_queries: pl.BlockSpec  # [r, 1, t]
    of_keys: pl.BlockSpec


def _places(b: int, h: int, group: int, of_keys: bool) -> _Places:
    """The block specs for the grid (row r, head n, step s, m).

    n is a query head and m is 0; with `of_keys`, n is a key head and m one of its query heads.
    """

    def place(shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        def of_step(r, n, s, m, queries, keys, *_):
            # lax.div, because // asks for the sign, and that asks which TPU is here.
            heads = (n * group + m, n) if of_keys else (n, jax.lax.div(n, group))
            return index(r, *heads, queries[r, s], keys[r, s])

        return pl.BlockSpec(shape, of_step)

    return _Places(
        query=place((None, None, b, h), lambda r, n, k, i, j: (r, n, i, 0)),
        keys=place((None, None, b, h), lambda r, n, k, i, j: (r, k, j, 0)),
        per_query=place((None, None, 1, b), lambda r, n, k, i, j: (r, n, 0, i)),
        of_queries=place((None, 1, b), lambda r, n, k, i, j: (r, 0, i)),
        of_keys=place((None, 1, b), lambda r, n, k, i, j: (r, 0, j)),
    )


def _integers(row: Sight, at: _Places) -> list[tuple[Array, pl.BlockSpec]]:
    """The arrays `end`, `position` and `key_position` with their block specs, for a kernel."""
    assert row.end is not None  # `row_of` gives one
    places = at.of_keys, at.of_queries, at.of_keys
    each = row.end, row.position, row.key_position
    return [(x[:, None], place) for x, place in zip(each, places, strict=True)]


def _call(
    kernel: Callable[..., None],
    how: _How,
    listed: Steps,
    window: Array | None,
    grid: tuple[int, int, int],
    given: Sequence[tuple[Array, pl.BlockSpec]],
    found: Sequence[tuple[Any, pl.BlockSpec]],
    scratch: Sequence[tuple[int, int]],
) -> Sequence[Array]:
    """Runs a kernel over the Pallas grid (rows, heads, steps of `listed`, last axis of `grid`)."""
    arrays, in_specs = zip(*given, strict=True)
    like, out_specs = zip(*found, strict=True)
    rows, heads, last = grid
    b, h = scratch[-1]
    work = listed.queries.size * heads * last * 2 * b * b * h  # one product, with nothing skipped
    return pl.pallas_call(
        partial(kernel, how=how),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(listed) + 1,
            grid=(rows, heads, listed.queries.shape[1], last),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=(len(scratch) + 1) * work,
            transcendentals=work // (2 * h),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *like)),
        ),
        interpret=how.interpret,
        name=kernel.__name__.strip("_"),
    )(*listed, window, *arrays)
