"""Which examples share a batch, and of what shape: many lengths through few compiled programs.

Every shape is one compilation, and every place of a batch that holds nothing is computed for nothing.
A layout weighs the one against the other:

    OneShape   all batches alike, of sizes that are given: a run, whose memory is planned for them
    ByLength   one shape for each of few row lengths: a model that is opened once, for some thousand texts
    Trees      more row lengths, and batches that get smaller with what is left: a ranker, which reads a
               million texts in many calls
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import Shape, assign_rows, common_shape


class Group(NamedTuple):
    """Examples that are packed together, by their numbers, and the shape of their batches."""

    which: Sequence[int]
    shape: Shape


Layout: TypeAlias = Callable[[Sequence[Example]], Iterator[Group]]


@dataclasses.dataclass(frozen=True)
class OneShape:
    """All examples in batches of one shape, of so many rows of so many tokens."""

    rows: int
    row_length: int

    def __call__(self, examples: Sequence[Example]) -> Iterator[Group]:
        shape = common_shape([examples], rows=self.rows, time=self.row_length)
        yield Group(range(len(examples)), shape)


@dataclasses.dataclass(frozen=True)
class ByLength:
    """Examples of like length together, the longest first, each row length in one shape.

    Attributes:
      ways: into how many parts a mesh cuts rows.
      tokens: of a batch in one such part, at most.
      heads: of attention, whose scores are held for a whole batch.
    """

    ways: int
    tokens: int
    heads: int

    _TOGETHER = 16  # batches that are packed together
    _SCORES = 2**29  # entries of a layer's attention scores in one part: 2 GiB in float32

    def __call__(self, examples: Sequence[Example]) -> Iterator[Group]:
        for time, members in _by_time(examples, row_length):
            groups = list(self._groups(members, examples, time))
            those = [[examples[i] for i in group] for group in groups]
            need = max(len(assign_rows(each, time)) for each in those)
            rows = min(-(-need // self.ways) * self.ways, self.rows(time))
            shape = common_shape(those, rows=rows, time=time)
            yield from (Group(group, shape) for group in groups)

    def _groups(
        self, members: Sequence[int], examples: Sequence[Example], time: int
    ) -> Iterator[list[int]]:
        room = whole = self._TOGETHER * self.rows(time) * time
        group: list[int] = []
        for i in members:
            if room < examples[i].tokens:
                yield group
                group, room = [], whole
            group.append(i)
            room -= examples[i].tokens
        yield group

    def rows(self, time: int) -> int:
        """Rows of a batch, at most: so many that devices are busy, and attention's scores fit."""
        scores = self._SCORES // (self.heads * time * time)
        return max(1, min(self.tokens // time, scores)) * self.ways


@dataclasses.dataclass(frozen=True)
class Trees:
    """Batches by `parts`. All that is given at once has one number of branches.

    Attributes:
      ways: into how many parts a mesh cuts rows.
      batch: rows of 512 tokens in one such part.
    """

    ways: int
    batch: int

    def __call__(self, examples: Sequence[Example]) -> Iterator[Group]:
        branches = 1 << (max(len(e.responses) for e in examples) - 1).bit_length()
        order = sorted(range(len(examples)), key=lambda i: -examples[i].tokens)
        cut = parts([examples[i].tokens for i in order], self.ways, self.batch)
        for time, alike in itertools.groupby(cut, key=lambda part: part.time):
            those = [([order[n] for n in part.items], part.rows) for part in alike]
            packed = [[examples[i] for i in which] for which, _ in those]
            segments = common_shape(packed, rows=1, time=time).segments
            for which, rows in those:
                yield Group(which, Shape(rows, time, time, segments, branches))


def _by_time(
    examples: Sequence[Example], of: Callable[[int], int]
) -> Iterator[tuple[int, list[int]]]:
    """(tokens of a row, the examples for it), both with the longest first."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].tokens)
    for time, which in itertools.groupby(order, key=lambda i: of(examples[i].tokens)):
        yield time, list(which)


def row_length(tokens: int) -> int:
    """Of rows for examples of so many tokens: 128, 192, 256, 384, 512, ..., 1.5 times at most.

    >>> [row_length(tokens) for tokens in (1, 128, 129, 200, 400)]
    [128, 128, 192, 256, 512]
    """
    power = 1 << max(7, (tokens - 1).bit_length())
    return power * 3 // 4 if power > 128 and tokens <= power * 3 // 4 else power


class Part(NamedTuple):
    """Neighbours in a list that is sorted by length, computed together.

    Attributes:
        items: their places in the list.
        rows: of their batch: a power of two per device, so that few shapes are compiled.
        time: padded length, of every row.
    """

    items: range
    rows: int
    time: int


def parts(lengths: Sequence[int], devices: int, batch: int) -> Iterator[Part]:
    """Cuts a list of texts into parts of one padded length each.

    Args:
        lengths: in tokens, the longest first: memory that does not suffice is found out at once.
        devices: over which rows are cut.
        batch: rows of 512 tokens that one device computes at once; longer ones go together in
            smaller number, shorter ones in larger.
    """
    start = 0
    while start < len(lengths):
        time = padded(lengths[start])
        most = devices * 2 ** int(math.log2(max(1, batch * 512 // time)))
        stop = start
        while stop < min(len(lengths), start + most) and padded(lengths[stop]) == time:
            stop += 1
        per_device = 2 ** math.ceil(math.log2(-(-(stop - start) // devices)))
        yield Part(range(start, stop), per_device * devices, time)
        start = stop


def padded(length: int) -> int:
    """The next of few lengths: multiples of 64, and from 512 on of 128."""
    step = 64 if length <= 512 else 128
    return -(-length // step) * step
