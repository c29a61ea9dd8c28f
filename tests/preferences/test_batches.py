"""The order of examples: a function of four numbers, each example once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_jax.preferences.batches import examples_of, updates_per_epoch

seeds = st.integers(0, 2**40)


def epoch(count: int, batch: int, seed: int, iteration: int, number: int = 0) -> list[int]:
    """All examples of an epoch, in order."""
    updates = updates_per_epoch(count, batch)
    steps = range(number * updates, (number + 1) * updates)
    return [
        x
        for step in steps
        for x in examples_of(step, range(count), global_batch=batch, seed=seed, iteration=iteration)
    ]


@pytest.mark.parametrize(("examples", "batch", "updates"), [(15283, 256, 59), (20378, 128, 159)])
def test_the_papers_portions_make_the_authors_updates(examples, batch, updates):
    """arXiv 2405.19332, the authors' recipes: Zephyr, and Llama-3 and Phi-3."""
    assert updates_per_epoch(examples, batch) == updates


@given(st.integers(1, 60), st.integers(1, 12), seeds, st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_each_example_at_most_once_an_epoch_in_whole_batches(count, batch, seed, t, number):
    found = epoch(count, batch, seed, t, number)
    assert len(set(found)) == len(found) == count // batch * batch
    assert set(found) <= set(range(count))


@given(seeds, st.integers(1, 9), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_a_step_depends_on_its_number_alone(seed, iteration, step):
    """Resuming at any step needs no iterator."""
    alone = examples_of(step, range(21), global_batch=4, seed=seed, iteration=iteration)
    walked = [x for e in range(step // 5 + 1) for x in epoch(21, 4, seed, iteration, e)]
    assert alone == walked[step * 4 : step * 4 + 4]


def test_seed_iteration_and_epoch_all_shuffle_anew():
    orders = [epoch(50, 5, s, t, e) for s in (0, 1) for t in (1, 2) for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert list(range(50)) not in orders


def test_the_order_is_the_same_for_ever():
    """Bits of Philox, which numpy promises to keep: a change here breaks resumed runs."""
    assert epoch(12, 3, seed=42, iteration=1) == [7, 3, 4, 11, 2, 5, 9, 10, 6, 8, 0, 1]


def test_the_left_over_changes_from_epoch_to_epoch():
    left = [set(range(11)) - set(epoch(11, 4, 7, 1, e)) for e in range(20)]
    assert len(set.union(*left)) == 11


def test_places_are_uniform():
    """Where example 0 lands over 2000 seeds: chi-squared with 9 degrees of freedom."""
    counts = np.zeros(10)
    for seed in range(2000):
        counts[epoch(10, 1, seed, 1).index(0)] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # 0.1 %
