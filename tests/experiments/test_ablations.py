"""The files of the ablations and of the study: their changes, and the effects of these."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from tiny import on_first_device

from selm_jax.commands.tiny import ROWS
from selm_jax.config import as_dict, load
from selm_jax.sweep import sweep
from selm_jax.sweep.grid import read_sweep
from selm_jax.sweep.table import table
from selm_jax.text.prompts import portion

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ABLATIONS = EXPERIMENTS / "ablations"
ULTRAFEEDBACK = 61_135


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)


def cells(file: str):
    return {m.cell.name: m.experiment for m in read_sweep(ABLATIONS / file).members}


def changed(experiment, base) -> set[str]:
    """Groups of settings, or settings of the training group, that differ; output aside."""
    one, other = as_dict(experiment), as_dict(base)
    names = {k for k in one if one[k] != other[k]} - {"output"}
    return {
        f"{k}.{inner}" if isinstance(one[k], dict) else k
        for k in names
        for inner in (one[k] if isinstance(one[k], dict) else [k])
        if not isinstance(one[k], dict) or one[k].get(inner) != other[k].get(inner)
    }


def test_alpha_takes_the_values_of_figure_3_and_of_appendix_d():
    found = cells("alpha.yaml")
    base = load(EXPERIMENTS / "paper/zephyr_7b/selm.yaml")
    assert [e.objective["alpha"] for e in found.values()] == [0, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2]
    for name, e in found.items():
        assert changed(e, base) == (set() if name == "0.001" else {"objective.alpha"})


def test_every_change_of_dpo_is_the_one_that_its_name_says():
    found = cells("dpo.yaml")
    paper = found["paper"]
    assert changed(paper, load(EXPERIMENTS / "paper/zephyr_7b/iterative_dpo.yaml")) == set()
    recut = {"iterations", "data.portions", "data.first_portion", "data.skip"}
    rate, answers = "training.learning_rate", {"candidates.greedy"}
    assert changed(found["batch 128"], paper) == {"training.global_batch"}
    assert changed(found["constant rate"], paper) == changed(found["linear rate"], paper) == {rate}
    assert changed(found["swap"], paper) == {"feedback.rule"}
    assert changed(found["stepwise"], paper) == answers
    assert changed(found["offline"], paper) == recut | {rate} | answers
    assert found["stepwise"].taught and found["offline"].taught
    for n in (1, 4, 5, 6):
        name = f"{n} iteration" + "s" * (n > 1)
        assert found[name].iterations == n
        assert changed(found[name], paper) == recut | {rate}


def test_all_numbers_of_iterations_see_the_same_rows():
    """The last three quarters: the first 15,283 rows were the warm start's."""
    rows = range(ULTRAFEEDBACK)
    for name, e in cells("dpo.yaml").items():
        first = e.data.first_portion - 1
        parts = [
            portion(rows[e.data.skip :], first + t, e.portions) for t in range(1, e.iterations + 1)
        ]
        seen = [row for part in parts for row in part]
        assert seen == list(range(15_283, 15_283 + len(seen))), name
        assert ULTRAFEEDBACK - 15_283 - len(seen) < 6, name


def test_every_change_of_selm_is_the_one_that_its_name_says():
    found = cells("selm.yaml")
    paper = found["paper"]
    assert changed(paper, load(EXPERIMENTS / "paper/zephyr_7b/selm.yaml")) == set()
    four = {"candidates.samples"}
    assert {name: changed(e, paper) for name, e in found.items()} == {
        "paper": set(),
        "a sample": {"candidates.greedy", "candidates.samples", "feedback.explore"},
        "greedy of 4": four,
        "sample of 4": four | {"feedback.explore"},
        "all of 4": four | {"feedback.explore"},
        "fixed reference": {"training.reference_policy"},
        "weight alpha": {"objective.convention"},
        "default layout": {"text.layout"},
    }


def test_the_study_compares_at_equal_queries():
    study = read_sweep(EXPERIMENTS / "study/sweep.yaml")
    assert len(study.members) == 2 * 4 * 3
    assert (study.axis, study.baseline) == ("method", "dpo")
    asked = set()
    for m in study.members:
        e, c = m.experiment, m.experiment.candidates
        assert e.feedback.budget is None and e.data.limit == 56
        asked.add(e.iterations * e.data.limit * (c.greedy + c.samples))
        assert e.objective["loss"] == ("dpo" if m.cell.levels["method"] == "dpo" else "selm")
    assert asked == {448}


@pytest.mark.long
@pytest.mark.parametrize("file", ["selm.yaml", "dpo.yaml"])
def test_a_rehearsal_of_all_cells(file, tmp_path, monkeypatch):
    """Every setting runs to its end: tiny models, the files' own settings."""
    on_first_device(monkeypatch)
    rehearsal = read_sweep(ABLATIONS / file, output=str(tmp_path / "runs"), tiny=True)
    sweep(rehearsal, Console(quiet=True))
    rows = {row.name: row for row in table(rehearsal)}
    assert all(row.seeds == 1 and row.greedy is not None for row in rows.values())
    if file == "dpo.yaml":
        assert rows["stepwise"].ranked == 0
        assert rows["6 iterations"].updates == 6 * (ROWS * 3 // 4 // 6 // 4)
