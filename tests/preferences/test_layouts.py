"""Layouts: every example once, in a few shapes that fit it and have little padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import ByLength, OneShape, Trees, padded, parts, row_length
from selm_jax.preferences.packing import assign_rows, pack


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
