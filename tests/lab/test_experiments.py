import json

import numpy as np
import pytest
from typer.testing import CliRunner

from selm_jax.lab import command, experiments, plots
from selm_jax.lab.algorithms import Length
from selm_jax.lab.worlds import WorldShape
from selm_jax.objectives.losses import Objective

SMALL = {"shape": WorldShape(prompts=2, responses=6), "length": Length(3, 2, 4)}


@pytest.fixture(scope="module")
def small_map():
    parts = experiments.optimism_map(
        4, alphas=(0.3, -0.1), temperatures=(0.1,), coverages=(0.05, 0.2), dimensions=(3,), **SMALL
    )
    return [record for part in parts for record in part]


def test_the_map_has_every_cell_once_per_comparison(small_map):
    names = [(r["dimension"], r["coverage"], r["alpha"], r["against"]) for r in small_map]
    assert len(set(names)) == len(names) == 2 * 2 * 2
    for r in small_map:
        assert r["low"] <= r["difference"] <= r["high"] and 0 <= r["p"] <= 1
        np.testing.assert_allclose(r["relative"], r["difference"] / r["base"])


def test_figures_are_the_same_bytes_and_say_how_they_were_made(small_map, tmp_path):
    records = experiments.correct([r for r in small_map if r["against"] == "online"])
    for name in "ab":
        plots.heat_maps(records, tmp_path / f"{name}.svg", "selm lab map --seeds 4; 4 seeds")
    a, b = ((tmp_path / f"{name}.svg").read_bytes() for name in "ab")
    assert a == b and b"selm lab map --seeds 4" in a


def test_only_what_survives_correction_has_a_colour(tmp_path):
    cell = {"dimension": 4, "coverage": 0.1, "temperature": 0.1, "relative": -0.5}
    for p in (0.04, 0.06):
        other = cell | {"temperature": 0.3, "relative": 0.0, "p_holm": 1.0, "alpha": 0.1}
        records = [cell | {"alpha": 0.1, "p_holm": p}, other]
        plots.heat_maps(records, tmp_path / f"{p}.svg", "")
    with_colour, without = ((tmp_path / f"{p}.svg").read_text() for p in (0.04, 0.06))
    assert "#999999" in without and with_colour != without


def test_the_map_asks_three_hundred_questions_and_more():
    cells = map(len, (experiments.MAP_ALPHAS, experiments.MAP_TEMPERATURES,
                      experiments.MAP_COVERAGES, experiments.MAP_DIMENSIONS))  # fmt: skip
    assert np.prod(list(cells)) >= 300


def test_every_condition_can_be_built_and_is_named_once():
    names = [name for name, *_ in experiments.conditions()]
    assert len(set(names)) == len(names) and set(experiments.WHY) <= set(names)


def test_an_idea_is_judged_on_the_queries_of_dpo(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "LANDSCAPES", ("two_peaks",))
    seen = []

    def copies_dpo(logps):
        from jax.nn import log_sigmoid

        seen.append(sorted(logps.policy))
        margin = logps.log_ratio("chosen") - logps.log_ratio("rejected")
        return -log_sigmoid(0.1 * margin), {}

    same = Objective(("chosen", "rejected", "explore"), copies_dpo)
    (dpo,), (idea,) = experiments.idea({"same": same}, seeds=4, beta=0.1)
    assert abs(idea["difference"]) < 1e-3 * dpo["base"]
    assert seen[0] == ["chosen", "explore", "rejected"]


def test_wrong_options_are_explained(tmp_path):
    run = CliRunner().invoke
    for arguments, message in (
        (["map", "--landscape", "hill"], "two_peaks"),
        (["idea", "dpo", "weight"], "key=value"),
        (["idea", "dpo", "weight=much"], "numbers"),
    ):
        result = run(command.app, [*arguments, "--out", str(tmp_path)])
        assert result.exit_code == 2 and message in result.output


def test_theory_prints_alpha(capsys):
    result = CliRunner().invoke(command.app, ["theory", "--seeds", "2"])
    assert result.exit_code == 0 and "R_max" in result.output


def test_numbers_are_written_as_json(tmp_path):
    command._write([{"a": 1.5}], tmp_path / "x" / "y.json")
    assert json.loads((tmp_path / "x" / "y.json").read_text()) == [{"a": 1.5}]
