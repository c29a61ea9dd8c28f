"""The paper's figures: their data are what the runs hold; published numbers are marked."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from selm_jax.report import paper, published
from selm_jax.report.data import ReportError, report_data
from selm_jax.report.drawing import LABEL
from selm_jax.report.published.drawing import figures as published_figures


@pytest.fixture
def two(make_run, tmp_path):
    """SELM and DPO, three iterations each."""
    runs = [make_run(tmp_path / "selm", name="selm", gain=0.2)]
    runs.append(make_run(tmp_path / "dpo", name="dpo", seed=1, gain=0.05))
    file = runs[1] / "config.yaml"
    file.write_text(file.read_text().replace("loss: selm\n  alpha: 0.001", "loss: dpo"))
    return [report_data(run) for run in runs], ["selm", "dpo"]


def texts(figure) -> str:
    return " ".join(ET.fromstring(figure.svg).itertext())


def scores(run, t):
    return {a.prompt_id: a.score for a in run.answers if (a.kind, a.iteration) == ("greedy", t)}


def test_win_rates_are_antisymmetric_and_counted_prompt_by_prompt(two):
    runs, labels = two
    figure = paper.win_rates(runs, labels)
    table = {(row["row"], row["column"]): row for row in figure.rows}
    players = {row["row"] for row in figure.rows}
    assert len(players) == 2 * 3 + 2  # two starts: these made-up ones answered differently
    same = paper.win_rates([runs[0], runs[0]], ["a", "b"])
    assert len({row["row"] for row in same.rows}) == 2 * 3 + 1
    for a in players:
        for b in players:
            assert table[a, b]["win_rate"] + table[b, a]["win_rate"] == pytest.approx(100)
            assert table[a, b]["low"] <= table[a, b]["win_rate"] <= table[a, b]["high"]
    mine, other = scores(runs[0], 3), scores(runs[1], 2)
    wins = sum(mine[p] > other[p] for p in mine) + 0.5 * sum(mine[p] == other[p] for p in mine)
    row = table["selm, iteration 3", "dpo, iteration 2"]
    assert row["win_rate"] == pytest.approx(100 * wins / len(mine))
    assert "selm, iteration 3" in texts(figure) and f"{row['win_rate']:.1f}" in texts(figure)


def test_runs_of_two_rankers_have_no_common_figure(make_run, tmp_path):
    runs = [
        report_data(make_run(tmp_path / name, settings=f"feedback:\n  ranker: {name}\n"))
        for name in ("length", "sentiment")
    ]
    for draw in (paper.win_rates, paper.reward_histograms, paper.panels):
        with pytest.raises(ReportError, match=r"scored by 2 rankers.*length; sentiment"):
            draw(runs, ["a", "b"])


def test_histograms_hold_every_answer_once(two):
    runs, labels = two
    by_run, *by_iteration = paper.reward_histograms(runs, labels)
    assert len(by_iteration) == 2
    iterations = ["start", *(f"iteration {t}" for t in (1, 2, 3))]
    for figure, groups in ((by_run, labels), (by_iteration[0], iterations)):
        assert list(dict.fromkeys(row["group"] for row in figure.rows)) == groups
        for group in groups:
            mine = [row for row in figure.rows if row["group"] == group]
            assert sum(row["answers"] for row in mine) == 12
            assert sum(row["share"] for row in mine) == pytest.approx(1)
    values = np.array(list(scores(runs[0], 3).values()))
    for row in by_run.rows:
        if row["group"] == "selm" and row["to"] < max(r["to"] for r in by_run.rows):
            inside = (row["from"] <= values) & (values < row["to"])
            assert inside.sum() == row["answers"]


def test_own_samples_are_differences_sorted_and_averaged_by_prompt(two):
    runs, labels = two
    one, other = (paper.own_samples(r, l, 2, 0.1) for r, l in zip(runs, labels, strict=True))
    # The made-up runs have log-ratios of 4 nats per iteration.
    assert list(one.of["own samples"].values()) == pytest.approx([0.1 * 8] * 12)
    moved = {p: v + int(p[1:]) for p, v in one.of["own samples"].items()}
    shifted = paper.Implicit("selm", {"own samples": moved})
    figure = paper.implicit_differences("figure5_own_samples", "own", other, [shifted])
    gaps = [row["difference"] for row in figure.rows]
    assert gaps == sorted(gaps) == pytest.approx(list(range(12)))
    assert "92 % above 0" in texts(figure)
    with pytest.raises(ValueError, match="different prompts"):
        less = paper.Implicit("x", {"own samples": {"p000": 1.0}})
        paper.implicit_differences("n", "t", other, [less])


def test_panels_put_each_run_where_it_differs(make_run, tmp_path):
    change = {
        "base": "", "six": "training:\n  global_batch: 128\n", "swap": "feedback:\n  rule: swap\n",
    }  # fmt: skip
    runs = [report_data(make_run(tmp_path / n, name=n, settings=s)) for n, s in change.items()]
    figure = paper.panels(runs, list(change))
    assert [(row["panel"], row["run"], row["change"]) for row in figure.rows] == [
        ("Batch", "base", ""),
        ("Batch", "six", "training.global_batch: 128"),
        ("Label update", "base", ""),
        ("Label update", "swap", "feedback.rule: swap"),
    ]
    assert figure.rows[0]["reward"] == pytest.approx(0.6)
    assert paper.panels(runs[:1], ["base"]) is None


def test_a_figures_csv_is_its_data_and_its_bytes_are_the_same_every_time(two):
    one, again = (paper.win_rates(*two) for _ in range(2))
    assert one.drawings == again.drawings
    starts = {"svg": b"<?xml", "pdf": b"%PDF-", "png": b"\x89PNG"}
    assert {kind: one.drawings[kind].startswith(start) for kind, start in starts.items()} == {
        "svg": True, "pdf": True, "png": True,
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(one.csv())))
    assert [float(row["win_rate"]) for row in rows] == [row["win_rate"] for row in one.rows]


def test_published_numbers_are_drawn_as_what_they_are():
    for figure in published_figures():
        assert figure.name.startswith("published_")
        assert LABEL in texts(figure)
        assert all("measured here" in row["source"] for row in figure.rows)


def test_published_tables_agree_with_themselves():
    """What follows from the paper's own numbers, so that a slip in copying shows."""
    table1, table2, cards = (published.load(n) for n in ("table1", "table2", "model_cards"))
    for row, mean in table1.numbers("mt_bench"):
        if row["mt_bench_turn_1"]:
            turns = (float(row["mt_bench_turn_1"]) + float(row["mt_bench_turn_2"])) / 2
            assert mean == pytest.approx(turns, abs=0.0101), row["model"]
    tasks = ("gsm8k", "hellaswag", "arc_c", "truthfulqa", "eq_bench", "openbookqa")
    for row, mean in table2.numbers("mean"):
        assert mean == pytest.approx(sum(float(row[t]) for t in tasks) / 6, abs=0.051), row["model"]
    assert (len(table1.rows), len(table2.rows), len(cards.rows)) == (23, 18, 12)
    base = dict(zip(("dpo", "selm"), (15.41, 24.25), strict=True))
    (sft,) = table1.numbers("lc_win_rate", model="Zephyr-7B-SFT")
    (selm,) = table1.numbers("lc_win_rate", base="Zephyr-7B", method="SELM", iteration="3")
    assert selm[1] == base["selm"] and selm[1] - sft[1] == pytest.approx(16.24)  # as the paper says
    for name, odd in (("figure2_zephyr", ()), ("figure2_llama3", ("DPO Iter 1", "SELM Iter 2"))):
        table = {row["model"]: row for row in published.load(name).rows}
        for a in table:
            for b in table:
                both = float(table[a][b]) + float(table[b][a])
                expected = 101.66 if {a, b} == set(odd) else 100  # the paper's own slip
                assert both == pytest.approx(expected, abs=0.011), (a, b)
    with pytest.raises(ValueError, match="no published numbers 'table3'"):
        published.load("table3")


def test_a_runs_name_becomes_no_formula_in_the_data(two):
    (runs, _), name = two, "=HYPERLINK(1)"
    rows = list(csv.DictReader(io.StringIO(paper.win_rates(runs, [name, "dpo"]).csv())))
    assert any(row["row"] == f"'{name}, iteration 1" for row in rows)
