"""The tables and plots of named held-out sets."""

import json

import pytest

from selm_jax.report import run_plots, run_tables
from selm_jax.report.data import report_data

SETS = "data:\n  heldout_sets:\n    safety: {source: s.jsonl}\n"


@pytest.mark.parametrize("key", ["pairs/accuracy", "accuracy"], ids=["policy", "reward model"])
def test_a_sets_accuracy_on_pairs_is_shown(make_run, tmp_path, key):
    folder = make_run(tmp_path / "run", settings=SETS)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["stage"] == "evaluate":
            value = 0.5 + line["iteration"] / 10
            ends = {"": value, "_low": value - 0.1, "_high": value + 0.1}
            line |= {f"heldout/safety/{key}{end}": each for end, each in ends.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = report_data(folder)
    rows = run_tables.set_rows(run)
    assert [row["accuracy"] for row in rows][1] == pytest.approx((0.6, 0.5, 0.7))
    assert [plot.title for plot in run_plots.set_plots([run], ["run"])] == [
        "safety: accuracy on pairs"
    ]
