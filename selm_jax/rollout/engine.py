"""The rollout engine: prefills prompts, decodes in slots, and refills slots that become idle.

Prompts wait in a queue. A prefill runs a few of them at once and keeps their keys and values; each
wanted response takes a copy into a free slot, so n samples share one prefill. All slots decode
together in one jitted loop until enough of them are finished to be worth refilling.

The cache has one of a few capacities. Before each decoding call, the host takes the least one that
holds the slots' tokens (`schedule.Board`): a step reads the whole cache, and most tokens of a large
one would be empty.

On a mesh, slots are sharded over the axes data and fsdp and the model over tensor (`rules.DECODE`).
Each copy of the model decodes its own slots, and in each step the copies exchange only the count of
idle slots.

A response depends only on the parameters, its prompt and its stream of random numbers
(`sampling.stream`), and not on slots, order or neighbours. If several processes run the same
requests, each of them gets all answers.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from selm_jax.models.decoder import Decoder, LayerCache, Params, logits
from selm_jax.parallel.rules import DECODE, partition
from selm_jax.rollout.filters import check_drawn
from selm_jax.rollout.requests import Request, Response
from selm_jax.rollout.sampling import Sampling, next_tokens, stream
from selm_jax.rollout.schedule import Board, bucket

_LOOK_EVERY = 16  # tokens between two checks by `ended`


@flax.struct.dataclass
class Slots:
    """The state of decoding. `token` is the last token drawn, which is not yet in the cache."""

    cache: tuple[LayerCache, ...]
    token: Int[Array, " slots"]
    position: Int[Array, " slots"]
    drawn: Int[Array, " slots"]  # tokens drawn so far, `token` included
    output: Int[Array, "slots new_tokens"]
    streams: UInt32[Array, "slots 2"]
    greedy: Bool[Array, " slots"]
    active: Bool[Array, " slots"]

    @property
    def capacity(self) -> int:
        return self.cache[0].keys.shape[2]


@dataclasses.dataclass(frozen=True)
class Engine:
    """The rollout engine, whose `generate` answers prompts.

    Attributes:
      decoder: an unrolled decoder (`scan=False`); its dtype is the compute dtype.
      slots: the number of responses that decode together.
      max_prompt, max_new_tokens: the most tokens of a prompt and of a response.
      stop_ids: the tokens that end a response.
      prefill_rows: the number of prompts per prefill.
      mesh: the mesh to compute on (`parallel.mesh.decode_mesh`), which must divide slots and
        prefill rows evenly; None for one device.
    """

    decoder: Decoder
    sampling: Sampling
    slots: int
    max_prompt: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    prefill_rows: int = 4
    mesh: Mesh | None = None

    @classmethod
    def fitted(cls, *, slots: int, prefill_rows: int, mesh: Mesh, **rest: Any) -> Engine:
        """An engine with slots and prefill rows rounded up so that the mesh divides them evenly."""
        copies = mesh.shape["data"] * mesh.shape["fsdp"]
        slots, prefill_rows = (-(-n // copies) * copies for n in (slots, prefill_rows))
        return cls(slots=slots, prefill_rows=prefill_rows, mesh=mesh, **rest)

    def generate(
        self,
        params: Params,
        requests: Sequence[Request],
        *,
        seed: int,
        iteration: int,
        progress: Callable[[int, int], None] = lambda responses, tokens: None,
        ended: Callable[[tuple[int, ...]], bool] | None = None,
    ) -> list[Response]:
        """Answers every request, in the order (index, sample).

        Args:
          params: from `decoding_params`.
          progress: called with the responses finished and tokens drawn since the last call.
          ended: called every few tokens with a response so far; returns whether it has ended
            without a stop token, for example with a certain word.

        Raises:
          ValueError: a prompt is empty or longer than `max_prompt`; the message names it.
          FilterError: the user's filter left no token to draw for a sample.
        """
        for request in requests:
            if not 0 < len(request.prompt) <= self.max_prompt:
                raise ValueError(
                    f"prompt {request.index} has {len(request.prompt)} tokens; "
                    f"expected between 1 and {self.max_prompt}"
                )
        done: list[Response] = []
        for responses in self._run(params, requests, seed, iteration, ended):
            done += responses
            progress(len(responses), sum(len(r.tokens) for r in responses))
        return sorted(done, key=lambda r: (r.index, r.sample))

    def _run(self, params, requests, seed, iteration, ended) -> Iterator[list[Response]]:
        # Longest first: the prompts of a prefill have similar lengths, and short ones come last.
        queue = deque(sorted(requests, key=lambda r: (-len(r.prompt), r.index)))
        waiting: deque[_Waiting] = deque()  # prefilled, not yet in a slot
        board = Board(self.slots, self.max_prompt, self.max_new_tokens)
        slots = empty(self, board.capacity)
        refill_at = max(1, self.slots // 8)

        while queue or waiting or board.busy:
            while (free := board.free) and (queue or waiting):
                if not waiting:
                    group = [queue.popleft() for _ in range(min(self.prefill_rows, len(queue)))]
                    waiting.append(_prefill_group(self, params, group, seed, iteration))
                head = waiting[0]
                taken, head.wanted = head.wanted[: len(free)], head.wanted[len(free) :]
                into = free[: len(taken)]
                for slot, (row, index, sample, _) in zip(into, taken, strict=True):
                    board.put(slot, (index, sample), head.lengths[row])
                slots = resized(self, slots, max(slots.capacity, board.capacity))
                slots = _insert_taken(self, slots, head, taken, into)
                if not head.wanted:
                    waiting.popleft()
            slots = resized(self, slots, board.capacity)
            # If nothing is left to refill, run to the end.
            stop_at = refill_at if (queue or waiting) else self.slots
            steps = min(
                board.steps(slots.capacity), self.max_new_tokens if ended is None else _LOOK_EVERY
            )
            slots, seen = decode(self, params, slots, np.int32(stop_at), np.int32(steps))
            active, board.drawn, output = map(np.array, jax.device_get(seen))
            responses, cut = [], np.zeros(self.slots, bool)
            for slot in board.busy:
                owner = cast(tuple[int, int], board.owner[slot])
                tokens = tuple(int(x) for x in output[slot, : board.drawn[slot]])
                check_drawn(self.sampling.filter, tokens, *owner)
                if not active[slot]:
                    finish = "stop" if tokens[-1] in self.stop_ids else "length"
                elif ended is not None and ended(tokens):
                    finish, cut[slot] = "ended", True
                else:
                    continue
                responses.append(Response(*owner, tokens, finish))
                board.owner[slot] = None
            if cut.any():
                slots = slots.replace(active=slots.active & ~cut)
            yield responses


@dataclasses.dataclass
class _Waiting:
    """A group of prefilled prompts: caches, first logits, and the responses that need a slot."""

    cache: Any
    logits: Array
    wanted: list[tuple[int, int, int, np.ndarray]]  # row, index, sample, stream
    lengths: np.ndarray


def _prefill_group(engine: Engine, params, group: list[Request], seed, iteration) -> _Waiting:
    time = min(bucket(max(len(r.prompt) for r in group)), bucket(engine.max_prompt))
    tokens = np.zeros((engine.prefill_rows, time), np.int32)
    lengths = np.ones(engine.prefill_rows, np.int32)
    for row, request in enumerate(group):
        tokens[row, : len(request.prompt)] = request.prompt
        lengths[row] = len(request.prompt)
    cache, logits = prefill(engine, params, tokens, lengths)
    wanted = [
        (row, r.index, sample, np.asarray(_stream(seed, iteration, r.drawn_by, sample)))
        for row, r in enumerate(group)
        for sample in r.wanted()
    ]
    return _Waiting(cache, logits, wanted, lengths)


_stream = jax.jit(stream)


def _cut(engine: Engine, tree: Any, *axes: str | None) -> Any:
    """Shards arrays over the mesh by the names of their first axes; other axes are not sharded."""
    if engine.mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, places(engine, tree, *axes))


def places(engine: Engine, tree: Any, *axes: str | None) -> Any:
    """The shardings that `_cut` gives to arrays, by the names of their first axes."""

    def of(x: Array) -> NamedSharding:
        names = (axes + (None,) * x.ndim)[: x.ndim]
        return partition("rollout", names, x.shape, cast(Mesh, engine.mesh), DECODE)

    return jax.tree.map(of, tree)


def _cut_slots(engine: Engine, slots: Slots) -> Slots:
    if engine.mesh is None:
        return slots
    return jax.lax.with_sharding_constraint(slots, slot_places(engine, slots))


def slot_places(engine: Engine, slots: Slots) -> Slots:
    rest = places(engine, slots.replace(cache=()), "slots")
    return rest.replace(cache=places(engine, slots.cache, "slots", "kv_heads"))


@partial(jax.jit, static_argnums=0)
def prefill(
    engine: Engine,
    params: Params,
    tokens: Int[Array, "rows time"],
    lengths: Int[Array, " rows"],
) -> tuple[tuple[LayerCache, ...], Float[Array, "rows vocab"]]:
    """Computes the prompts' keys and values, and the logits after each prompt's last token."""
    rows, time = tokens.shape
    tokens = _cut(engine, tokens, "slots")
    positions = jnp.broadcast_to(jnp.arange(time), (rows, time))
    end = _cut(engine, jnp.where(positions < lengths[:, None], lengths[:, None], 0), "slots")
    hidden, cache = engine.decoder.apply(
        {"params": params}, tokens, positions, end, _zeros(engine, rows, time),
        jnp.zeros(rows, jnp.int32),
    )  # fmt: skip
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    # The slots of every copy may take any of the rows.
    scores = _cut(engine, _scores(engine, params, last), None)
    return _cut(engine, cast(tuple[LayerCache, ...], cache), None, "kv_heads"), scores


def _insert_taken(engine: Engine, slots: Slots, head: _Waiting, taken, into) -> Slots:
    rows = np.full(engine.slots, -1, np.int32)  # for each slot; -1 leaves it unchanged
    streams = np.zeros((engine.slots, 2), np.uint32)
    greedy = np.zeros(engine.slots, bool)
    for (row, _, sample, stream_), slot in zip(taken, into, strict=True):
        rows[slot], streams[slot], greedy[slot] = row, stream_, sample == 0
    return insert(engine, slots, head.cache, head.logits, rows, head.lengths[rows], streams, greedy)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(engine, slots, cache, scores, rows, lengths, streams, greedy) -> Slots:
    """Copies prefilled rows into slots and draws the first token of each.

    Each slot looks up its row, so that on a mesh only the slot's own device takes part.
    """
    rows, lengths, streams, greedy = _cut(engine, (rows, lengths, streams, greedy), "slots")
    taken, rows = rows >= 0, jnp.maximum(rows, 0)
    zeros = jnp.zeros_like(rows)
    first = next_tokens(
        _cut(engine, scores[rows], "slots"), streams, zeros, greedy, engine.sampling
    )

    def put(old, new):
        return jnp.where(taken.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    def put_prefix(old, new):
        # The padding of a prefill may be longer than the cache; the prompts taken are not.
        time = min(old.shape[2], new.shape[2])
        new = put(old[:, :, :time], new[rows, :, :time].astype(old.dtype))
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=2)

    output = jnp.zeros((engine.slots, engine.max_new_tokens), jnp.int32).at[:, 0].set(first)
    slots = Slots(
        cache=jax.tree.map(put_prefix, slots.cache, cache),
        token=put(slots.token, first),
        position=put(slots.position, lengths),
        drawn=put(slots.drawn, jnp.ones_like(rows)),
        output=put(slots.output, output),
        streams=put(slots.streams, streams),
        greedy=put(slots.greedy, greedy),
        active=put(slots.active, _goes_on(engine, first, jnp.ones_like(rows))),
    )
    return _cut_slots(engine, slots)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    engine: Engine, params: Params, slots: Slots, stop_at: Int[Array, ""], steps: Int[Array, ""]
) -> tuple[Slots, tuple[Array, Array, Array]]:
    """Decodes until `stop_at` slots are idle, or for `steps` steps.

    Returns:
      the slots, and (active, drawn, output) of all slots, on every device, for the host to read.
    """

    def busy(state: tuple[Slots, Array]):
        slots, done = state
        return (jnp.sum(~slots.active) < stop_at) & (done < steps)

    def step(state: tuple[Slots, Array]) -> tuple[Slots, Array]:
        slots, done = state
        hidden, cache = engine.decoder.apply(
            {"params": params}, slots.token[:, None], slots.position[:, None], None,
            slots.cache, slots.position,
        )  # fmt: skip
        scores = _scores(engine, params, hidden[:, 0])
        token = next_tokens(scores, slots.streams, slots.drawn, slots.greedy, engine.sampling)
        here = slots.drawn[:, None] == jnp.arange(engine.max_new_tokens)
        output = jnp.where(here, token[:, None], slots.output)
        drawn = slots.drawn + 1
        on = slots.active
        slots = slots.replace(
            cache=cache,
            token=jnp.where(on, token, slots.token),
            position=jnp.where(on, slots.position + 1, slots.position),
            drawn=jnp.where(on, drawn, slots.drawn),
            output=jnp.where(on[:, None], output, slots.output),
            active=on & _goes_on(engine, token, drawn),
        )
        return slots, done + 1

    slots, _ = jax.lax.while_loop(busy, step, (slots, jnp.int32(0)))
    slots = _cut_slots(engine, slots)
    return slots, _cut(engine, (slots.active, slots.drawn, slots.output), None)


def _scores(engine: Engine, params: Params, hidden: Float[Array, "n embed"]):
    """Computes logits [n, vocab] by shards of the vocabulary and gathers them for sampling.

    With only the second constraint, XLA would move the unembedding matrix between devices instead.
    """
    scores = logits(engine.decoder.config, params, hidden)
    return _cut(engine, _cut(engine, scores, "slots", "vocab"), "slots")


def _goes_on(engine: Engine, token: Int[Array, " n"], drawn: Int[Array, " n"]) -> Bool[Array, " n"]:
    stop = jnp.array(engine.stop_ids, jnp.int32)
    return (drawn < engine.max_new_tokens) & ~jnp.any(token[:, None] == stop, axis=-1)


def _zeros(engine: Engine, rows: int, capacity: int) -> tuple[LayerCache, ...]:
    c = engine.decoder.config
    shape = (rows, c.kv_heads, capacity, c.head_dim)
    zeros = partial(jnp.zeros, shape, engine.decoder.dtype)
    return tuple(LayerCache(zeros(), zeros()) for _ in range(c.layers))


@partial(jax.jit, static_argnums=(0, 1))
def empty(engine: Engine, capacity: int) -> Slots:
    n = engine.slots
    slots = Slots(
        cache=_zeros(engine, n, capacity),
        token=jnp.zeros(n, jnp.int32),
        position=jnp.zeros(n, jnp.int32),
        drawn=jnp.zeros(n, jnp.int32),
        output=jnp.zeros((n, engine.max_new_tokens), jnp.int32),
        streams=jnp.zeros((n, 2), jnp.uint32),
        greedy=jnp.zeros(n, bool),
        active=jnp.zeros(n, bool),
    )
    return _cut_slots(engine, slots)


def resized(engine: Engine, slots: Slots, capacity: int) -> Slots:
    """The same slots with a cache of another capacity. The arrays of the old cache are deleted.

    Layers are copied one after the other, so that never more than one of them exists twice.
    """
    if capacity == slots.capacity:
        return slots
    layers = []
    for layer in slots.cache:
        layers.append(_resized(engine, layer, capacity))
        layer.keys.delete()
        layer.values.delete()
    return slots.replace(cache=tuple(layers))


@partial(jax.jit, static_argnums=(0, 2))
def _resized(engine: Engine, layer: LayerCache, capacity: int) -> LayerCache:
    def of(x: Array) -> Array:
        x = x[:, :, :capacity]
        return jnp.pad(x, ((0, 0), (0, 0), (0, capacity - x.shape[2]), (0, 0)))

    return _cut(engine, jax.tree.map(of, layer), "slots", "kv_heads")
