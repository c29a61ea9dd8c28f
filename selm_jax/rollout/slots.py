"""The slots of the rollout engine, and the programs that fill and decode them.

On a mesh, slots are sharded over the axes data and fsdp and the model over tensor (`rules.DECODE`).
Each copy of the model computes its own slots and its own rows of a prefill, and no cache moves from
copy to copy. In each decoding step the copies exchange only the count of idle slots.

With a mixture, two models of one architecture read every token: `params` is then (the policy's, its
reference's), and a cache has the layers of the policy and after them those of the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Self, TypeAlias, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from selm_jax.config import Mixture
from selm_jax.models.cache import LayerCache, empty_cache
from selm_jax.models.decoder import Decoder, Params, logits
from selm_jax.parallel.rules import DECODE, partition
from selm_jax.rollout import mixtures
from selm_jax.rollout.mixtures import mixed
from selm_jax.rollout.sampling import Drawn, Sampling, next_tokens

Models: TypeAlias = Params | tuple[Params, Params]  # of the policy, or of it and its reference
Caches: TypeAlias = tuple[LayerCache, ...]
_GROUPS = 3  # as many prefilled groups may wait for slots; see `Setup.groups`


@dataclasses.dataclass(frozen=True)
class Setup:
    """The model, sizes and mesh for which the generation programs are compiled.

    Attributes:
      decoder: an unrolled decoder (`scan=False`); its dtype is the compute dtype.
      slots: the number of responses that decode together.
      max_prompt, max_new_tokens: the most tokens of a prompt and of a response.
      stop_ids: the tokens that end a response.
      prefill_rows: the number of prompts per prefill.
      mesh: the mesh to compute on (`parallel.mesh.decode_mesh`), which must divide slots and
        prefill rows evenly; None for one device.
      mixture: the mixtures of two policies that samples are drawn from; None for one policy.
    """

    decoder: Decoder
    sampling: Sampling
    slots: int
    max_prompt: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    prefill_rows: int = 4
    mesh: Mesh | None = None
    mixture: Mixture | None = None

    @classmethod
    def fitted(cls, *, slots: int, prefill_rows: int, mesh: Mesh, **rest: Any) -> Self:
        """A setup with slots and prefill rows rounded up so that the mesh divides them evenly."""
        copies = _copies(mesh)
        slots, prefill_rows = (-(-n // copies) * copies for n in (slots, prefill_rows))
        return cls(slots=slots, prefill_rows=prefill_rows, mesh=mesh, **rest)

    @property
    def copies(self) -> int:
        """The number of copies of the model."""
        return _copies(self.mesh)

    @property
    def groups(self) -> int:
        """The most prefilled groups of prompts that are kept at the same time.

        A copy that is ahead of the others needs new prompts while theirs are still waiting. With
        three groups it hardly ever has to wait; each copy holds only its own part of a group.
        """
        return min(_GROUPS, self.copies)


def _copies(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


@flax.struct.dataclass
class Slots:
    """The decoding state of all slots, each of which generates one answer at a time.

    `token` is the last token drawn, which is not yet in the cache.
    """

    cache: Caches
    token: Int[Array, " slots"]
    position: Int[Array, " slots"]
    drawn: Int[Array, " slots"]  # tokens drawn so far, `token` included
    output: Int[Array, "slots new_tokens"]
    logps: Float[Array, "slots new_tokens"]  # of `output`; see `sampling.Drawn`
    sampled_logps: Float[Array, "slots new_tokens"]
    streams: UInt32[Array, "slots 2"]
    greedy: Bool[Array, " slots"]
    active: Bool[Array, " slots"]
    weight: Float[Array, " slots"] | None  # of the reference in each slot's mixture

    @property
    def capacity(self) -> int:
        return self.cache[0].keys.shape[2]


def _cut(setup: Setup, tree: Any, *axes: str | None) -> Any:
    """Shards arrays over the mesh by the names of their first axes; other axes are not sharded."""
    if setup.mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, places(setup, tree, *axes))


def places(setup: Setup, tree: Any, *axes: str | None) -> Any:
    """The shardings that `_cut` gives to arrays, by the names of their first axes."""

    def of(x: Array) -> NamedSharding:
        names = (axes + (None,) * x.ndim)[: x.ndim]
        return partition("rollout", names, x.shape, cast(Mesh, setup.mesh), DECODE)

    return jax.tree.map(of, tree)


def _cut_slots(setup: Setup, slots: Slots) -> Slots:
    if setup.mesh is None:
        return slots
    return jax.lax.with_sharding_constraint(slots, slot_places(setup, slots))


def slot_places(setup: Setup, slots: Slots) -> Slots:
    rest = places(setup, slots.replace(cache=()), "slots")
    return rest.replace(cache=places(setup, slots.cache, "slots", "kv_heads"))


@partial(jax.jit, static_argnums=0)
def prefill(
    setup: Setup,
    params: Models,
    tokens: Int[Array, "rows time"],
    lengths: Int[Array, " rows"],
) -> tuple[Caches, tuple[Float[Array, "rows vocab"], ...]]:
    """Computes the prompts' keys and values, and each model's logits after their last tokens."""
    rows, time = tokens.shape
    tokens = _cut(setup, tokens, "slots")
    positions = jnp.broadcast_to(jnp.arange(time), (rows, time))
    end = _cut(setup, jnp.where(positions < lengths[:, None], lengths[:, None], 0), "slots")

    def last(hidden: Array) -> Array:
        return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

    scores, cache = _read(
        setup, params, tokens, positions, end, _zeros(setup, rows, time),
        jnp.zeros(rows, jnp.int32), last,
    )  # fmt: skip
    return _cut(setup, cache, "slots", "kv_heads"), scores


def _read(
    setup: Setup,
    params: Models,
    tokens,
    positions,
    end,
    cache: Caches,
    index,
    picked: Callable[[Array], Array],
) -> tuple[tuple[Float[Array, "rows vocab"], ...], Caches]:
    """Lets each model read the tokens: its logits after one token of each row, and all caches.

    Args:
      tokens, positions, end, cache, index: those of the decoder.
      picked: picks that token's hidden state of each row, [rows, embed] from [rows, time, embed].
    """
    models = params if isinstance(params, tuple) else (params,)
    layers = setup.decoder.config.layers
    scores, written = [], ()
    for i, of_model in enumerate(models):
        before = cache[i * layers : (i + 1) * layers]
        found = setup.decoder.apply({"params": of_model}, tokens, positions, end, before, index)
        hidden, after = cast(tuple[Array, Caches], found)
        scores.append(_scores(setup, of_model, picked(hidden)))
        written += after
    return tuple(scores), written


def _draw(setup: Setup, scores: tuple[Array, ...], streams, t, greedy, weight) -> Drawn:
    """The next token of each slot, from the logits of the policy and, if it is mixed, another."""
    policy, *others = scores
    proposed = None if weight is None else mixed(policy, *others, weight=weight[:, None])
    return next_tokens(policy, streams, t, greedy, setup.sampling, proposed)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(setup, slots, cache, scores, rows, lengths, streams, greedy, weight=None) -> Slots:
    """Copies prefilled rows into slots and draws the first token of each.

    Args:
      rows: for each slot, the row that it takes, one of its own copy's; -1 leaves it unchanged.
      weight: for each slot, the reference's weight in its mixture; None without a mixture.
    """
    given = _cut(setup, (rows, lengths, streams, greedy, weight), "slots")
    rows, lengths, streams, greedy, weight = given
    taken, rows = rows >= 0, jnp.maximum(rows, 0)
    scores = tuple(_rows_of_own(setup, each, rows) for each in scores)
    first = _draw(setup, scores, streams, jnp.zeros_like(rows), greedy, weight)

    def put(old, new):
        return jnp.where(taken.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    def put_prefix(old, new):
        # The padding of a prefill may be longer than the cache; the prompts taken are not.
        time = min(old.shape[2], new.shape[2])
        new = put(old[:, :, :time], _rows_of_own(setup, new[:, :, :time], rows).astype(old.dtype))
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=2)

    def begun(x):
        return jnp.zeros((setup.slots, setup.max_new_tokens), x.dtype).at[:, 0].set(x)

    slots = Slots(
        cache=jax.tree.map(put_prefix, slots.cache, cache),
        token=put(slots.token, first.token),
        position=put(slots.position, lengths),
        drawn=put(slots.drawn, jnp.ones_like(rows)),
        output=put(slots.output, begun(first.token)),
        logps=put(slots.logps, begun(first.logp)),
        sampled_logps=put(slots.sampled_logps, begun(first.sampled_logp)),
        streams=put(slots.streams, streams),
        greedy=put(slots.greedy, greedy),
        active=put(slots.active, _goes_on(setup, first.token, jnp.ones_like(rows))),
        weight=jax.tree.map(put, slots.weight, weight),
    )
    return _cut_slots(setup, slots)


def _rows_of_own(setup: Setup, x: Array, rows: Int[Array, " slots"]) -> Array:
    """Reads x[rows] where each slot needs only a row of its own copy of the model: [slots, ...].

    With vmap over the copies, XLA sees that no copy needs rows of another.
    """
    parts = x.reshape(setup.copies, -1, *x.shape[1:])
    rows = rows.reshape(setup.copies, -1) % parts.shape[1]
    found = jax.vmap(lambda part, rows: part[rows])(parts, rows)
    return found.reshape(-1, *x.shape[1:])


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    setup: Setup, params: Models, slots: Slots, stop_at: Int[Array, ""], steps: Int[Array, ""]
) -> tuple[Slots, tuple[Array, ...]]:
    """Decodes until `stop_at` slots are idle, or for `steps` steps.

    Returns:
      the slots, and (active, drawn, output, logps, sampled_logps) of all slots, on every device,
      for the host to read.
    """

    def busy(state: tuple[Slots, Array]):
        slots, done = state
        return (jnp.sum(~slots.active) < stop_at) & (done < steps)

    def step(state: tuple[Slots, Array]) -> tuple[Slots, Array]:
        slots, done = state
        # An idle slot is at the start of its cache, so the TPU kernel reads next to nothing for it.
        position = jnp.where(slots.active, slots.position, 0)
        scores, cache = _read(
            setup, params, slots.token[:, None], position[:, None], None, slots.cache, position,
            lambda hidden: hidden[:, 0],
        )  # fmt: skip
        found = _draw(setup, scores, slots.streams, slots.drawn, slots.greedy, slots.weight)
        token, drawn, on = found.token, slots.drawn + 1, slots.active
        here = on[:, None] & (slots.drawn[:, None] == jnp.arange(setup.max_new_tokens))
        slots = slots.replace(
            cache=cache,
            token=jnp.where(on, token, slots.token),
            position=jnp.where(on, slots.position + 1, slots.position),
            drawn=jnp.where(on, drawn, slots.drawn),
            output=jnp.where(here, token[:, None], slots.output),
            logps=jnp.where(here, found.logp[:, None], slots.logps),
            sampled_logps=jnp.where(here, found.sampled_logp[:, None], slots.sampled_logps),
            active=on & _goes_on(setup, token, drawn),
        )
        return slots, done + 1

    slots, _ = jax.lax.while_loop(busy, step, (slots, jnp.int32(0)))
    slots = _cut_slots(setup, slots)
    seen = slots.active, slots.drawn, slots.output, slots.logps, slots.sampled_logps
    return slots, _cut(setup, seen, None)


def _scores(setup: Setup, params: Params, hidden: Float[Array, "n embed"]):
    """Computes logits [n, vocab] by shards of the vocabulary and gathers them for sampling.

    With only the second constraint, XLA would move the unembedding matrix between devices instead.
    """
    scores = logits(setup.decoder.config, params, hidden)
    return _cut(setup, _cut(setup, scores, "slots", "vocab"), "slots")


def _goes_on(setup: Setup, token: Int[Array, " n"], drawn: Int[Array, " n"]) -> Bool[Array, " n"]:
    stop = jnp.array(setup.stop_ids, jnp.int32)
    return (drawn < setup.max_new_tokens) & ~jnp.any(token[:, None] == stop, axis=-1)


def _zeros(setup: Setup, rows: int, capacity: int) -> Caches:
    models = mixtures.models(setup.mixture)
    return models * empty_cache(setup.decoder.config, rows, capacity, setup.decoder.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def empty(setup: Setup, capacity: int) -> Slots:
    n = setup.slots
    slots = Slots(
        cache=_zeros(setup, n, capacity),
        token=jnp.zeros(n, jnp.int32),
        position=jnp.zeros(n, jnp.int32),
        drawn=jnp.zeros(n, jnp.int32),
        output=jnp.zeros((n, setup.max_new_tokens), jnp.int32),
        logps=jnp.zeros((n, setup.max_new_tokens)),
        sampled_logps=jnp.zeros((n, setup.max_new_tokens)),
        streams=jnp.zeros((n, 2), jnp.uint32),
        greedy=jnp.zeros(n, bool),
        active=jnp.zeros(n, bool),
        weight=None if setup.mixture is None else jnp.zeros(n),
    )
    return _cut_slots(setup, slots)


def resized(setup: Setup, slots: Slots, capacity: int) -> Slots:
    """The same slots with a cache of another capacity. The arrays of the old cache are deleted.

    Layers are copied one after the other, so that never more than one of them exists twice.
    """
    if capacity == slots.capacity:
        return slots
    layers = []
    for layer in slots.cache:
        layers.append(_resized(setup, layer, capacity))
        layer.keys.delete()
        layer.values.delete()
    return slots.replace(cache=tuple(layers))


@partial(jax.jit, static_argnums=(0, 2))
def _resized(setup: Setup, layer: LayerCache, capacity: int) -> LayerCache:
    def of(x: Array) -> Array:
        x = x[:, :, :capacity]
        return jnp.pad(x, ((0, 0), (0, 0), (0, capacity - x.shape[2]), (0, 0)))

    return _cut(setup, jax.tree.map(of, layer), "slots", "kv_heads")
