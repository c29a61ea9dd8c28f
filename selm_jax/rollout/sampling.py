"""From logits to a token: pure functions of logits, settings and a random number.

The random number that sample s of prompt i draws at position t is a function of
(seed, iteration, i, s, t) and nothing else: not of the batch, the slot or the mesh.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What to draw from. Filters apply in the order temperature, top-k, top-p, min-p.

    Attributes:
      temperature: divides the logits; > 0 (greedy answers do not draw at all).
      top_k: keep the k likeliest tokens, and any as likely as the last of them; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities sum to at least top_p (ties as above); 1
        keeps all.
      min_p: keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must lie in [0, 1]")


def stream(seed: int, iteration: int, prompt: int, sample: int) -> UInt32[Array, "2"]:
    """The key of one response's random numbers."""
    key = jax.random.key(seed, impl="threefry2x32")
    for number in (iteration, prompt, sample):
        key = jax.random.fold_in(key, number)
    return jax.random.key_data(key)


def uniforms(streams: UInt32[Array, "slots 2"], t: Int[Array, " slots"]) -> Float[Array, " slots"]:
    """The number in [0, 1) that each stream draws at its own step t."""

    def one(stream, t):
        key = jax.random.wrap_key_data(stream, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, t))

    return jax.vmap(one)(streams, t)


def probabilities(
    logits: Float[Array, "slots vocab"], settings: Sampling
) -> Float[Array, "slots vocab"]:
    """Unnormalised probabilities after the filters; the likeliest token has 1."""
    p = jnp.exp((logits - logits.max(-1, keepdims=True)) / settings.temperature)
    if settings.top_k:
        kth = jax.lax.top_k(p, min(settings.top_k, p.shape[-1]))[0][:, -1:]
        p = jnp.where(p >= kth, p, 0)
    if settings.top_p < 1:
        ordered = jnp.sort(p, axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered  # mass of all likelier tokens
        kept = before < settings.top_p * ordered.sum(-1, keepdims=True)
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        p = jnp.where(p >= least, p, 0)
    if settings.min_p:
        p = jnp.where(p >= settings.min_p, p, 0)
    return p


def draw(p: Float[Array, "slots vocab"], uniform: Float[Array, " slots"]) -> Int[Array, " slots"]:
    """Inverts the cumulative distribution of p (unnormalised) at `uniform`.

    One random number a token, where Gumbel noise needs one for each entry of the vocabulary. Sums
    are taken over blocks first: the block, then the token in it. Resolution is that of float32,
    2^-23 of the mass. A token of probability zero is never drawn.
    """
    slots, vocab = p.shape
    blocks = jnp.pad(p, ((0, 0), (0, -vocab % _BLOCK))).reshape(slots, -1, _BLOCK)
    mass = blocks.sum(-1)
    block, rest = _invert(mass, uniform * mass.sum(-1))
    inside = _pick(blocks, block)
    token, _ = _invert(inside, rest)
    return block * _BLOCK + token


def _invert(mass: Float[Array, "slots n"], at: Float[Array, " slots"]):
    """The entry whose share of the running sum holds `at`, and what of `at` is left inside it."""
    total = jnp.cumsum(mass, axis=-1)
    # Long sums are taken in parallel and rounded apart: `total` may rise where there is no mass, and
    # even fall. So the entry is the first with mass of its own whose sum lies beyond `at`.
    beyond = (total > at[:, None]) & (mass > 0)
    # Rounding may carry `at` past the end: stay on the last entry that has any mass.
    last = mass.shape[-1] - 1 - jnp.argmax((mass > 0)[:, ::-1], axis=-1)
    entry = jnp.where(beyond.any(axis=-1), jnp.argmax(beyond, axis=-1), last)
    before = _pick(total - mass, entry)
    return entry, jnp.maximum(at - before, 0)


def _pick(x: Float[Array, "slots n *rest"], entry: Int[Array, " slots"]):
    """Each slot's own entry. By vmap and not by an index of slots: on a mesh, XLA then sees that no
    slot needs what is another's."""
    return jax.vmap(lambda x, i: x[i])(x, entry)


def next_tokens(
    logits: Float[Array, "slots vocab"],
    streams: UInt32[Array, "slots 2"],
    t: Int[Array, " slots"],
    greedy: Bool[Array, " slots"],
    settings: Sampling,
) -> Int[Array, " slots"]:
    """The likeliest token where `greedy`, else a draw."""
    sampled = draw(probabilities(logits, settings), uniforms(streams, t))
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), sampled).astype(jnp.int32)
