"""What the paper's experiments need on TPU slices, as the TPU's compiler says.

Most cases compile one program of Llama-3-8B for a slice, which takes minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from selm_jax import config
from selm_jax.plan import command
from selm_jax.plan.examine import Fit
from selm_jax.plan.measure import measure
from selm_jax.plan.phases import Blueprint, phases
from selm_jax.plan.topology import GIB, target

pytestmark = [pytest.mark.slow, pytest.mark.libtpu]
ROOT = Path(__file__).parents[2]
FACTS = {
    "llama3_8b": "Meta-Llama-3-8B-Instruct", "phi3_mini": "Phi-3-mini-4k-instruct",
    "zephyr_7b": "mistral-7b-sft-beta",
}  # fmt: skip
SLICES = ["v5e:4x8", "v5e:4x4", "v5p:2x2x2", "v6e:2x4"]


def blueprint(model: str, slice_: str, *overrides: str) -> Blueprint:
    e = config.load(ROOT / f"experiments/paper/{model}/selm.yaml", overrides)
    facts = command.read_facts(ROOT / f"tests/golden/published/{FACTS[model]}/config.json")
    return Blueprint(e, facts, target(slice_))


def fit(program: str, slice_: str, *overrides: str) -> Fit:
    """The memory of one program of experiments/paper/llama3_8b/selm.yaml on a slice."""
    b = blueprint("llama3_8b", slice_, *overrides)
    where = b.target
    (phase,) = (each for each in phases(b, 2) if each.name == program)
    memory = measure(phase.lower(), where)
    return Fit(phase.name, phase.stage, memory, dict(phase.held), where.hbm)


@pytest.mark.parametrize(
    ("slice_", "rows", "length", "attention", "most"),
    [
        ("v5e:4x8", 32, 3200, "auto", 10.0),
        ("v5e:4x8", 32, "auto", "auto", 11.5),
        ("v5e:4x8", 32, 8192, "auto", 12.5),
        ("v5e:4x8", 32, 8192, "blocks", 12.5),
        ("v5e:4x4", 16, 3200, "auto", 15.0),
    ],
)
def test_gradients_need_no_more_than(slice_, rows, length, attention, most):
    found = fit(
        "gradients, add", slice_, f"training.rows={rows}", f"training.row_length={length}",
        f"compute.attention={attention}", "training.remat=full",
    )  # fmt: skip
    assert found.fits and found.needed is not None and found.needed <= most * GIB
    assert found.memory.in_loops and not found.memory.again


def test_a_prefill_does_not_hold_all_scores_of_attention():
    found = fit("prefill", "v5p:2x2x2")
    assert found.memory.temporaries <= 2.5 * GIB
    assert not found.memory.again


@pytest.mark.parametrize("slice_", SLICES)
@pytest.mark.parametrize("model", FACTS)
def test_chosen_sizes_fit_by_the_estimate(model, slice_):
    b = blueprint(model, slice_)
    found, copies, chips = b.sizes, len(b.target.devices) // 4, len(b.target.devices)
    assert found.generation is not None
    room = b.target.hbm - sum(b.ranker_bytes.values())
    assert found.generation.total(found.sizes) <= room
    assert found.training.total(found.sizes) <= room
    assert found.sizes.slots % copies == found.sizes.prefill_rows % copies == 0
    assert found.sizes.slots >= 32 and found.sizes.rows % chips == 0
    assert "the compiler's bound" in b.told and "PairRM: 16 rows of 512 tokens" in b.told


def test_chosen_sizes_fit_where_least_memory_is_left():
    found = fit("gradients, add", "v5e:4x4")
    assert found.fits and not found.memory.again
