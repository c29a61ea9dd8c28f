"""A run's own evaluation: held-out pairs, entropy and variety, besides reward and KL."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tiny import PROMPTS, do, experiment, make_model, on_first_device
from typer.testing import CliRunner

from selm_jax.config import load
from selm_jax.evaluation.command import app
from selm_jax.evaluation.pairs import pairs_within
from selm_jax.report import page
from selm_jax.run.run import Run
from selm_jax.shell import artifacts

LOGPS = ["logp", "logp_start"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose first iteration is another random model; its held-out prompts come with pairs."""
    on_first_device(monkeypatch)
    sets = {"again": str(tmp_path / "heldout.jsonl")}
    file = experiment(tmp_path, evaluation__samples=2, data__heldout_sets=sets)
    rows = [
        {"prompt_id": f"h{i}", "prompt": text, "chosen": f"Yes, {i}.", "rejected": f"No: {i}!"}
        for i, text in enumerate(PROMPTS[:6])
    ]
    rows[2]["rejected"] = "It ends<|im_end|> early."  # cannot follow a prompt: counted, left out
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(load(file), Console(quiet=True))
    run.open()
    make_model(run.folder.iteration(1) / "model", seed=1)
    return run


def test_pairs_are_measured_against_the_start_model(run):
    assert do(run, "evaluate", 0) and do(run, "evaluate", 1)
    start, after = (json.loads(line) for line in run.folder.metrics_file.read_text().splitlines())
    assert start["heldout/pairs/accuracy"] == 0.5 and start["heldout/pairs/margins"] == 0
    assert start["heldout/kl"] == 0
    pairs = pq.read_table(run.folder.iteration(1) / "heldout_pairs.parquet").to_pylist()
    assert [row["prompt_id"] for row in pairs[::2]] == ["h0", "h1", "h3", "h4", "h5"]
    ratio = {(r["prompt_id"], r["role"]): r["logp"] - r["logp_start"] for r in pairs}
    examples, _ = pairs_within(run.chat, run.heldout, 128)
    guarded = [ratio[e.prompt_id, "chosen"] / len(e.responses[e.roles["chosen"]]) for e in examples]
    assert after["heldout/capability"] == pytest.approx(np.mean(guarded), rel=1e-5)
    assert "heldout/capability" not in start
    margins = [ratio[p, "chosen"] - ratio[p, "rejected"] for p, role in ratio if role == "chosen"]
    assert after["heldout/pairs/margins"] == pytest.approx(0.1 * sum(margins) / 5, abs=1e-6)
    assert after["heldout/pairs/accuracy"] == sum(m > 0 for m in margins) / 5
    sampled = [r for r in pq.read_table(run.folder.iteration(1) / "heldout.parquet").to_pylist()
               if r["kind"] == "sample"]  # fmt: skip
    surprise = -sum(r["logp"] for r in sampled)
    assert after["heldout/entropy"] == pytest.approx(surprise / 12, rel=1e-5)
    tokens = sum(len(r["token_ids"]) for r in sampled)
    assert after["heldout/entropy_token"] == pytest.approx(surprise / tokens, rel=1e-5)
    record = json.loads((run.folder.iteration(1) / "stage.json").read_text())["evaluate"]
    assert record["counts"]["pairs"] == 10 and record["counts"]["pairs_left_out"] == 2
    names = {f"heldout{of}{name}.parquet" for of in ("", "_pairs") for name in ("", "-again")}
    assert set(record["outputs"]) == names
    assert {"heldout again", "heldout-again.parquet"} <= set(record["inputs"])
    # The same prompts as a named set have the same metrics.
    again = {k.replace("/again/", "/"): v for k, v in after.items() if "/again/" in k}
    assert again == {
        k: v for k, v in after.items() if k.startswith("heldout/") and "/again/" not in k
    }
    assert not do(run, "evaluate", 1)  # it is done

    out = run.folder.path / "report.html"
    page.write([run.folder.path], out)
    text = out.read_text()
    assert "Other held-out sets" in text and "again: gain over the start model" in text
    assert "Pairs right" in text and "Capability" in text and "Entropy, nats" in text


def test_eval_heldout_gives_the_runs_own_numbers(run, tmp_path, monkeypatch):
    """One path: in the run's rows to the bit, in others to the last bits of log-probabilities."""
    assert do(run, "evaluate", 0) and do(run, "evaluate", 1)
    artifacts.Stages(run.folder.iteration(1)).begin("export", {}, {})
    artifacts.Stages(run.folder.iteration(1)).finish("export", {}, {}, {}, {}, 0.0)
    monkeypatch.chdir(tmp_path)
    own = [
        pq.read_table(run.folder.iteration(1) / f"heldout{end}.parquet") for end in ("", "_pairs")
    ]
    metrics = json.loads(run.folder.metrics_file.read_text().splitlines()[1])
    for out, flags in (("same", ["--as-in-run"]), ("other", [])):
        told = CliRunner().invoke(app, ["heldout", str(run.folder.path), "-o", out, *flags])
        assert told.exit_code == 0, (told.output, told.exception)
        (pairs,) = (tmp_path / out).glob("*-pairs.parquet")
        tables = [
            pq.read_table(str(pairs).replace(end, ".parquet")) for end in ("-pairs.parquet", "?")
        ]
        report = json.loads((tmp_path / out / "heldout.json").read_text())
        (found,) = report["contestants"].values()
        measures = {name: one["mean"] for name, one in found["measures"].items()}
        names = {n: f"heldout/{n}" for n in ("kl", "entropy", "reward_greedy", "reward_sample")}
        names |= {n: f"heldout/pairs/{n}" for n in ("margins", "accuracy")}
        expected = {name: metrics[key] for name, key in names.items()}
        if flags:
            assert [t.equals(o) for t, o in zip(tables, own, strict=True)] == [True, True]
            assert {name: measures[name] for name in names} == expected
        else:
            assert tables[0].drop(LOGPS).equals(own[0].drop(LOGPS))
            for table, mine in zip(tables, own, strict=True):
                for name in LOGPS:
                    np.testing.assert_allclose(table[name], mine[name], atol=1e-4)
            assert {name: measures[name] for name in names} == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_prompts_too_long_for_a_row_are_measured_as_far_as_they_can_be(run, tmp_path):
    """One whose answers fit a row only each alone is measured as in a longer row; one too long even
    for that has no KL, and changes no other prompt's."""
    lines = (tmp_path / "heldout.jsonl").read_text().splitlines()[:2]
    answers = {"chosen": "Yes.", "rejected": "No!"}
    split, long = (
        json.dumps({"prompt_id": f"x{n}", "prompt": "x" * n, **answers}) for n in (80, 140)
    )
    found, rows = {}, {}
    for row_length, prompts in ((256, [*lines, split]), (128, [*lines, split, long])):
        (tmp_path / "heldout.jsonl").write_text("\n".join(prompts) + "\n")
        overrides = ["rollout.max_prompt_tokens=180", f"training.row_length={row_length}"]
        overrides += [f"output={tmp_path / str(row_length)}", "data.heldout_sets={}"]
        one = Run(load(tmp_path / "experiment.yaml", overrides), Console(quiet=True))
        one.open()
        make_model(one.folder.iteration(1) / "model", seed=1)
        assert do(one, "evaluate", 0) and do(one, "evaluate", 1)
        found[row_length] = json.loads(one.folder.metrics_file.read_text().splitlines()[1])
        rows[row_length] = pq.read_table(one.folder.iteration(1) / "heldout.parquet").to_pylist()
        counts = json.loads((one.folder.iteration(1) / "stage.json").read_text())["evaluate"][
            "counts"
        ]
        assert counts.get("answers_left_out") == {256: None, 128: 3}[row_length]
        assert counts["responses"] == 3 * len(prompts)
    ids = len(one.chat.prompt_ids(one.heldout[2].messages))
    assert ids + 12 < 128 < ids + sum(len(r["token_ids"]) for r in rows[128][6:9])
    for row, other in zip(rows[128], rows[256], strict=False):
        logps = {name: pytest.approx(other[name], abs=1e-4) for name in ("logp", "logp_start")}
        assert row == other | logps
    for row in rows[128][9:]:
        assert row["logp"] is row["logp_start"] is None
        assert row["score"] is not None and row["token_ids"]
    for name in ("kl", "kl_stderr", "entropy", "entropy_token", "pairs/margins"):
        assert found[128][f"heldout/{name}"] == pytest.approx(
            found[256][f"heldout/{name}"], abs=1e-4
        )
    assert (found[128]["heldout/prompts"], found[256]["heldout/prompts"]) == (4, 3)
    greedy = [row["score"] for row in rows[128] if row["kind"] == "greedy"]
    assert found[128]["heldout/reward_greedy"] == pytest.approx(sum(greedy) / 4)
    page.write([one.folder.path], tmp_path / "report.html")


def test_no_answer_that_fits_leaves_only_what_needs_no_row(run, tmp_path):
    line = json.dumps({"prompt_id": "long", "prompt": "x" * 140})
    (tmp_path / "heldout.jsonl").write_text(line + "\n")
    run = Run(load(tmp_path / "experiment.yaml", ["rollout.max_prompt_tokens=180"]), run.console)
    assert do(run, "evaluate", 0)
    found = json.loads(run.folder.metrics_file.read_text())
    assert "heldout/reward_greedy" in found
    assert not {key for key in found if "kl" in key or "entropy" in key}


def test_data_without_pairs_gives_none(tmp_path, monkeypatch):
    on_first_device(monkeypatch)
    run = Run(load(experiment(tmp_path)), Console(quiet=True))
    run.open()
    do(run, "evaluate", 0)
    assert not (run.folder.iteration(0) / "heldout_pairs.parquet").exists()
    assert not any("pairs" in key for key in json.loads(run.folder.metrics_file.read_text()))
