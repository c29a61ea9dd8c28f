"""Plans decoding on the host: the prompts of each model copy, the slots, and the cache size.

Nothing here uses a device.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np

from selm_jax.rollout.requests import Request

# A cache smaller than this many tokens would make a decoding step hardly faster.
_LEAST = 128
# Before a decoding call every slot has room for this many tokens, so that calls are not too short.
_AHEAD = 16


def bucket(length: int) -> int:
    """The padded length of a prompt: a multiple of 16 up to 128, of 64 up to 1024, then of 512."""
    step = 16 if length <= 128 else 64 if length <= 1024 else 512
    return -(-length // step) * step


def capacities(max_prompt: int, max_new_tokens: int) -> tuple[int, ...]:
    """The sizes that the cache may have, ascending: the largest, its half, its quarter, and so on.

    A program is compiled for each, so they are few: at most 1 + log2(greatest / 128).

    >>> capacities(4096, 64)
    (144, 272, 528, 1040, 2080, 4160)
    >>> capacities(64, 128)
    (192,)
    """
    sizes = [bucket(max_prompt) + max_new_tokens]
    while sizes[-1] > 2 * _LEAST:
        sizes.append(-(-sizes[-1] // 32) * 16)
    return tuple(reversed(sizes))


@dataclasses.dataclass
class Row:
    """A row of a prefill: a prompt, and those of its samples that still need a slot.

    Attributes:
      place: number of the row. Each copy of the model computes a block of adjacent rows.
    """

    place: int
    request: Request
    samples: list[int]


def dealt(queue: deque[Request], copies: int, to: Sequence[int], rows: int) -> list[deque[Row]]:
    """Takes prompts from the queue and deals them to copies of the model, in turns.

    If there are fewer prompts than rows, a prompt with many samples is given to several rows.

    Args:
      copies: number of copies.
      to: the copies that get prompts.
      rows: number of rows of each.

    Returns:
      the rows of each copy.
    """
    parts: list[deque[Row]] = [deque() for _ in range(copies)]
    dealt: list[Row] = []
    for place, copy in ((copy * rows + i, copy) for i in range(rows) for copy in to):
        if queue:
            request = queue.popleft()
            samples = request.wanted()
        else:
            most = max(dealt, key=lambda row: len(row.samples))
            half = len(most.samples) // 2
            if not half:
                break
            request, samples = most.request, most.samples[-half:]
            del most.samples[-half:]
        dealt.append(Row(place, request, samples))
        parts[copy].append(dealt[-1])
    return parts


class Board:
    """Holds what the host knows of each slot.

    Attributes:
      owner: (index, sample) of the response in the slot; None if the slot is free.
      prompt: number of tokens of its prompt.
      drawn: number of tokens that it has drawn. The last of them is not yet in the cache.
    """

    def __init__(self, slots: int, copies: int, max_prompt: int, max_new_tokens: int):
        self.slots_of_copy = slots // copies
        self.max_new_tokens = max_new_tokens
        self.capacities = capacities(max_prompt, max_new_tokens)
        self.owner: list[tuple[int, int] | None] = [None] * slots
        self.prompt = np.zeros(slots, np.int32)
        self.drawn = np.zeros(slots, np.int32)

    def put(self, slot: int, owner: tuple[int, int], prompt: int) -> None:
        self.owner[slot], self.prompt[slot], self.drawn[slot] = owner, prompt, 1

    def free(self, copy: int) -> list[int]:
        """The free slots of a copy of the model."""
        slots = range(copy * self.slots_of_copy, (copy + 1) * self.slots_of_copy)
        return [slot for slot in slots if self.owner[slot] is None]

    @property
    def busy(self) -> list[int]:
        return [slot for slot, owner in enumerate(self.owner) if owner is not None]

    @property
    def capacity(self) -> int:
        """The least size of the cache with which the next decoding call can start."""
        used, left = self._used_and_left()
        needed = np.max(used + np.minimum(left, _AHEAD), initial=1)
        return next(size for size in self.capacities if size >= needed)

    def steps(self, capacity: int) -> int:
        """How many steps all slots can run before one of them needs a larger capacity."""
        used, left = self._used_and_left()
        room = np.where(left > capacity - used, capacity - used, self.max_new_tokens)
        return int(np.min(room, initial=self.max_new_tokens))

    def _used_and_left(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the cached tokens of each busy slot, and the most steps it can still run."""
        drawn = self.drawn[self.busy]
        return self.prompt[self.busy] + drawn - 1, self.max_new_tokens - drawn
