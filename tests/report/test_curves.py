"""What the pages draw of an update is what an update reports."""

import csv
import io
import json
import re
from pathlib import Path

import jax.numpy as jnp

from selm_jax import report
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import Logps
from selm_jax.objectives.measures import measures
from selm_jax.objectives.roles import ROLES
from selm_jax.report.curves import implicit_reward_plots, loss_plots, own_plots
from selm_jax.report.data import report_data
from selm_jax.report.page import render
from selm_jax.report.time_plots import time_plots


def test_every_metric_of_an_objective_that_is_drawn_is_reported():
    files = Path(report.__file__).parent.glob("*.py")
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    drawn = set(re.findall(r'"((?:loss|rewards|logps|optimism)/\w+)"', code))
    one = dict.fromkeys(ROLES, jnp.ones(1))
    objective, logps = build_objective("selm", beta=0.1, alpha=0.01), Logps(one, one, one, one)
    metrics = objective(logps)[1] | measures(logps, objective)
    assert len(drawn) > 5 and drawn <= metrics.keys()


def test_an_objective_of_ones_own_is_drawn_in_full(make_run, tmp_path):
    """No panel is empty because a loss is new, and what the loss reports has a panel of its own."""
    change = {"loss/dpo": None, "loss/optimism": None, "optimism/reward": None, "mine/<b>$x": 0.5}
    new = {"rewards/explore": 0.1, "log_ratios/chosen": -1.0, "logps/rejected": -130.0}
    run = with_metrics(make_run(tmp_path / "mine", name="mine"), change | new)
    text = render([report_data(run)])
    assert "Nothing to draw" not in text
    assert "mine/&lt;b&gt;$x" in text and "Log-ratio, chosen" in text
    assert "Preference term" not in text and "Optimism term" not in text


def test_in_a_comparison_a_new_loss_is_in_all_training_plots(make_run, tmp_path):
    both = {"rewards/explore": 0.1, "logps/rejected": -130.0}
    selm = with_metrics(make_run(tmp_path / "selm", name="selm"), both)
    mine = with_metrics(
        make_run(tmp_path / "mine", name="mine"),
        both | {"loss/dpo": None, "loss/optimism": None, "optimism/reward": None},
    )
    runs, labels = [report_data(selm), report_data(mine)], ["selm", "mine"]
    for plot in (*loss_plots(runs, labels), *implicit_reward_plots(runs, labels)):
        assert {row["line"] for row in rows_of(plot)} == {"selm", "mine"}, plot.title
    own = {plot.title: plot for plot in own_plots(runs, labels)}
    assert {row["line"] for row in rows_of(own["Preference term"])} == {"selm"}
    assert own["Preference term"].how.endswith("Only selm logged it.")


def test_in_a_comparison_with_an_older_run_mfu_is_enough(make_run, tmp_path):
    speed = {"time/tflops": 9.0, "time/mfu": 0.4}
    old = with_metrics(make_run(tmp_path / "old", name="old"), dict.fromkeys(speed))
    new = with_metrics(make_run(tmp_path / "new", name="new"), speed)
    unknown = with_metrics(make_run(tmp_path / "cpu", name="cpu"), speed | {"time/mfu": None})
    for folders, shown in (((old, new), False), ((new, unknown), True), ((old, unknown), True)):
        plots = time_plots([report_data(each) for each in folders], ["a", "b"])
        assert any(plot.title == "Training TFLOP/s" for plot in plots) == shown


def with_metrics(folder: Path, change: dict[str, float | None]) -> Path:
    """The run, its updates with these metrics; None takes one out."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["stage"] == "train":
            line |= change
    kept = ({k: v for k, v in line.items() if v is not None} for line in lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return folder


def rows_of(plot) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(plot.drawing.csv)))
