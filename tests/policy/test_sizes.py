"""Sizes are chosen by arithmetic: the same every time, more with more memory, never above it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_jax.config.kinds import Remat
from selm_jax.models.families import from_hf
from selm_jax.policy import sizes
from selm_jax.policy.sizes import LEAST, BatchSizes, Generation, Training
from selm_jax.shell.json_file import read_object

CONFIGS = Path(__file__).parents[1] / "golden/configs"
SMOL = from_hf(read_object(CONFIGS / "HuggingFaceTB--SmolLM2-135M-Instruct.json"))
GIB, MIB = 2**30, 2**20


def generation(wanted=(320, 96), copies=1, held=GIB) -> Generation:
    return Generation(wanted, 4, copies, prompt=64, held=held, slot=5 * MIB, row=6 * MIB)


def training(ways=1, length=288, held=3 * GIB) -> Training:
    return Training(SMOL, ways, length, 8, held, itemsize=4, whole_scores=True)


def chosen(room: float, of=None, to=None, platform="cpu", **fixed) -> BatchSizes:
    found = sizes.choose(of or generation(), to or training(), int(room), platform, fixed)
    assert found == sizes.choose(of or generation(), to or training(), int(room), platform, fixed)
    return found


def test_a_laptop_gets_many_slots_and_recomputes_nothing():
    """The number of slots was 16 and rematerialization full, whatever the machine."""
    found = chosen(17 * GIB)
    assert 64 <= found.slots <= 256 and found.prefill_rows == 16
    assert found.rows == 4 and found.remat == "none"


def test_few_answers_get_few_slots():
    assert chosen(17 * GIB, generation((12,))).slots == 16
    assert chosen(17 * GIB, generation((1024,))).slots == 256


def test_a_number_wins():
    fixed = {"slots": 3, "prefill_rows": 2, "rows": 5, "remat": "mlp", "chunk": 7}
    assert dataclasses.asdict(chosen(17 * GIB, **fixed)) == fixed
    assert chosen(17 * GIB, slots=3).remat == "none"


def test_the_chunk_is_for_the_rows_that_are_given():
    """There are 512 tokens on a device, but no fewer than 32 of each row."""
    assert [chosen(17 * GIB, rows=rows).chunk for rows in (1, 8, 64)] == [512, 64, 32]
    assert chosen(17 * GIB, to=training(ways=4), rows=32).chunk == 64


@pytest.mark.parametrize("room", [1, 0.9])
def test_where_the_weights_do_not_fit_prompts_are_prefilled_one_by_one(room):
    found = chosen(room * GIB, generation(wanted=(4096,)), slots=256)
    assert found.prefill_rows == 1


@settings(max_examples=200, deadline=None)
@given(
    room=st.integers(2 * GIB, 64 * GIB), copies=st.sampled_from([1, 2, 8]),
    ways=st.sampled_from([1, 4, 8]), length=st.sampled_from([128, 288, 2048]),
    wanted=st.lists(st.integers(1, 4096), max_size=5), platform=st.sampled_from(["cpu", "tpu"]),
)  # fmt: skip
def test_what_was_chosen_fits_or_is_the_least(room, copies, ways, length, wanted, platform):
    g, t = generation(wanted, copies), training(ways, length)
    found = chosen(room, g, t, platform)
    assert found.slots % copies == found.prefill_rows % copies == found.rows % ways == 0
    least = BatchSizes(copies, copies, ways, "full", LEAST.chunk)
    fits = g.total(found) <= room
    assert fits or (found.slots, found.prefill_rows) == (least.slots, least.prefill_rows)
    fits = t.total(found) <= room
    assert fits or (found.rows, found.remat, found.chunk) == (least.rows, "full", least.chunk)
    more = chosen(2 * room, g, t, platform)
    order: tuple[Remat, ...] = ("full", "mlp", "dots", "none")
    assert more.rows >= found.rows
    assert more.rows > found.rows or order.index(more.remat) >= order.index(found.remat)


def test_an_update_in_one_batch_needs_no_second_tree_of_gradients():
    """With 3 GiB of memory the quickstart was refused, though it ends if all rows are one batch."""
    t = dataclasses.replace(training(held=2 * GIB), second=GIB // 2, shortest=160)
    room = int(2.25 * GIB)
    found = chosen(room, to=t)
    assert (found.rows, found.remat, found.chunk) == (t.examples, "full", 8)
    assert t.total(found) <= room < t.total(dataclasses.replace(found, rows=1, chunk=32))
    assert chosen(17 * GIB, to=t) == chosen(17 * GIB), "where there is room, nothing changes"


@pytest.mark.parametrize("stage", ["generation", "training"])
def test_memory_that_runs_out_again_and_again_ends_at_the_least_sizes(stage):
    floors = {"slots": 2, "prefill_rows": 2, "rows": 4}
    g, t = generation(copies=2), training(ways=4)
    found, names = chosen(17 * GIB, g, t), []
    needs = (g if stage == "generation" else t).needs
    while (less := sizes.smaller(found, needs(found), {"chunk": 64}, floors)) is not None:
        assert sum(needs(less).values()) < sum(needs(found).values())
        (changed,) = (k for k, v in dataclasses.asdict(less).items() if v != getattr(found, k))
        found, names = less, [*names, changed]
    if stage == "generation":
        assert (found.slots, found.prefill_rows) == (2, 2) and "rows" not in names
    else:
        assert (found.rows, found.remat) == (4, "full") and "chunk" not in names
        assert names[0] == "remat"


def test_the_larger_part_is_given_up_first():
    found = BatchSizes(slots=64, prefill_rows=8, rows=2, remat="full", chunk=64)
    needs, floors = {"slots": 5, "prefill_rows": 9}, {"slots": 1, "prefill_rows": 1}
    assert sizes.smaller(found, needs, {}, floors) == dataclasses.replace(found, prefill_rows=4)
    assert sizes.smaller(found, needs, {"prefill_rows": 8}, floors) == dataclasses.replace(
        found, slots=32
    )


@pytest.mark.parametrize(
    "remat, rows, gib", [("none", 8, 4.64), ("none", 2, 1.31), ("full", 8, 0.35)]
)
def test_the_estimate_is_near_what_the_compiler_needs(remat, rows, gib):
    """Temporaries of `gradients` on CPU, rows of 256 tokens; chunks of 32 (`selm plan`)."""
    needs = training(length=256).needs(BatchSizes(1, 1, rows, remat, 32))
    assert 0.8 * gib <= sum(needs.values()) / GIB <= 1.6 * gib
