"""Which copy of the model computes which prompt, and who decodes its samples."""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import given
from hypothesis import strategies as st

from selm_jax.rollout.requests import Request
from selm_jax.rollout.schedule import dealt


@st.composite
def deals(draw):
    copies, rows = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    to = sorted(draw(st.sets(st.integers(0, copies - 1), min_size=1)))
    wanted = draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=1))
    requests = [Request(i, (1,), *each) for i, each in enumerate(wanted) if any(each)]
    return [r for r in requests if r.wanted()] or [Request(0, (1,), 1, 0)], copies, to, rows


@given(deals())
def test_every_sample_has_one_row_in_a_part_of_a_copy_that_was_named(deal):
    requests, copies, to, rows = deal
    queue = deque(requests)
    parts = dealt(queue, copies, to, rows)
    assert [copy for copy, part in enumerate(parts) if part] == to[: sum(map(bool, parts))]
    given = requests[: len(requests) - len(queue)]
    assert len(given) == min(len(requests), rows * len(to))
    found = Counter((row.request.index, s) for part in parts for row in part for s in row.samples)
    assert found == Counter((r.index, s) for r in given for s in r.wanted())
    assert all(row.samples for part in parts for row in part)
    for copy, part in enumerate(parts):
        places = [row.place for row in part]
        assert len(set(places)) == len(places) <= rows
        assert all(copy * rows <= place < (copy + 1) * rows for place in places)


@given(deals())
def test_copies_get_as_many_rows_as_each_other(deal):
    requests, copies, to, rows = deal
    parts = dealt(deque(requests), copies, to, rows)
    counts = [len(parts[copy]) for copy in to]
    assert max(counts) - min(counts) <= 1


def test_the_samples_of_one_prompt_are_shared_by_all_copies():
    parts = dealt(deque([Request(0, (1,), 0, 64)]), 8, range(8), 1)
    assert [len(row.samples) for part in parts for row in part] == [8] * 8
