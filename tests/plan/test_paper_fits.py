"""What the paper's largest experiment needs on TPU slices, as the TPU's compiler says.

Each case compiles one program of Llama-3-8B for a slice, which takes minutes.
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
FACTS = ROOT / "tests/golden/published/Meta-Llama-3-8B-Instruct/config.json"


def fit(program: str, slice_: str, *overrides: str) -> Fit:
    """The memory of one program of experiments/paper/llama3_8b/selm.yaml on a slice."""
    e = config.load(ROOT / "experiments/paper/llama3_8b/selm.yaml", overrides)
    where = target(slice_)
    b = Blueprint(e, command.read_facts(FACTS), where)
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
        f"compute.attention={attention}",
    )  # fmt: skip
    assert found.fits and found.needed is not None and found.needed <= most * GIB
    assert found.memory.in_loops and not found.memory.again


def test_a_prefill_does_not_hold_all_scores_of_attention():
    found = fit("prefill", "v5p:2x2x2")
    assert found.memory.temporaries <= 2.5 * GIB
    assert not found.memory.again
