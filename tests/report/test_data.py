"""Reading run folders: what is there, what is not there yet, what is wrong."""

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.report import paper
from selm_jax.report.data import STAGES, ReportError, Stage, flatten, report_data
from selm_jax.sweep.table import _mean, outcome


def test_reads_a_finished_run(run):
    data = report_data(run)
    assert data.name == "quickstart" and data.method == "selm" and data.planned == 3
    assert data.iterations == (0, 1, 2, 3)
    assert data.unfinished == () and data.notes == ()
    assert data.metric(3, "kl") == pytest.approx(12.0)
    assert data.metric(0, "gain") is None  # iteration 0 has nothing to be compared with
    assert data.settings["objective.alpha"] == "0.001"
    assert tuple(data.stages[1]) == STAGES and tuple(data.stages[0]) == ("evaluate",)
    assert data.stages[2]["rank"].drops == {"tie": 12, "equal_text": 6, "cut_off": 0}
    assert data.stages[2]["rank"].explored == {"best": 24, "middle": 36, "worst": 12, "tied": 0}
    assert len(data.answers) == 4 * 12 * 2


def test_updates_are_counted_through_the_run(run):
    updates = report_data(run).updates
    assert [u.index for u in updates] == list(range(1, 91))
    assert [u.step for u in updates][30] == 1 and updates[30].iteration == 2


def test_a_repeated_line_replaces_the_earlier_one(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "train", "iteration": 2, "step": 7, "loss": 9.0}) + "\n")
    updates = report_data(run).updates
    assert len(updates) == 90
    assert [u.metrics["loss"] for u in updates if (u.iteration, u.step) == (2, 7)] == [9.0]


def test_an_unfinished_run_says_what_is_missing(make_run, tmp_path):
    folder = make_run(tmp_path / "u", iterations=2, last_stages=("generate", "rank"))
    data = report_data(folder)
    assert data.unfinished == (
        "Iteration 2: score, train, export, evaluate not finished yet.",
        "Iteration 3: not begun, or none of its stages is finished yet.",
    )


def test_a_stage_that_has_begun_is_not_done(run):
    path = run / "iteration_3" / "stage.json"
    stages = json.loads(path.read_text())
    del stages["evaluate"]
    stages["export"] = {"done": False, "inputs": {}, "settings": {}}
    path.write_text(json.dumps(stages))
    assert report_data(run).unfinished == ("Iteration 3: export, evaluate not finished yet.",)


def test_drops_by_reason_and_pairs_by_place_of_the_explored_answer():
    counts = {"drops/tie": 1, "drops/empty": 2, "drops": 3, "explore/best": 4, "explore/worst": 5}
    stage = Stage("rank", {**counts, "explore_is/chosen": 9}, None)
    assert stage.drops == {"tie": 1, "empty": 2}
    assert stage.explored == {"best": 4, "middle": 0, "worst": 5, "tied": 0}


def test_without_heldout_prompts_nothing_waits_for_evaluation(make_run, tmp_path):
    folder = make_run(tmp_path / "n", last_stages=STAGES[:-1], settings="data:\n  heldout: null\n")
    data = report_data(folder)
    assert not data.evaluates and data.unfinished == ()


def test_a_run_that_has_only_begun(make_run, tmp_path):
    folder = make_run(tmp_path / "u")
    (folder / "metrics.jsonl").unlink()
    for k in range(4):
        shutil.rmtree(folder / f"iteration_{k}")
    data = report_data(folder)
    assert data.iterations == () and len(data.unfinished) == 4
    assert "There is no metrics.jsonl yet" in data.notes[0]


def test_a_half_written_last_line_is_no_error_but_is_said(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train", "itera')
    data = report_data(run)
    assert len(data.updates) == 90 and "is incomplete" in data.notes[0]


@pytest.mark.parametrize("name", ["manifest.json", "iteration_1/stage.json"])
def test_a_record_that_is_nested_too_deeply_is_named(run, name):
    (run / name).write_text("[" * 100_000)
    with pytest.raises(ReportError, match=rf"{name} is not JSON: .*nested too deeply"):
        report_data(run)


def test_a_broken_line_in_the_middle_is_an_error(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:4], "{oops", *lines[4:]]))
    with pytest.raises(ReportError, match=r"metrics.jsonl, line 5 is not JSON"):
        report_data(run)


def test_non_finite_metrics_are_said(run):
    line = {"stage": "train", "iteration": 3, "step": 31, "loss": math.nan}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert "loss is not a finite number on 1 line of metrics.jsonl" in report_data(run).notes[0]


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_missing_files_are_named(run, name):
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
        report_data(run)


def test_both_missing_files_are_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="it lacks config.yaml and manifest.json"):
        report_data(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        report_data(tmp_path / "nowhere")


def test_a_claimed_table_that_is_gone(run):
    (run / "iteration_2" / "heldout.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"iteration_2/heldout.parquet is missing, but"):
        report_data(run)


def test_a_table_without_a_column(run):
    path = run / "iteration_1" / "heldout.parquet"
    pq.write_table(pq.read_table(path).drop(["finish"]), path)
    with pytest.raises(ReportError, match=r"has no column finish; it has prompt_id"):
        report_data(run)


def test_a_table_with_a_hole_or_an_unknown_kind(run):
    path = run / "iteration_1" / "heldout.parquet"
    rows = pq.read_table(path).to_pylist()
    before, rows[3]["text"] = rows[3]["text"], None
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ReportError, match=r"row 3: text is empty"):
        report_data(run)
    rows[3] |= {"text": before, "kind": "beam"}
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ReportError, match=r"row 3: kind is 'beam'"):
        report_data(run)


def test_answers_without_log_probabilities_are_left_out_of_kl_alone(run):
    path = run / "iteration_2" / "heldout.parquet"
    rows = pq.read_table(path).to_pylist()
    lost = next(row for row in rows if row["kind"] == "sample")
    lost |= {"logp": None, "logp_start": None}
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = report_data(run)
    assert [a.prompt_id for a in found.answers if math.isnan(a.logp)] == [lost["prompt_id"]]
    of_run = outcome(found)
    kl = _mean({0: of_run}, "kl", 2)
    assert kl is not None and kl.mean == pytest.approx(np.nanmean(of_run.kl[2]))
    assert _mean({0: of_run}, "sample", 2) is not None
    mine = paper.own_samples(found, "mine", 2, 0.1)
    figure = paper.implicit_differences("n", "t", mine, [mine])
    assert len(figure.rows) == len(of_run.prompts) - 1


def test_a_table_that_is_no_parquet(run):
    (run / "iteration_1" / "heldout.parquet").write_text("not parquet at all")
    with pytest.raises(ReportError, match=r"heldout.parquet: this table is damaged"):
        report_data(run)


def test_a_stage_with_a_wrong_count(run):
    path = run / "iteration_1" / "stage.json"
    stages = json.loads(path.read_text())
    stages["rank"]["counts"]["pairs"] = "many"
    path.write_text(json.dumps(stages))
    with pytest.raises(ReportError, match=r"rank.counts.pairs: found 'many', expected a number"):
        report_data(run)


_settings = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), _settings, min_size=1, max_size=4))
def test_flatten_keeps_keys_apart(settings):
    pairs = list(flatten(settings))
    assert len({key for key, _ in pairs}) == len(pairs)
    assert {key.split(".")[0].split("[")[0] for key, _ in pairs} == set(settings)
