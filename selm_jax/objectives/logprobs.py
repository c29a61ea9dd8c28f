"""Token log-probabilities from hidden states, without all logits in memory at once.

    logprobs(h, y, W) = z[y] - logsumexp(z),    z = h W^T, or cap * tanh(h W^T / cap)

The full logits of a batch are by far its largest array (rows x time x vocabulary). Here they exist
for one chunk of tokens at a time, in both directions: the backward pass recomputes a chunk's
logits, with one stored float per token (the logsumexp). Logits are always float32.

On a mesh, rows are sharded over the axes data and fsdp, the unembedding's vocabulary over tensor
and its width over fsdp. The compiler alone would gather the large unembedding for every chunk. Here
each device gathers its shard of the vocabulary once, before the loop over chunks. After the loop,
its gradient is summed once, and the results of the vocabulary's shards are combined.
Letters: r rows, p scored tokens of a row, c tokens of a chunk, d embed, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from selm_jax.parallel.mesh import platform_of

DEVICE_CHUNK = 512  # minimum tokens per device whose logits exist at a time; not used on CPU

# The shardings on a mesh: arrays by row, arrays by chunk and row, and the unembedding.
_ROWS, _CHUNKS, _UNEMBEDDING = P(("data", "fsdp")), P(None, ("data", "fsdp")), P("tensor", "fsdp")


def token_logprobs(
    hidden: Float[Array, "r p d"],
    targets: Int[Array, "r p"],
    unembedding: Float[Array, "v d"],
    chunk: int,
    cap: float | None = None,
    *,
    mesh: Mesh | None = None,
    frozen: bool = False,
) -> Float[Array, "r p"]:
    """The log-probability log p(target | context) of every scored token, in nats.

    Args:
      hidden: the hidden state that predicts each target.
      unembedding: the matrix of the logits `hidden @ unembedding.T`.
      chunk: number of tokens per row whose logits exist at a time. On accelerators it is raised
        until each device has at least `DEVICE_CHUNK` tokens. Chunks never split the rows of a
        batch, so a batch sharded by rows is never gathered. It need not divide p.
      cap: soft cap of the logits, as in Gemma 2; None for no cap.
      mesh: the mesh of the arrays; None for one device.
      frozen: whether the unembedding is not trained, so that its gradient is not computed.

    If two tokens are equally likely, each has log 1/2, whatever the chunks are:

    >>> hidden, unembedding = jnp.ones((1, 3, 4)), jnp.ones((2, 4))
    >>> token_logprobs(hidden, jnp.array([[0, 1, 0]]), unembedding, chunk=2).round(4)
    Array([[-0.6931, -0.6931, -0.6931]], dtype=float32)
    """
    how = _How(_chunk(chunk, targets, mesh), cap, mesh, frozen)
    return _of_tokens(hidden, targets, unembedding, how)[0]


class TokenStats(NamedTuple):
    """Statistics of every scored token; only `logprob` has gradients.

    Attributes:
      logprob: log p(target | context), in nats.
      likeliest: whether the target has the largest logit (the first of equal ones counts).
      entropy: the entropy of the distribution that the target was scored under, in nats.
      collision: log sum_v p(v)^2, the log-probability that two draws from it are equal.
    """

    logprob: Float[Array, "r p"]
    likeliest: Bool[Array, "r p"]
    entropy: Float[Array, "r p"]
    collision: Float[Array, "r p"]


def token_statistics(
    hidden: Float[Array, "r p d"],
    targets: Int[Array, "r p"],
    unembedding: Float[Array, "v d"],
    chunk: int,
    cap: float | None = None,
    *,
    mesh: Mesh | None = None,
    frozen: bool = False,
) -> TokenStats:
    """Statistics of every scored token, in the pass of `token_logprobs`; it has its arguments."""
    how = _How(_chunk(chunk, targets, mesh), cap, mesh, frozen, statistics=True)
    return TokenStats(*_of_tokens(hidden, targets, unembedding, how))


class _How(NamedTuple):
    """The arguments of `token_logprobs` that are not arrays, and whether statistics are wanted."""

    chunk: int
    cap: float | None
    mesh: Mesh | None
    frozen: bool
    statistics: bool = False


def _of_tokens(hidden, targets, unembedding, how: _How) -> tuple[Array, ...]:
    """The fields of `TokenStats`; the first alone if statistics are not wanted."""
    p = targets.shape[1]
    hidden, targets = _whole_chunks(hidden, how.chunk), _whole_chunks(targets, how.chunk)
    return tuple(x[:, :p] for x in cast(Any, _passed)(hidden, targets, unembedding, how))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _passed(hidden, targets, unembedding, how: _How):
    return _forward(hidden, targets, unembedding, how)[0]


def _forward(hidden, targets, unembedding, how: _How):
    chunk, cap, mesh, _, statistics = how

    def of_device(hidden, targets, w):
        w, first = _own_cut(w.astype(hidden.dtype), mesh)

        def of_chunk(args):
            h, y = args
            logits = _logits(h, w, cap)
            sums = _sums(logits, y - first)
            return sums, _of_distribution(logits, first, sums[1]) if statistics else ()

        sums, more = jax.lax.map(of_chunk, (_split(hidden, chunk), _split(targets, chunk)))
        target, normalizer = _over_vocabulary(sums, mesh)
        found = [_join(target - normalizer)]
        if statistics:
            best, mean, squares = _distributions(more, sums[1] - normalizer, mesh)
            # -sum p log p = log Z - sum p z
            found += [_join(best) == targets, _join(normalizer - mean), _join(jnp.log(squares))]
        return tuple(found), normalizer

    run = _on(mesh, of_device, (_ROWS, _ROWS, _UNEMBEDDING), (_ROWS, _CHUNKS))
    found, normalizer = run(hidden, targets, unembedding)
    return found, (hidden, targets, unembedding, normalizer)


def _backward(how: _How, kept, gradients):
    """Computes the gradients from d/dz log p(y) = onehot(y) - softmax(z).

    The derivative of the cap is d/dx cap * tanh(x / cap) = 1 - (z / cap)^2.
    """
    chunk, cap, mesh, frozen, _ = how
    dtype, gradient = kept[2].dtype, gradients[0]

    def of_device(hidden, targets, w, normalizer, gradient):
        w, first = _own_cut(w.astype(hidden.dtype), mesh)

        def of_chunk(d_w, args):
            h, y, z, g = args
            logits = _logits(h, w, cap)
            onehot = (y - first)[..., None] == jnp.arange(w.shape[0])
            d_logits = g[..., None] * (onehot - jnp.exp(logits - z[..., None]))
            if cap is not None:
                d_logits *= 1 - (logits / cap) ** 2
            d_logits = d_logits.astype(h.dtype)
            if not frozen:
                d_w += jnp.einsum("rcv,rcd->vd", d_logits, h, preferred_element_type=jnp.float32)
            return d_w, jnp.einsum("rcv,vd->rcd", d_logits, w)

        chunks = _split(hidden, chunk), _split(targets, chunk), normalizer, _split(gradient, chunk)
        start = jnp.zeros((0,) if frozen else w.shape, jnp.float32)
        d_w, d_hidden = jax.lax.scan(of_chunk, start, chunks)
        if _cuts_vocabulary(mesh):
            d_hidden = jax.lax.psum(d_hidden, "tensor")
        if not frozen and _several(mesh):
            d_w = jax.lax.psum_scatter(d_w, "fsdp", scatter_dimension=1, tiled=True)
            d_w = jax.lax.psum(d_w, "data")
        return _join(d_hidden), d_w.astype(dtype)

    given = _ROWS, _ROWS, _UNEMBEDDING, _CHUNKS, _ROWS
    found = _ROWS, P() if frozen else _UNEMBEDDING
    d_hidden, d_w = _on(mesh, of_device, given, found)(*kept, gradient)
    return d_hidden, None, None if frozen else d_w


_passed.defvjp(_forward, _backward)


# --- one chunk, or one shard of the vocabulary ----------------------------------------------------


def _logits(h: Float[Array, "r c d"], w: Float[Array, "v d"], cap: float | None) -> Array:
    """The logits of a chunk, [r, c, v]."""
    raw = jnp.einsum("rcd,vd->rcv", h, w, preferred_element_type=jnp.float32)
    return raw if cap is None else cap * jnp.tanh(raw / cap)


def _sums(logits: Float[Array, "r c v"], y: Int[Array, "r c"]) -> tuple[Array, Array]:
    """The target's logit (0 if the target is in another shard) and this shard's logsumexp."""
    size = logits.shape[-1]
    target = jnp.take_along_axis(logits, jnp.clip(y, 0, size - 1)[..., None], axis=-1)[..., 0]
    return jnp.where((y >= 0) & (y < size), target, 0), jax.nn.logsumexp(logits, axis=-1)


def _over_vocabulary(sums: tuple[Array, Array], mesh: Mesh | None) -> tuple[Array, Array]:
    """Combines the results of `_sums` over all shards of the vocabulary."""
    target, normalizer = sums
    if not _cuts_vocabulary(mesh):
        return target, normalizer
    largest = jax.lax.pmax(normalizer, "tensor")
    total = jax.lax.psum(jnp.exp(normalizer - largest), "tensor")
    return jax.lax.psum(target, "tensor"), largest + jnp.log(total)


def _of_distribution(logits: Float[Array, "r c v"], first: Any, normalizer: Array):
    """This shard's likeliest token, mean logit, sum of squared probabilities and largest logit."""
    p = jnp.exp(logits - normalizer[..., None])
    best, mean = first + jnp.argmax(logits, axis=-1), jnp.sum(p * logits, axis=-1)
    return best, mean, jnp.sum(p * p, axis=-1), jnp.max(logits, axis=-1)


def _distributions(of_shard: tuple[Array, ...], log_share: Array, mesh: Mesh | None):
    """Combines the first three results of `_of_distribution` over all shards of the vocabulary.

    A shard's sums are over the probabilities within it, which are exp(`log_share`) of all.
    """
    best, mean, squares, largest = of_shard
    if not _cuts_vocabulary(mesh):
        return best, mean, squares
    of_all = jax.lax.pmax(largest, "tensor")
    # The first of equal ones counts, whichever shard it is in.
    best = jnp.where(largest == of_all, best, jnp.iinfo(jnp.int32).max)
    share = jnp.exp(log_share)
    sums = jax.lax.psum((share * mean, share**2 * squares), "tensor")
    return jax.lax.pmin(best, "tensor"), *sums


# --- on a mesh --------------------------------------------------------------------------------


def _several(mesh: Mesh | None) -> bool:
    return mesh is not None and mesh.size > 1


def _cuts_vocabulary(mesh: Mesh | None) -> bool:
    return mesh is not None and mesh.shape["tensor"] > 1


def _on(mesh: Mesh | None, of_device: Callable[..., Any], given: Any, found: Any) -> Any:
    """Turns a function of one device's shards into a function of the whole arrays."""
    if not _several(mesh):
        return of_device
    return jax.shard_map(of_device, mesh=mesh, in_specs=given, out_specs=found, check_vma=False)


def _own_cut(w: Array, mesh: Mesh | None) -> tuple[Float[Array, "v d"], Any]:
    """This device's rows of the unembedding at full width, and the token id of the first row."""
    if not _several(mesh):
        return w, 0
    w = jax.lax.all_gather(w, "fsdp", axis=1, tiled=True)
    return w, jax.lax.axis_index("tensor") * w.shape[0]


def _chunk(asked: int, targets: Int[Array, "r p"], mesh: Mesh | None) -> int:
    """Chooses the number of tokens per row in one chunk; on a CPU it is at most `asked`.

    An accelerator reads the unembedding for every chunk, so with few tokens it would wait for its
    memory. Chunks share the tokens evenly, in multiples of 8: with 140 tokens in chunks of 128, the
    second one would be nearly empty.
    """
    rows, p = targets.shape
    if platform_of(mesh) != "cpu":
        own = rows if mesh is None else rows // (mesh.shape["data"] * mesh.shape["fsdp"])
        asked = max(asked, -(-DEVICE_CHUNK // own))
    even = -(-p // -(-p // asked))
    return min(asked, p, -(-even // 8) * 8)


def _whole_chunks(x: Array, chunk: int) -> Array:
    """Pads [r, p, ...] with zeros along p, to a multiple of the chunk size."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * (x.ndim - 2)))


def _split(x: Array, chunk: int) -> Array:
    """Splits the axis p into chunks of length c: [r, p, ...] -> [chunks, r, c, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """Joins the chunks to the axis p again: [chunks, r, c, ...] -> [r, p, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
