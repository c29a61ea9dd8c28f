"""Effects of the `text` settings on a run: unusable rows, the authors' layout, and messages."""

import io
import json

import pyarrow.parquet as pq
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.run.check import check
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts, parts
from selm_jax.shell.lock import only_one
from selm_jax.shell.paths import claim
from selm_jax.tables import responses
from selm_jax.text.chat import UnusableAnswer
from selm_jax.text.layout import paper_ids

END = "<|im_end|>"
PAIRS = {"data__chosen": "chosen", "data__rejected": "rejected", "candidates__dataset": True,
         "candidates__samples": 0, "data__heldout": None, "iterations": 1}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def make(tmp_path, model):
    """A run of pairs, some of them bad, with the policy's answers already there."""
    (tmp_path / "model").symlink_to(model)

    def run(*bad: int, **changes) -> Run:
        settings = PAIRS | {"rollout__prompts_per_part": 8, "training__learning_rate": 1e-3}
        file = tiny.experiment(tmp_path, **settings, **changes)
        rows = [
            {"prompt_id": f"p{i}", "prompt": f"Say {i}.", "chosen": "Yes, " * (9 - i) + "yes.",
             "rejected": f"No{END}" if i in bad else "No."}
            for i in range(8)
        ]  # fmt: skip
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        found = Run(config.load(file), Console(quiet=True))
        answers = [
            responses.Row(f"p{i}", 0, "greedy", (40 + i, 1), found.chat.text([40 + i, 1]), "stop")
            for i in range(8)
        ]
        claim(found.folder.path)
        (file,) = parts.files(found.folder.iteration(1) / "responses", 1)
        responses.write(file, answers)
        return found

    return run


def ranked(run: Run) -> list[dict]:
    return pq.read_table(run.folder.iteration(1) / "ranked.parquet").to_pylist()


def test_an_answer_that_spells_out_an_end_token_stops_the_run_at_its_start(make):
    run = make(3)
    for work in (lambda: check(run), lambda: tiny.do(run, "rank", 1)):
        with pytest.raises(UnusableAnswer, match=r"prompt p3, rejected: .*spells(.|\n)*on_bad_row"):
            work()


def test_or_the_prompt_of_such_an_answer_is_dropped_and_counted(make):
    run = make(3, 5, data__on_bad_row="drop")
    check(run)
    tiny.do(run, "rank", 1)
    counts = tiny.counts_of(run, "rank", 1)
    assert counts["prompts"] == 8 and counts["pairs"] == 6
    assert counts["drops"] == counts["drops/unusable_answer"] == 2
    reasons = {row["prompt_id"]: row["dropped"] for row in ranked(run)}
    assert {p for p, reason in reasons.items() if reason} == {"p3", "p5"}
    assert set(reasons.values()) == {None, "unusable_answer"}
    without = [r["prompt_id"] for r in ranked(run) if r["token_ids"] is None]
    assert without == ["p3", "p5"]  # the answer that is bad; the others keep their ids
    examples, _ = tiny.paired(run, 1)
    assert [e.prompt_id for e in examples] == ["p0", "p1", "p2", "p4", "p6", "p7"]


def test_a_bad_row_is_missing_from_its_iteration_alone(tmp_path):
    file = tiny.experiment(tmp_path, data__on_bad_row="drop", data__skip=2, data__portions=3)
    rows = [{"prompt_id": f"p{i}", "prompt": f"Say {i}."} for i in range(11)]
    rows[0]["prompt"] = rows[4]["prompt"] = ""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = Run(config.load(file), Console(quiet=True))
    ids = [[p.id for p in run.prompts(t)] for t in (1, 2)]
    assert ids == [["p2", "p3"], ["p5", "p6", "p7"]]
    rows[5]["prompt"] = rows[6]["prompt"] = rows[7]["prompt"] = ""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(RunError, match="train.jsonl: none of the 3 rows of iteration 2 is usable"):
        Run(config.load(file), Console(quiet=True)).prompts(2)


def test_a_prompt_too_long_to_answer_is_a_bad_row(tmp_path):
    file = tiny.experiment(tmp_path, data__on_bad_row="drop", data__portions=2,
                           training__global_batch=2)  # fmt: skip
    rows = [{"prompt_id": f"p{i}", "prompt": f"Say {i}."} for i in range(6)]
    rows[1]["prompt"] = "x" * 80
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:3]))
    said = io.StringIO()
    run = Run(config.load(file), Console(file=said, width=200))
    check(run)
    assert [[p.id for p in run.prompts(t)] for t in (1, 2)] == [["p0", "p2"], ["p3", "p4", "p5"]]
    assert [p.id for p in run.heldout] == ["p0", "p2"] and run.data.longest_prompt <= 64
    assert run.data.all_prompts.dropped == {"prompt too long": (2,)}
    for name in ("train", "heldout"):
        assert f"{name}.jsonl: rows left out, prompt too long: 1" in said.getvalue()
    with pytest.raises(RunError, match=r"prompt p1 has .*on_bad_row to 'drop'"):
        check(Run(config.load(file, ["data.on_bad_row=error"]), Console(quiet=True)))
    with pytest.raises(RunError, match="all 6 prompts are longer than rollout.max_prompt_tokens"):
        check(Run(config.load(file, ["rollout.max_prompt_tokens=4"]), Console(quiet=True)))


def test_the_default_layout_trains_on_the_ids_that_were_drawn(make):
    run = make()
    tiny.do(run, "rank", 1)
    examples, cut = tiny.paired(run, 1)
    assert cut == {}
    for i, example in enumerate(examples):
        assert example.prompt == run.chat.prompt_ids(run.prompts(1)[i].messages)
        assert example.responses[example.roles["explore"]] == (40 + i, 1)


def test_the_papers_layout_renders_every_response_from_its_text(make):
    run = make(text__layout="paper")
    check(run)
    tiny.do(run, "rank", 1)
    examples, cut = tiny.paired(run, 1)
    assert len(examples) == 8 and cut == {"prompts_cut": 0, "responses_cut": 0}
    for prompt, example in zip(run.prompts(1), examples, strict=True):
        texts = {
            role: row["text"]
            for row in ranked(run)
            for role in ("chosen", "rejected", "explore")
            if row["prompt_id"] == prompt.id and row[role]
        }
        assert texts["explore"] == run.chat.text([40 + int(prompt.id[1]), 1])
        for role, text in texts.items():
            ids, response = paper_ids(run.chat, prompt.messages, text)
            assert example.prompt == ids and example.responses[example.roles[role]] == response
            assert response[-1] == 1 and response.count(1) == 2  # the template's and one more


def test_what_the_papers_layout_cuts_is_counted(make):
    run = make(text__layout="paper")
    tiny.do(run, "rank", 1)
    whole, _ = tiny.paired(run, 1)
    lengths = sorted(len(e.prompt) + max(_lengths(e)) for e in whole)
    limit, kept = lengths[4], lengths[4] - 30  # the prompts alone are longer than `kept`
    run = make(text__layout="paper", text__max_length=limit, text__max_prompt_length=kept)
    examples, cut = tiny.paired(run, 1)
    changed = [(a.prompt != b.prompt, a.responses != b.responses)
               for a, b in zip(whole, examples, strict=True)]  # fmt: skip
    assert cut == {
        "prompts_cut": sum(prompt for prompt, _ in changed),
        "responses_cut": sum(responses for _, responses in changed),
    }
    assert 0 < cut["responses_cut"] <= 3 and all(
        len(e.prompt) + max(_lengths(e)) <= limit for e in examples
    )


def _lengths(example) -> list[int]:
    """Of the chosen and the rejected response."""
    return [len(example.responses[example.roles[role]]) for role in ("chosen", "rejected")]


@pytest.mark.parametrize("layout", ["default", "paper"])
def test_a_whole_iteration_and_its_manifest(make, layout):
    run = make(text__layout=layout)
    with only_one(run.folder.path):
        check(run)
        run.open()
        for stage in ("rank", "score", "train"):
            tiny.do(run, stage, 1)
    assert json.loads((run.folder.path / "manifest.json").read_text())["layout"] == layout
    record = artifacts.Stages(run.folder.iteration(1)).read()
    assert record["score"]["settings"]["text.layout"] == layout
    assert ("prompts_cut" in record["score"]["counts"]) == (layout == "paper")
    assert record["train"]["done"]
    logged = map(json.loads, run.folder.metrics_file.read_text().splitlines())
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)


def test_another_layout_does_not_go_on_from_these_files(make):
    run = make()
    tiny.do(run, "rank", 1)
    other = make(text__layout="paper")
    with pytest.raises(artifacts.ArtifactError, match=r"text.layout was 'default' and is now 'pap"):
        tiny.do(other, "rank", 1)


def test_a_prompt_that_is_too_long_is_named_with_its_system_message(make):
    assert make(rollout__max_prompt_tokens=64).data.longest_prompt <= 64
    run = make(rollout__max_prompt_tokens=64, data__system="Be as brief as you can ever be. " * 4)
    with pytest.raises(RunError, match=r"prompt p0 has \d+ tokens.*is 64 \(8 of 8 prompts"):
        check(run)
