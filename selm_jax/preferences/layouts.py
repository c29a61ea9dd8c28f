"""Groups examples into batches of few shapes, so that few programs have to be compiled.

Every shape costs one compilation, and every padded place of a batch is wasted computation. The
layouts trade one against the other:

    OneShape   all batches have one shape: for a run, whose memory is planned for that shape
    ByLength   one shape for each of a few row lengths: for a model that is loaded once, to score
               some thousand texts
    Trees      more row lengths, and smaller batches for the last examples: for a ranker, which
               reads a million texts in many calls
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import Shape, assign_rows, common_shape

# The fixed cost of a batch, in tokens: reading the model and adding its gradients. 75 were measured
# for 135 million parameters on a CPU; an accelerator's batches are much larger.
BATCH_OVERHEAD = 64


class Group(NamedTuple):
    """The indices of examples that are packed together, and the shape of their batches."""

    which: Sequence[int]
    shape: Shape


Layout: TypeAlias = Callable[[Sequence[Example]], Iterator[Group]]


@dataclasses.dataclass(frozen=True)
class OneShape:
    """Puts all examples into batches of one shape: `rows` rows of `row_length` tokens.

    If `row_length` is None, it is the one of `row_lengths` that leaves the least padding.
    """

    rows: int
    row_length: int | None

    _LOOKED_AT = 512  # examples that the row length is chosen by, because packing takes time

    def __call__(self, examples: Sequence[Example]) -> Iterator[Group]:
        time = self.row_length or self._fitted(examples)
        shape = common_shape([examples], rows=self.rows, time=time)
        yield Group(range(len(examples)), shape)

    def _fitted(self, examples: Sequence[Example]) -> int:
        some = examples[:: -(-len(examples) // self._LOOKED_AT)]
        lengths = row_lengths(max(e.tokens for e in examples))
        return least_padding([some], lengths, rows=self.rows, ways=self.rows)[1]


@dataclasses.dataclass(frozen=True)
class ByLength:
    """Groups examples of similar length, the longest first, with one shape per row length.

    Attributes:
      ways: number of parts into which the mesh splits the rows.
      tokens: the most tokens that one such part of a batch may have.
      heads: attention heads; their scores for a whole batch must fit in memory.
    """

    ways: int
    tokens: int
    heads: int

    _TOGETHER = 16  # batches that are packed together
    _SCORES = 2**29  # entries of a layer's attention scores in one part: 2 GiB in float32

    def __call__(self, examples: Sequence[Example]) -> Iterator[Group]:
        for time, members in _by_time(examples):
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
        """The rows per batch: enough to keep devices busy, and few enough that attention fits."""
        scores = self._SCORES // (self.heads * time * time)
        return max(1, min(self.tokens // time, scores)) * self.ways


@dataclasses.dataclass(frozen=True)
class Trees:
    """Groups examples like `parts`; all groups of one call have the same number of branches.

    Attributes:
      ways: number of parts into which the mesh splits the rows.
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


def least_padding(
    updates: Sequence[Sequence[Example]], lengths: Sequence[int], *, rows: int, ways: int
) -> tuple[int, int]:
    """The number of rows and the row length with which batches of one shape have least padding.

    Each update is packed by itself, and empty rows fill its last batch. Every batch reads the whole
    model, so it counts as `BATCH_OVERHEAD` tokens more, and there are never more batches than with
    `rows` rows of the first length. Among equal shapes the one with fewer batches is taken, then
    the one with shorter rows.

    Args:
      updates: the examples of each update.
      lengths: the row lengths to choose from, such as `row_lengths`.
      rows: the most rows of a batch.
      ways: number of parts into which the mesh splits the rows; it divides the result.

    Rows of 96 tokens hold one of these examples, and rows of 128 tokens two of the shorter ones:

    >>> update = [Example.of(str(n), (1,) * 20, {"chosen": (2,) * n}) for n in (70, 40, 40)]
    >>> least_padding([update], row_lengths(90), rows=4, ways=1)
    (2, 128)
    """
    needs = {n: np.array([len(assign_rows(each, n)) for each in updates]) for n in lengths}

    def batches(of: int, length: int) -> int:
        return int((-(-needs[length] // of)).sum())

    most = batches(rows, lengths[0])
    enough = -(-int(needs[lengths[0]].max()) // ways) * ways
    sizes = range(ways, min(rows, enough) + 1, ways)
    shapes = [(batches(of, n), n, of) for n in lengths for of in sizes]
    _, _, length, of = min(
        (count * (of * n + BATCH_OVERHEAD), count, n, of)
        for count, n, of in shapes
        if count <= most
    )
    return of, length


def row_lengths(longest: int) -> range:
    """The row lengths to choose from: from the longest example to twice that, at most 33.

    They are multiples of 128, or of 32 if the longest example has at most 512 tokens. Longer rows
    would take more memory for little less padding.

    >>> list(row_lengths(100)), list(row_lengths(600))
    ([128, 160, 192], [640, 768, 896, 1024, 1152])
    """
    step = 32 if longest <= 512 else 128 * -(-longest // 4096)
    first = -(-longest // step)
    return range(first * step, max(first, 2 * longest // step) * step + 1, step)


def _by_time(examples: Sequence[Example]) -> Iterator[tuple[int, list[int]]]:
    """Yields (row length, indices of the examples of that length), the longest first."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].tokens)
    for time, which in itertools.groupby(order, key=lambda i: row_length(examples[i].tokens)):
        yield time, list(which)


def row_length(tokens: int) -> int:
    """The row length for an example of `tokens` tokens: 128, 192, 256, 384, 512, ...

    >>> [row_length(tokens) for tokens in (1, 128, 129, 200, 400)]
    [128, 128, 192, 256, 512]
    """
    power = 1 << max(7, (tokens - 1).bit_length())
    return power * 3 // 4 if power > 128 and tokens <= power * 3 // 4 else power


class Part(NamedTuple):
    """One batch: consecutive items of a list that is sorted by length.

    Attributes:
        items: their indices in the list.
        rows: rows of the batch: a power of two per device, so that few shapes are compiled.
        time: the padded length of every row.
    """

    items: range
    rows: int
    time: int


def parts(lengths: Sequence[int], devices: int, batch: int) -> Iterator[Part]:
    """Cuts a list of texts, given by their lengths, into parts; each has one padded length.

    Args:
        lengths: of the texts in tokens, the longest first, so that a lack of memory shows at once.
        devices: number of devices over which rows are split.
        batch: rows of 512 tokens that one device computes at once. A part has fewer rows if they
            are longer, and more if they are shorter.
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
    """Rounds a length up to a multiple of 64, or of 128 above 512."""
    step = 64 if length <= 512 else 128
    return -(-length // step) * step
