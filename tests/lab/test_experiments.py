import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from selm_jax import config
from selm_jax.lab import command, experiments, plots, stats, verbs
from selm_jax.lab.algorithms import Length
from selm_jax.lab.worlds import WorldShape
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import Logps, Objective
from selm_jax.objectives.roles import ROLES
from selm_jax.report.drawn import _LIGHT

ROOT = Path(__file__).parents[2]
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
    records = stats.correct([r for r in small_map if r["against"] == "online"])
    for name in "ab":
        plots.heat_maps(records, tmp_path / f"{name}.svg", "selm lab map --seeds 4; 4 seeds")
    a, b = ((tmp_path / f"{name}.svg").read_bytes() for name in "ab")
    assert a == b and b"selm lab map --seeds 4" in a


def test_only_what_survives_correction_has_a_colour(tmp_path):
    cell = {"dimension": 4, "coverage": 0.1, "temperature": 0.1, "relative": -0.5}
    cell |= {"against": "online"}
    for p in (0.04, 0.06):
        other = cell | {"temperature": 0.3, "relative": 0.0, "p_holm": 1.0, "alpha": 0.1}
        records = [cell | {"alpha": 0.1, "p_holm": p}, other]
        plots.heat_maps(records, tmp_path / f"{p}.svg", "")
    with_colour, without = ((tmp_path / f"{p}.svg").read_text() for p in (0.04, 0.06))
    assert _LIGHT["muted"] in without and with_colour != without


def test_every_number_of_a_cell_can_be_read(tmp_path):
    """AA: 4.5 to 1, of sure numbers on any colour of a cell and of unsure ones on white."""
    for relative in np.linspace(-0.6, 0.6, 121):
        colour = plots._cell_colour(relative)
        ink = {"white": (1, 1, 1), "black": (0, 0, 0)}[plots._readable_on(colour)]
        assert plots.contrast(ink, colour) >= 4.5, relative
    unsure = tuple(int(_LIGHT["muted"][i : i + 2], 16) / 255 for i in (1, 3, 5))
    assert plots.contrast(unsure, (1, 1, 1)) >= 4.5
    assert plots.contrast((1, 1, 1), (0, 0, 0)) == pytest.approx(21)


def test_a_figure_says_what_it_is_compared_against_in_every_format(small_map, tmp_path):
    records = stats.correct([r for r in small_map if r["against"] == "online"])
    plots.heat_maps(records, tmp_path / "map.svg", "")
    plots.table(records, "alpha", "coverage", tmp_path / "one.svg", "", "DPO")
    assert "minus that of online DPO" in (tmp_path / "map.svg").read_text()
    assert "Cumulative regret minus that of DPO" in (tmp_path / "one.svg").read_text()
    for name in ("map", "one"):
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_map_asks_three_hundred_questions_and_more():
    cells = map(len, (experiments.MAP_ALPHAS, experiments.MAP_TEMPERATURES,
                      experiments.MAP_COVERAGES, experiments.MAP_DIMENSIONS))  # fmt: skip
    assert np.prod(list(cells)) >= 300


def test_every_condition_can_be_built_and_is_named_once():
    names = [name for name, *_ in experiments.conditions()]
    assert len(set(names)) == len(names) and set(experiments.WHY) <= set(names)


def test_an_idea_is_judged_on_the_queries_of_dpo():
    seen = []

    def copies_dpo(logps):
        from jax.nn import log_sigmoid

        seen.append(sorted(logps.policy))
        margin = logps.log_ratio("chosen") - logps.log_ratio("rejected")
        return -log_sigmoid(0.1 * margin), {}

    same = Objective(ROLES, copies_dpo)
    dpo, idea = experiments.idea({"same": same}, seeds=4, beta=0.1, **SMALL)
    for landscape, base in zip(idea, dpo, strict=True):
        assert abs(landscape["difference"]) < 1e-3 * base["base"]
    assert seen[0] == sorted(ROLES)


def test_my_idea_is_one_function_in_the_laboratory_and_in_the_experiment(monkeypatch, tmp_path):
    """`selm lab idea` builds from my_idea.py the same function that my_idea.yaml trains with."""
    monkeypatch.syspath_prepend(ROOT)
    asked = {}

    def spy(objectives, seeds, seed, *, beta):
        asked.update(objectives)
        for name in ("dpo", *objectives):
            record = {"objective": name, "landscape": "needle"}
            yield [record | stats.compare(np.arange(3.0), np.ones(3))]

    monkeypatch.setattr(experiments, "idea", spy)
    yaml = ROOT / "experiments/lab/my_idea.yaml"
    settings = dict(config.load(yaml, []).objective)
    loss, beta, weight = (settings.pop(k) for k in ("loss", "beta", "weight"))
    assert not settings
    arguments = ["idea", loss, f"weight={weight},0.1", "--beta", str(beta), "--out", str(tmp_path)]
    result = CliRunner().invoke(command.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and (tmp_path / "lab_idea.svg").exists()
    assert [*asked][:2] == ["selm alpha=0.01", "selm alpha=0.1"] and len(asked) == 4

    role = {r: jnp.array([-1.0 - i, -3.0 + i]) for i, r in enumerate(ROLES)}
    still = {r: jnp.array([-2.0, -2.0]) for r in ROLES}
    logps = Logps(role, still, still, {r: jnp.ones(()) for r in ROLES})
    built = build_objective(loss, beta=beta, weight=weight)
    np.testing.assert_array_equal(asked[[*asked][2]](logps)[0], built(logps)[0])
    assert not np.array_equal(asked[[*asked][3]](logps)[0], built(logps)[0])


def test_wrong_options_are_explained(tmp_path):
    run = CliRunner().invoke
    for arguments, message in (
        (["map", "--landscape", "hill"], "two_peaks"),
        (["map", "--dimensions", "4,flat"], "tabular"),
        (["idea", "dpo", "weight"], "key=value"),
        (["idea", "dpo", "weight=much"], "numbers"),
    ):
        result = run(command.app, [*arguments, "--out", str(tmp_path)])
        assert result.exit_code == 2 and message in result.output


def test_the_theorems_alpha_changes_nothing_and_its_bound_is_beyond_the_worst(
    monkeypatch, tmp_path
):
    small = functools.partial(
        experiments.theorem, shape=WorldShape(2, 6, 3), betas=(0.1,), horizons=(4,)
    )
    monkeypatch.setattr(experiments, "theorem", small)
    out = CliRunner().invoke(command.app, ["theory", "--seeds", "4", "--out", str(tmp_path)])
    assert out.exit_code == 0 and "R_max" in out.output
    (record,) = json.loads((tmp_path / "lab_theory.json").read_text())
    assert abs(record["relative"]) < 0.01 and record["bound"] > record["worst"] > 0


def test_regret_curves_end_where_the_runs_do(monkeypatch):
    """A curve's last point is the sum over rounds, and the comparison is of those sums."""
    zoo = experiments.zoo
    monkeypatch.setattr(
        experiments,
        "zoo",
        lambda *a: {name: zoo(*a)[name] for name in ("selm_fixed", "dpo_online")},
    )
    small = {"shape": SMALL["shape"], "length": Length(40, 1, 2)}
    records = experiments.regret_curves(3, **small)
    base = {r["landscape"]: r for r in records if r["algorithm"] == "dpo_online"}
    assert len(records) == 4 * len({r["algorithm"] for r in records})
    for r in records:
        assert r["rounds"][0] == 1 and r["rounds"][-1] == 40 and np.all(np.diff(r["rounds"]) > 0)
        assert len(r["rounds"]) == len(r["mean"]) and np.all(np.diff(r["mean"]) > 0)
        if r["algorithm"] != "dpo_online":
            gap = r["mean"][-1] - base[r["landscape"]]["mean"][-1]
            np.testing.assert_allclose(r["against"]["difference"], gap, rtol=1e-6, atol=1e-9)


def test_numbers_are_written_one_record_a_line_and_drawn_as_written(tmp_path):
    file = tmp_path / "x" / "y.json"
    wrote = verbs.write([{"a": 1 / 3, "b": [1e-9 / 3], "c": 12345678}, {"d": {"e": "x"}}], file)
    assert json.loads(file.read_text()) == wrote
    assert wrote[0] == {"a": 0.333333, "b": [3.33333e-10], "c": 12345678}
    assert len(file.read_text().splitlines()) == 2 + len(wrote)
