"""Layouts: every example once, in a few shapes that fit it and have little padding."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import (
    BATCH_OVERHEAD,
    ByLength,
    OneShape,
    Trees,
    least_padding,
    padded,
    parts,
    row_length,
    row_lengths,
)
from selm_jax.preferences.packing import Shape, assign_rows, pack


def spread(count: int, most: int = 900, seed: int = 0) -> list[Example]:
    """Examples with lengths distributed like those of texts: many short, a few long."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        prompt, *answers = (int(n) for n in 1 + rng.beta(1, 4, 2 + i % 3) * most / 3)
        found.append(Example(str(i), (1,) * prompt, tuple((2,) * n for n in answers), {}))
    return found


LAYOUTS = {
    "one shape": OneShape(4, 1024),
    "one shape, fitted": OneShape(4, None),
    "by length": ByLength(ways=2, tokens=2048, heads=4),
    "trees": Trees(ways=2, batch=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_every_example_is_in_one_group_that_packs(layout, count):
    examples = spread(count)
    groups = list(layout(examples))
    assert sorted(i for group in groups for i in group.which) == list(range(count))
    for which, shape in groups:
        batches = pack([examples[i] for i in which], shape)
        assert sum(batch.weight.sum() for batch in batches) == len(which)
        assert shape.rows % getattr(layout, "ways", 1) == 0


def batches_of(layout, examples):
    """(shape, number of rows that are not empty) of every batch."""
    for which, shape in layout(examples):
        need = len(assign_rows([examples[i] for i in which], shape.time))
        for start in range(0, need, shape.rows):
            yield shape, min(shape.rows, need - start)


def places(layout, examples) -> int:
    return sum(shape.rows * shape.time for shape, _ in batches_of(layout, examples))


def test_a_row_length_is_one_shape_by_length():
    """There are as many programs as row lengths, however many examples and batches."""
    examples = spread(2000)
    lengths = {row_length(e.tokens) for e in examples}
    found = list(batches_of(LAYOUTS["by length"], examples))
    assert len(found) > 20 and len({shape for shape, _ in found}) == len(lengths) <= 6
    # Rows are at least two thirds full, but for the shortest ones, and the last of a length.
    tokens = sum(e.tokens for e in examples)
    assert places(LAYOUTS["by length"], examples) < 1.35 * tokens


def test_trees_take_no_more_shapes_and_places_than_their_parts():
    """Packing may put short trees together; it never asks for a program or a row more than one tree
    per row does."""
    for count, most in ((5, 100), (300, 900), (2000, 900), (400, 60)):
        examples = spread(count, most)
        lengths = sorted((e.tokens for e in examples), reverse=True)
        alone = list(parts(lengths, 2, 2))
        found = list(batches_of(LAYOUTS["trees"], examples))
        assert len({shape for shape, _ in found}) <= len({(p.rows, p.time) for p in alone})
        assert places(LAYOUTS["trees"], examples) == sum(p.rows * p.time for p in alone)
        assert len({shape.branches for shape, _ in found}) == 1


def test_calls_of_like_lengths_share_their_shapes():
    """A ranker is called for a few prompts at a time: soon no call needs a new program."""
    seen, new = set(), []
    for seed in range(12):
        shapes = {shape for shape, _ in batches_of(LAYOUTS["trees"], spread(60, seed=seed))}
        new.append(len(shapes - seen))
        seen |= shapes
    assert sum(new[6:]) < sum(new[:6]) / 3


def test_lengths_are_few_and_hold_what_they_are_for():
    for of, most in ((row_length, 14), (padded, 72)):
        found = [of(n) for n in range(1, 8193)]
        assert all(size >= n for n, size in enumerate(found, 1))
        assert len(set(found)) <= most
        assert all(a <= b for a, b in itertools.pairwise(found))


# The row length of training


def batches(updates, rows: int, time: int) -> int:
    """The number of batches of all updates, counted by packing them."""
    shape = Shape(rows, time, scored=time, segments=64, branches=4)
    return sum(len(pack(update, shape)) for update in updates)


def cost(updates, rows: int, time: int) -> int:
    """The places of all batches, each with as many more as reading the model costs."""
    return batches(updates, rows, time) * (rows * time + BATCH_OVERHEAD)


@pytest.mark.parametrize(
    ("rows", "ways", "count", "most"), [(4, 1, 12, 300), (8, 4, 40, 1500), (2, 2, 9, 90)]
)
def test_no_other_shape_with_as_few_batches_costs_less(rows, ways, count, most):
    for seed in range(3):
        updates = [spread(count, most, seed), spread(count, most, seed + 10)]
        longest = max(e.tokens for update in updates for e in update)
        lengths = row_lengths(longest)
        assert longest <= lengths[0] < longest + lengths.step and lengths[-1] <= 2 * longest
        found = least_padding(updates, lengths, rows=rows, ways=ways)
        most_batches = batches(updates, rows, lengths[0])
        allowed = {
            (of, n): cost(updates, of, n)
            for of in range(ways, rows + 1, ways)
            for n in lengths
            if batches(updates, of, n) <= most_batches
        }
        assert found in allowed and allowed[found] == min(allowed.values())
        assert found == least_padding(updates, lengths, rows=rows, ways=ways)


@pytest.mark.parametrize(("rows", "count", "most"), [(4, 9, 300), (2, 48, 90), (1, 30, 1500)])
def test_scored_rows_are_fitted_to_their_examples(rows, count, most):
    """Rows were as long as the longest example, so that a row of a run had one example in it."""
    examples = spread(count, most)
    ((_, shape),) = OneShape(rows, None)(examples)
    lengths = row_lengths(max(e.tokens for e in examples))
    least = min(lengths, key=lambda n: (cost([examples], rows, n), n))
    assert (shape.rows, shape.time) == (rows, least)


def test_a_row_length_for_many_examples_is_chosen_by_some():
    """All are packed once, and the longest fits wherever it stands."""
    examples = [*spread(2000, 90), *spread(1, 400, seed=3)]
    ((which, shape),) = OneShape(2, None)(examples)
    assert len(which) == 2001 and shape.time >= max(e.tokens for e in examples)


@pytest.mark.parametrize("longest", [1, 31, 100, 511, 512, 513, 3084, 4096, 4097, 8192, 100_000])
def test_a_row_holds_the_longest_example_and_is_a_multiple_that_kernels_like(longest):
    lengths = row_lengths(longest)
    assert lengths[0] >= longest > lengths[0] - lengths.step
    assert all(n % (32 if longest <= 512 else 128) == 0 for n in lengths) and len(lengths) <= 33
    assert lengths[-1] <= max(2 * longest, lengths[0])


def preferences(count: int, seed: int) -> list[Example]:
    """Examples as long as UltraFeedback's in the paper's layout, as far as we can guess.

    Prompts have a median of 120 tokens and answers one of 280, with long tails. A prompt has at
    most 512 tokens, and 1,024 with an answer. Answers to one prompt are alike in length, and in one
    of eight examples the greedy answer is the best or the worst one too.
    """
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        prompt = min(10 + int(rng.lognormal(np.log(120), 1.0)), 512)
        typical = rng.lognormal(np.log(280), 0.45)
        answers = rng.lognormal(np.log(typical), 0.55, 3 if rng.random() > 0.12 else 2)
        kept = np.clip(answers.astype(int), 5, 1024 - prompt)
        found.append(Example(str(i), (1,) * prompt, tuple((2,) * n for n in kept), {}))
    return found


@pytest.mark.parametrize(("rows", "ways"), [(32, 32), (32, 16), (32, 8), (16, 16), (8, 8)])
def test_at_least_85_of_100_positions_are_useful_in_the_papers_batches(rows, ways):
    updates = [preferences(128, seed) for seed in range(30)]
    useful = sum(e.tokens for update in updates for e in update)
    lengths = row_lengths(max(e.tokens for update in updates for e in update))
    found = least_padding(updates, lengths, rows=rows, ways=ways)
    assert useful >= 0.85 * batches(updates, *found) * math.prod(found)
    if rows == 32:  # what a row of the longest example would give
        assert useful < 0.8 * batches(updates, rows, lengths[0]) * rows * lengths[0]
