"""From logits to a token: pure functions of logits, settings and a random number.

The random number that sample s of prompt i draws at position t is a function of
(seed, iteration, i, s, t) and nothing else: not of the batch, the slot or the mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from selm_jax.config import SamplingSettings

_BLOCK = 256
NOTHING_LEFT = -1  # in place of a token, where a filter of the user's left none to draw

# `(logits[slots, vocab], t[slots])` to logits of the same shape, -inf where a token is not to be
# drawn; `t` counts the tokens that the response has already. Pure: it is traced, once.
Filter: TypeAlias = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Sampling(SamplingSettings):
    """What to draw from, in the order of filters of yours, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: divides the logits; > 0 (greedy answers do not draw at all).
      top_k: keep the k likeliest tokens, and any as likely as the last of them; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities sum to at least top_p (ties as above); 1
        keeps all.
      min_p: keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
      filter: a function of the user's on the logits; None changes nothing.

    >>> Sampling(temperature=0.7, top_p=0.9).top_k
    0
    >>> Sampling(top_p=1.5)
    Traceback (most recent call last):
    ValueError: top_p is 1.5; expected ...
    """

    filter: Filter | None = None

    @classmethod
    def of(cls, settings: SamplingSettings, filter: Filter | None = None) -> Sampling:
        """With the settings of a group that has more of them, such as `rollout`."""
        names = [each.name for each in dataclasses.fields(SamplingSettings)]
        return cls(**{name: getattr(settings, name) for name in names}, filter=filter)


def stream(seed: int, iteration: int, prompt: int, sample: int) -> UInt32[Array, "2"]:
    """The key of one response's random numbers.

    >>> same = stream(42, 1, 7, 2) == stream(42, 1, 7, 2)
    >>> bool(same.all())
    True
    """
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
    """Unnormalised probabilities after the built-in filters; the likeliest token has 1.

    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.125]]))
    >>> probabilities(logits, Sampling(top_k=2)).round(3)
    Array([[1. , 0.5, 0. ]], dtype=float32)
    """
    p = jnp.exp((logits - logits.max(-1, keepdims=True)) / settings.temperature)
    for least in BUILT_IN:
        if (bound := least(p, settings)) is not None:
            p = jnp.where(p >= bound, p, 0)
    return p


Bound: TypeAlias = Float[Array, "slots 1"] | float | None


def _top_k(p: Float[Array, "slots vocab"], settings: Sampling) -> Bound:
    if not settings.top_k:
        return None
    k = min(settings.top_k, p.shape[-1])
    return _greatest(lambda bound: (p >= bound).sum(-1, keepdims=True) >= k, len(p))


def _top_p(p: Float[Array, "slots vocab"], settings: Sampling) -> Bound:
    if settings.top_p == 1:
        return None
    wanted = settings.top_p * p.sum(-1, keepdims=True)
    return _greatest(
        lambda bound: jnp.where(p >= bound, p, 0).sum(-1, keepdims=True) >= wanted, len(p)
    )


def _greatest(
    enough: Callable[[Float[Array, "slots 1"]], Bool[Array, "slots 1"]], slots: int
) -> Float[Array, "slots 1"]:
    """The greatest bound in [0, 1] that keeps enough tokens; 0 is supposed to.

    It is exact without a sort, which would cost more than the rest of a decoding step: floats that are
    not negative have the order of their bits, and the 2^30 floats up to 1 are halved 30 times.

    Args:
      enough: whether the tokens that are at least as likely as the bound are enough. True up to some
        bound, False above it.
    """
    one = jnp.float32(1).view(jnp.int32)

    def halve(_, between):
        low, high = between  # enough at `low`, not at `high`
        middle = low + (high - low) // 2
        holds = enough(middle.view(jnp.float32))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    none = jnp.zeros((slots, 1), jnp.int32)
    return jax.lax.fori_loop(0, 30, halve, (none, none + one + 1))[0].view(jnp.float32)


def _min_p(
    p: Float[Array, "slots vocab"],  # noqa: ARG001 (all filters have one signature)
    settings: Sampling,
) -> Bound:
    return settings.min_p or None


# The built-in filters, in order: each says how likely a token has to be; None keeps all.
BUILT_IN: tuple[Callable[[Array, Sampling], Bound], ...] = (_top_k, _top_p, _min_p)


def filtered(
    logits: Float[Array, "slots vocab"], t: Int[Array, " slots"], user: Filter
) -> Float[Array, "slots vocab"]:
    """What a filter of the user's makes of each slot's logits.

    It is shown one slot at a time, so that no response can depend on another.
    """
    return jax.vmap(lambda row, t: user(row[None], t[None])[0])(logits, t)


def draw(p: Float[Array, "slots vocab"], uniform: Float[Array, " slots"]) -> Int[Array, " slots"]:
    """Inverts the cumulative distribution of p (unnormalised) at `uniform`.

    One random number a token, where Gumbel noise needs one for each entry of the vocabulary. Sums
    are taken over blocks first: the block, then the token in it. Resolution is that of float32,
    2^-23 of the mass. A token of probability zero is never drawn.

    Of the probabilities 1/2, 1/4, 1/4 the number 0.6 falls on the second:

    >>> draw(jnp.array([[2.0, 1.0, 1.0]]), jnp.array([0.6])).tolist()
    [1]
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
    """The likeliest token where `greedy`, else a draw; `NOTHING_LEFT` where a filter of the user's
    leaves no finite logit, or one that is none."""
    of_samples = logits
    if settings.filter is not None:
        of_samples = filtered(logits, t, settings.filter)
    sampled = draw(probabilities(of_samples, settings), uniforms(streams, t))
    if settings.filter is not None:
        sampled = jnp.where(jnp.isfinite(of_samples.max(-1)), sampled, NOTHING_LEFT)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), sampled).astype(jnp.int32)
