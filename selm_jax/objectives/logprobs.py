"""Hidden states to token log-probabilities, the vocabulary never whole in memory.

    logprobs(h, y, W) = z[y] - logsumexp(z),    z = h W^T, or cap * tanh(h W^T / cap)

The full logits of a batch are its largest array by far (rows x time x vocabulary). Here they exist
for one chunk of tokens at a time, in both directions: the backward pass computes a chunk's logits
again from what the forward pass kept, one float per token (the logsumexp). Always float32.
Letters: r rows, p scored tokens of a row, c tokens of a chunk, d embed, v vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_logprobs(
    hidden: Float[Array, "r p d"],
    targets: Int[Array, "r p"],
    unembedding: Float[Array, "v d"],
    chunk: int,
    cap: float | None = None,
) -> Float[Array, "r p"]:
    """log p(target | context) for every scored token.

    Args:
      hidden: the state that predicts each target.
      unembedding: logits are `hidden @ unembedding.T`.
      chunk: tokens per row whose logits exist at a time. Rows stay whole, so that a batch sharded
        by rows is never gathered. Need not divide p.
      cap: of the logits, as in Gemma 2; None leaves them.

    Two tokens that are equally likely have log 1/2 each, in whatever chunks they are computed:

    >>> hidden, unembedding = jnp.ones((1, 3, 4)), jnp.ones((2, 4))
    >>> token_logprobs(hidden, jnp.array([[0, 1, 0]]), unembedding, chunk=2).round(4)
    Array([[-0.6931, -0.6931, -0.6931]], dtype=float32)
    """
    p = targets.shape[1]
    chunk = min(chunk, p)
    padding = -p % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    return cast(Array, _logprobs(hidden, targets, unembedding, chunk, cap))[:, :p]


class TokenStats(NamedTuple):
    """What evaluation asks of every scored token.

    Attributes:
      logprob: log p(target | context), in nats.
      likeliest: whether the target is the token of the largest logit (of equal ones the first).
    """

    logprob: Float[Array, "r p"]
    likeliest: Bool[Array, "r p"]


def token_statistics(
    hidden: Float[Array, "r p d"],
    targets: Int[Array, "r p"],
    unembedding: Float[Array, "v d"],
    chunk: int,
    cap: float | None = None,
) -> TokenStats:
    """`token_logprobs` and what else the same logits tell, forward only; arguments as there."""
    p = targets.shape[1]
    chunk = min(chunk, p)
    padding = -p % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    w = unembedding.astype(hidden.dtype)

    def of_chunk(args):
        h, y = args
        logits = _logits(h, w, cap)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        logprob = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0] - normalizer
        return TokenStats(logprob, jnp.argmax(logits, axis=-1) == y)

    found = jax.lax.map(of_chunk, (_split(hidden, chunk), _split(targets, chunk)))
    return TokenStats(*(_join(x)[:, :p] for x in found))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logprobs(hidden, targets, unembedding, chunk, cap):
    return _forward(hidden, targets, unembedding, chunk, cap)[0]


def _forward(hidden, targets, unembedding, chunk, cap):
    w = unembedding.astype(hidden.dtype)

    def of_chunk(args):
        h, y = args
        logits = _logits(h, w, cap)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        return jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0] - normalizer, normalizer

    logprob, normalizer = jax.lax.map(of_chunk, (_split(hidden, chunk), _split(targets, chunk)))
    return _join(logprob), (hidden, targets, unembedding, normalizer)


def _backward(chunk, cap, kept, gradient):
    """d/dz log p(y) = onehot(y) - softmax(z); d/dx cap * tanh(x / cap) = 1 - (z / cap)^2."""
    hidden, targets, unembedding, normalizer = kept
    w = unembedding.astype(hidden.dtype)

    def of_chunk(d_w, args):
        h, y, z, g = args
        logits = _logits(h, w, cap)
        onehot = y[..., None] == jnp.arange(w.shape[0])
        d_logits = g[..., None] * (onehot - jnp.exp(logits - z[..., None]))
        if cap is not None:
            d_logits *= 1 - (logits / cap) ** 2
        d_logits = d_logits.astype(h.dtype)
        d_w += jnp.einsum("rcv,rcd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return d_w, jnp.einsum("rcv,vd->rcd", d_logits, w)

    chunks = (_split(hidden, chunk), _split(targets, chunk), normalizer, _split(gradient, chunk))
    d_w, d_hidden = jax.lax.scan(of_chunk, jnp.zeros(w.shape, jnp.float32), chunks)
    return _join(d_hidden), None, d_w.astype(unembedding.dtype)


_logprobs.defvjp(_forward, _backward)


def _logits(h: Float[Array, "r c d"], w: Float[Array, "v d"], cap: float | None) -> Array:
    """[r, c, v]"""
    raw = jnp.einsum("rcd,vd->rcv", h, w, preferred_element_type=jnp.float32)
    return raw if cap is None else cap * jnp.tanh(raw / cap)


def _split(x: Array, chunk: int) -> Array:
    """[r, p, ...] -> [chunks, r, c, ...]"""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """[chunks, r, c, ...] -> [r, p, ...]"""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
