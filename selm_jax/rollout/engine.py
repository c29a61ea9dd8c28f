"""The rollout engine: prefills prompts, decodes in slots, and refills slots that become idle.

Prompts wait in a queue. A prefill runs a few of them at once and keeps their keys and values; each
wanted response takes a copy into a free slot, so n samples share one prefill. All slots decode
together in one jitted loop until enough of them are finished to be worth refilling.

The cache has one of a few capacities. Before each decoding call, the host takes the least one that
holds the slots' tokens (`schedule.Board`): a step reads the whole cache, and most tokens of a large
one would be empty.

On a mesh, every copy of the model has its own slots and its own rows of each prefill, and only its
own slots take these rows, so that no cache moves between copies (`slots`).

A response depends only on the parameters, its prompt and its stream of random numbers
(`sampling.stream`), and not on slots, order or neighbours, except that sums over arrays of other
sizes may be rounded differently. A draw that is this close to the border of two tokens then becomes
another draw of equal standing. If several processes run the same requests, each of them gets all
answers.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array

from selm_jax.rollout.filters import check_drawn
from selm_jax.rollout.mixtures import weight_of
from selm_jax.rollout.requests import Request, Response
from selm_jax.rollout.sampling import stream
from selm_jax.rollout.schedule import Board, Row, bucket, dealt
from selm_jax.rollout.slots import Models, Setup, Slots, decode, empty, insert, prefill, resized

_LOOK_EVERY = 16  # tokens between two checks by `ended`


@dataclasses.dataclass(frozen=True)
class Engine(Setup):
    """The rollout engine, whose `generate` answers prompts. Its attributes are those of `Setup`."""

    def generate(
        self,
        params: Models,
        requests: Sequence[Request],
        *,
        seed: int,
        iteration: int,
        progress: Callable[[int, int], None] = lambda responses, tokens: None,
        ended: Callable[[tuple[int, ...]], bool] | None = None,
    ) -> list[Response]:
        """Answers every request, in the order (index, sample).

        Args:
          params: from `decoding_params`; with a mixture, (the policy's, its reference's).
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
        wanted = (r for r in requests if r.wanted())
        queue = deque(sorted(wanted, key=lambda r: (-len(r.prompt), r.index)))
        groups: list[_Group] = []  # prefilled, with responses that are not yet in a slot
        board = Board(self.slots, self.copies, self.max_prompt, self.max_new_tokens)
        slots = empty(self, board.capacity)
        refill_at = max(1, self.slots // 8)

        def key(request: Request, sample: int) -> np.ndarray:
            return np.asarray(_stream(seed, iteration, request.drawn_by, sample))

        while queue or groups or board.busy:
            slots, groups = self._refill(params, slots, board, queue, groups, key)
            slots = resized(self, slots, board.capacity)
            # If nothing is left to refill, run to the end.
            idle = self.slots - len(board.busy)
            stop_at = min(idle + refill_at, self.slots) if (queue or groups) else self.slots
            steps = min(
                board.steps(slots.capacity), self.max_new_tokens if ended is None else _LOOK_EVERY
            )
            slots, seen = decode(self, params, slots, np.int32(stop_at), np.int32(steps))
            active, board.drawn, output, *logps = map(np.array, jax.device_get(seen))
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
                of_tokens = [tuple(each[slot, : len(tokens)].tolist()) for each in logps]
                responses.append(Response(*owner, tokens, finish, *of_tokens))
                board.owner[slot] = None
            if cut.any():
                slots = slots.replace(active=slots.active & ~cut)
            yield responses

    def _refill(
        self, params: Models, slots: Slots, board: Board, queue: deque[Request],
        groups: list[_Group], key: Callable[[Request, int], np.ndarray],
    ) -> tuple[Slots, list[_Group]]:  # fmt: skip
        """Fills free slots; prefills more prompts when a copy of the model runs out of rows.

        Returns:
          the slots, and the groups that still have responses without a slot.
        """
        copies, rows = range(self.copies), self.prefill_rows // self.copies
        while True:
            # A variable of a loop would keep the last group's caches in memory during a prefill.
            slots = reduce(partial(self._insert_taken, board, key), groups, slots)
            groups = [group for group in groups if any(group.rows)]
            left = [sum(len(group.rows[copy]) for group in groups) for copy in copies]
            needed = any(board.free(copy) and not left[copy] for copy in copies)
            if not (queue and needed) or len(groups) == self.groups:
                return slots, groups
            # A copy that is far behind the others gets no more prompts.
            to = [copy for copy in copies if left[copy] <= rows]
            groups.append(self._prefill(params, dealt(queue, self.copies, to, rows)))

    def _prefill(self, params: Models, parts: list[deque[Row]]) -> _Group:
        rows = [row for part in parts for row in part]
        longest = max(len(row.request.prompt) for row in rows)
        tokens = np.zeros((self.prefill_rows, bucket(longest)), np.int32)
        lengths = np.ones(self.prefill_rows, np.int32)
        for row in rows:
            lengths[row.place] = len(row.request.prompt)
            tokens[row.place, : lengths[row.place]] = row.request.prompt
        cache, logits = prefill(self, params, tokens, lengths)
        return _Group(cache, logits, parts)

    def _insert_taken(self, board: Board, key, slots: Slots, group: _Group) -> Slots:
        """Puts responses of a group into slots until no slot is free or no response is left."""
        rows = np.full(self.slots, -1, np.int32)
        streams = np.zeros((self.slots, 2), np.uint32)
        greedy = np.zeros(self.slots, bool)
        weight = None if self.mixture is None else np.zeros(self.slots, np.float32)
        for copy, part in enumerate(group.rows):
            for slot in board.free(copy):
                if not part:
                    break
                row = part[0]
                sample = row.samples.pop(0)
                rows[slot], streams[slot] = row.place, key(row.request, sample)
                greedy[slot] = sample == 0
                if self.mixture is not None and weight is not None:
                    toss = partial(_coin, partial(key, row.request))
                    weight[slot] = weight_of(self.mixture, sample, toss)
                board.put(slot, (row.request.index, sample), len(row.request.prompt))
                if not row.samples:
                    part.popleft()
        if (rows < 0).all():
            return slots
        slots = resized(self, slots, max(slots.capacity, board.capacity))
        return insert(
            self, slots, group.cache, group.logits, rows, board.prompt.copy(), streams, greedy,
            weight,
        )  # fmt: skip


def _coin(key: Callable[[int], np.ndarray], sample: int) -> int:
    """0 or 1: a bit of a sample's key, which its draws do not depend on but through a hash."""
    return int(key(sample)[1] & 1)


@dataclasses.dataclass
class _Group:
    """A group of prefilled prompts: cache, first logits, and the rows of each copy of the model."""

    cache: Any
    logits: tuple[Array, ...]
    rows: list[deque[Row]]


_stream = jax.jit(stream)
