"""Sampling a token from logits: pure functions of logits, settings and a random number.

The random number that sample s of prompt i draws at position t depends only on
(seed, iteration, i, s, t), and not on the batch, the slot or the mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from selm_jax.config import SamplingSettings

_BLOCK = 256
NOTHING_LEFT = -1  # returned instead of a token if the user's filter left none to draw

# A pure function from `(logits[slots, vocab], t[slots])` to logits of the same shape, with -inf for
# tokens that must not be drawn; `t` is the number of tokens that the response has so far. JAX
# traces it once.
Filter: TypeAlias = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Sampling(SamplingSettings):
    """How to sample: your own filter is applied first, then temperature, top-k, top-p and min-p.

    Attributes:
      temperature: divides the logits; > 0 (greedy answers do not draw at all).
      top_k: keeps the k most likely tokens, and any as likely as the last of them; 0 keeps all.
      top_p: keeps the fewest tokens whose probabilities sum to at least top_p (ties as above); 1
        keeps all.
      min_p: keeps tokens at least min_p times as likely as the most likely one; 0 keeps all.
      filter: the user's function on the logits; None changes nothing.

    >>> Sampling(temperature=0.7, top_p=0.9).top_k
    0
    >>> Sampling(top_p=1.5)
    Traceback (most recent call last):
    ValueError: top_p is 1.5; expected ...
    """

    filter: Filter | None = None

    @classmethod
    def of(cls, settings: SamplingSettings, filter: Filter | None = None) -> Sampling:
        """Takes the sampling settings from a larger group of settings, such as `rollout`."""
        names = [each.name for each in dataclasses.fields(SamplingSettings)]
        return cls(**{name: getattr(settings, name) for name in names}, filter=filter)


def stream(seed: int, iteration: int, prompt: int, sample: int) -> UInt32[Array, "2"]:
    """The random key from which all tokens of one response are drawn.

    >>> same = stream(42, 1, 7, 2) == stream(42, 1, 7, 2)
    >>> bool(same.all())
    True
    """
    key = jax.random.key(seed, impl="threefry2x32")
    for number in (iteration, prompt, sample):
        key = jax.random.fold_in(key, number)
    return jax.random.key_data(key)


def uniforms(streams: UInt32[Array, "slots 2"], t: Int[Array, " slots"]) -> Float[Array, " slots"]:
    """The random number in [0, 1) that each stream draws at its own step t."""

    def one(stream, t):
        key = jax.random.wrap_key_data(stream, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, t))

    return jax.vmap(one)(streams, t)


def probabilities(
    logits: Float[Array, "slots vocab"], settings: Sampling
) -> Float[Array, "slots vocab"]:
    """Unnormalised probabilities after the built-in filters; the most likely token has 1.

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
    """The largest bound in [0, 1] for which `enough` is true; it must be true for a bound of 0.

    It is exact without a sort, which would cost more than the rest of a decoding step. Non-negative
    floats are ordered like their bits, so 30 bisections find one of the 2^30 floats up to 1.

    Args:
      enough: whether the tokens that are at least as likely as the bound are enough. It must be
        True up to some bound and False above it.
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


# The built-in filters, in order. Each returns the least probability that a token needs, or None to
# keep all tokens.
BUILT_IN: tuple[Callable[[Array, Sampling], Bound], ...] = (_top_k, _top_p, _min_p)


def filtered(
    logits: Float[Array, "slots vocab"], t: Int[Array, " slots"], user: Filter
) -> Float[Array, "slots vocab"]:
    """Each slot's logits after the user's filter.

    The filter sees one slot at a time, so that no response can depend on another.
    """
    return jax.vmap(lambda row, t: user(row[None], t[None])[0])(logits, t)


def draw(p: Float[Array, "slots vocab"], uniform: Float[Array, " slots"]) -> Int[Array, " slots"]:
    """Inverts the cumulative distribution of p (unnormalised) at `uniform`.

    It needs one random number per token; Gumbel noise would need one per entry of the vocabulary.
    Sums over blocks give the block first, and then the token in it. The resolution is that of
    float32, 2^-23 of the mass. A token with probability zero is never drawn.

    With the probabilities 1/2, 1/4, 1/4, the number 0.6 draws the second token:

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
    """The first entry where the running sum exceeds `at`, and how far `at` is into that entry."""
    total = jnp.cumsum(mass, axis=-1)
    # Long sums are computed in parallel, and rounding may make `total` rise without mass, or even
    # fall. So the entry is the first one with mass of its own whose sum is beyond `at`.
    beyond = (total > at[:, None]) & (mass > 0)
    # Rounding may move `at` past the end; the last entry with any mass is drawn then.
    last = mass.shape[-1] - 1 - jnp.argmax((mass > 0)[:, ::-1], axis=-1)
    entry = jnp.where(beyond.any(axis=-1), jnp.argmax(beyond, axis=-1), last)
    before = _pick(total - mass, entry)
    return entry, jnp.maximum(at - before, 0)


def _pick(x: Float[Array, "slots n *rest"], entry: Int[Array, " slots"]):
    """Picks one entry of each slot: x[slot, entry[slot]].

    With vmap instead of an index over slots, XLA sees on a mesh that no slot needs another's data.
    """
    return jax.vmap(lambda x, i: x[i])(x, entry)


class Drawn(NamedTuple):
    """The next token of each slot, with its log-probabilities in nats.

    Attributes:
      token: the token; `NOTHING_LEFT` if the user's filter leaves none, or returns NaN or inf.
      logp: under the policy itself, at temperature 1 and without filters: what training scores.
      sampled_logp: under the distribution that it was drawn from, after temperature and filters; of
        a greedy answer 0, since its tokens are certain.
    """

    token: Int[Array, " slots"]
    logp: Float[Array, " slots"]
    sampled_logp: Float[Array, " slots"]


def next_tokens(
    logits: Float[Array, "slots vocab"],
    streams: UInt32[Array, "slots 2"],
    t: Int[Array, " slots"],
    greedy: Bool[Array, " slots"],
    settings: Sampling,
    proposed: Float[Array, "slots vocab"] | None = None,
) -> Drawn:
    """The next token of each slot: the most likely one if `greedy`, otherwise a sampled one.

    Args:
      logits: the policy's.
      proposed: the logits that samples are drawn from, such as a mixture's; None: the policy's.
    """
    of_samples = logits if proposed is None else proposed
    if settings.filter is not None:
        of_samples = filtered(of_samples, t, settings.filter)
    p = probabilities(of_samples, settings)
    sampled = draw(p, uniforms(streams, t))
    sampled_logp = jnp.where(greedy, 0, jnp.log(_pick(p, sampled) / p.sum(-1)))
    if settings.filter is not None:
        sampled = jnp.where(jnp.isfinite(of_samples.max(-1)), sampled, NOTHING_LEFT)
    token = jnp.where(greedy, jnp.argmax(logits, axis=-1), sampled).astype(jnp.int32)
    return Drawn(token, _pick(logits, token) - jax.nn.logsumexp(logits, axis=-1), sampled_logp)
