"""A reward model trained by a run, read by transformers, and asked by the next run."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.commands import preview
from selm_jax.feedback.ranker import Question, build_ranker
from selm_jax.iterate import iterate
from selm_jax.models.config import ScalarHead
from selm_jax.models.families import read_config
from selm_jax.preferences.examples import ExampleError
from selm_jax.run.check import check
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.tables.examples import read as read_examples
from selm_jax.text.prompts import DataError, Message

QUIET = Console(quiet=True)
STAGES = ("generate", "rank", "score", "train", "export")
WARM, COLD = ("glad", "kind", "warm", "fond"), ("cold", "dull", "grim", "sour")


def pairs(count: int, seed: int) -> list[dict]:
    """Answers that differ in one word, and in how long they are, at random."""
    rng = random.Random(seed)

    def answer(words):
        return f"A {rng.choice(words)} {rng.choice(('one', 'thing'))}{'.' * rng.randint(1, 3)}"

    return [
        {
            "prompt_id": f"{seed}-{i}", "prompt": rng.choice(tiny.PROMPTS), "chosen": answer(WARM),
            "rejected": answer(COLD), "good": rng.randint(6, 9), "bad": 1.5,
        }
        for i in range(count)
    ]  # fmt: skip


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def experiment(folder, **changes):
    if not (folder / "model").exists():
        tiny.make_model(folder / "model")
    write(folder / "train.jsonl", pairs(96, seed=1))
    held = pairs(40, seed=2)
    write(folder / "heldout.jsonl", held)
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in held]
    write(folder / "turned.jsonl", turned)
    base = {
        "iterations": 1, "objective": {"loss": "bradley_terry", "centering": 0.01, "margin": 0.1},
        "data__chosen": "chosen", "data__rejected": "rejected", "data__chosen_score": "good",
        "data__rejected_score": "bad", "candidates": {"greedy": 0, "dataset": True},
        "training__learning_rate": 1e-2, "training__global_batch": 12, "training__epochs": 2,
        "training__rows": 4, "training__warmup_ratio": 0.0, "training__checkpoint_every": 100,
    }  # fmt: skip
    return tiny.experiment(folder, **(base | changes))


def with_sets(folder, **changes):
    """The experiment with named held-out sets: the same pairs turned round, and the first seven."""
    few = {"source": str(folder / "heldout.jsonl"), "limit": 7}
    sets = {"turned": str(folder / "turned.jsonl"), "few": few}
    return experiment(folder, data__heldout_sets=sets, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = Run(config.load(with_sets(folder, keep_best="heldout/few/loss")), QUIET)
    iterate(run)
    return run, folder


def lines(run, stage):
    found = [json.loads(x) for x in run.folder.metrics_file.read_text().splitlines()]
    return [x for x in found if x["stage"] == stage]


def test_it_learns_a_rule_that_can_be_seen(trained):
    run, _ = trained
    before, after = lines(run, "evaluate")
    assert before["heldout/accuracy"] == 0.5 and before["heldout/ties"] == 40
    assert after["heldout/accuracy"] > 0.9
    assert after["heldout/accuracy_low"] > 0.75 and after["heldout/accuracy_high"] <= 1
    assert after["heldout/loss"] < before["heldout/loss"] == pytest.approx(math.log(2))


def test_named_held_out_sets_have_metrics_and_tables_of_their_own(trained):
    run, _ = trained
    line = lines(run, "evaluate")[-1]
    assert line["heldout/turned/accuracy"] == pytest.approx(1 - line["heldout/accuracy"])
    assert line["heldout/turned/margin"] == pytest.approx(-line["heldout/margin"])
    assert (line["heldout/pairs"], line["heldout/few/pairs"]) == (40, 7)
    folder = run.folder.iteration(1)
    of = {name: pq.read_table(folder / name).to_pylist() for name in (
        "pairs.parquet", "pairs-turned.parquet", "pairs-few.parquet",
    )}  # fmt: skip
    all_pairs, turned, few = of.values()
    for one, other in zip(few, all_pairs[:7], strict=True):  # packed otherwise: equal but rounding
        assert one == {
            k: pytest.approx(v, rel=1e-5) if "reward" in k else v for k, v in other.items()
        }
    for one, other in zip(all_pairs, turned, strict=True):
        assert one["reward_chosen"] == pytest.approx(other["reward_rejected"], rel=1e-5)
    margins = np.array([row["reward_chosen"] - row["reward_rejected"] for row in few])
    assert line["heldout/few/loss"] == pytest.approx(np.logaddexp(0, -margins).mean())
    entry = json.loads((folder / "stage.json").read_text())["evaluate"]
    assert entry["counts"]["pairs"] == 87
    assert entry["counts"]["heldout/few/accuracy"] == line["heldout/few/accuracy"]
    assert set(of) <= {Path(name).name for name in entry["outputs"]}


def test_a_set_chooses_the_best_reward_model_and_the_page_shows_each_set(trained):
    run, _ = trained
    values = [line["heldout/few/loss"] for line in lines(run, "evaluate")]
    best = json.loads(run.folder.manifest_file.read_text())["best"]
    assert best == {
        "metric": "heldout/few/loss", "iteration": 1, "value": pytest.approx(min(values)),
        "model": "iteration_1/model",
    }  # fmt: skip
    page = (run.folder.path / "report.html").read_text()
    assert "turned: accuracy on pairs" in page and "few: accuracy on pairs" in page


def test_a_set_without_pairs_is_refused_before_the_work(tmp_path):
    file = with_sets(tmp_path)
    tiny.write_prompts(tmp_path / "turned.jsonl")
    with pytest.raises(DataError, match=r"turned\.jsonl.*chosen"):
        check(Run(config.load(file), QUIET))


def test_pairs_of_a_set_that_are_too_long_are_refused_or_counted(tmp_path):
    file = with_sets(tmp_path)
    rows = pairs(3, seed=3)
    rows[1]["chosen"] = "warm " * 200
    write(tmp_path / "turned.jsonl", rows)
    with pytest.raises((RunError, ExampleError), match=rows[1]["prompt_id"]):
        check(Run(config.load(file), QUIET))
    run = Run(config.load(file, ["data.on_bad_row=drop"]), QUIET)
    run.open()
    tiny.do(run, "evaluate", 0)
    counts = tiny.counts_of(run, "evaluate", 0)
    assert (counts["pairs"], counts["too_long"]) == (49, 1)
    assert lines(run, "evaluate")[0]["heldout/turned/pairs"] == 2


def test_the_first_loss_is_that_of_equal_rewards_and_the_margins(trained):
    """The head begins at zero: what is left is the gap that the scores ask for."""
    run, _ = trained
    first = lines(run, "train")[0]
    assert first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0.5
    asked = [0.1 * (row["good"] - row["bad"]) for row in pairs(96, seed=1)]
    possible = [np.log1p(np.exp(gap)) for gap in asked]
    assert min(possible) < first["loss"] < max(possible)


def test_what_is_trained_on_are_whole_conversations_and_the_datas_scores(trained):
    run, folder = trained
    examples = read_examples(run.folder.iteration(1) / "examples.parquet")
    rows = {row["prompt_id"]: row for row in pairs(96, seed=1)}
    assert len(examples) == 96
    for e in examples:
        row = rows[e.prompt_id]
        assert e.reference_logps is None and e.scores == (row["good"], row["bad"])
        for role in ("chosen", "rejected"):
            whole = run.chat.tokenizer.decode([*e.prompt, *e.responses[e.roles[role]]])
            assert whole == (
                f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row[role]}<|im_end|>\n"
            )
    # What both begin with is said once, and the preview shows the same.
    assert all(len(e.prompt) > 15 for e in examples)
    write(folder / "train.jsonl", pairs(96, seed=1))
    fresh = Run(config.load(experiment(folder), ["output=" + str(folder / "none")]), QUIET)
    shown = preview.collect(fresh, 1).rows
    assert [(e.prompt, e.responses) for e in shown] == [(e.prompt, e.responses) for e in examples]


def test_transformers_reads_the_same_scores_from_the_exported_folder(trained):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run, _ = trained
    folder = run.folder.iteration(1) / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    held = pq.read_table(run.folder.iteration(1) / "pairs.parquet").to_pylist()
    questions = [
        Question(row["prompt"], (Message("user", row["prompt"]),), {}, row["prompt_id"])
        for row in held
    ]
    answers = [[row["chosen"], row["rejected"]] for row in held]
    ours = build_ranker("reward_model", source=str(folder)).scores(questions, answers)
    for row, texts, scores in zip(held, answers, ours, strict=True):
        stored = [row["reward_chosen"], row["reward_rejected"]]
        np.testing.assert_allclose(scores, stored, atol=1e-4)  # packed rows say the same
        chats = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
            for text in texts
        ]
        batch = tokenizer.apply_chat_template(
            chats, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            theirs = model(**batch).logits[:, 0].numpy()
        np.testing.assert_allclose(scores, theirs, atol=1e-4)


def test_the_folder_says_what_it_is(trained):
    run, _ = trained
    folder = run.folder.iteration(1) / "model"
    assert read_config(folder).head == ScalarHead(1)  # the tokenizer's pad token
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "reward model" in card
    assert "held-out pairs" in (run.folder.path / "report.html").read_text()
    assert not any(tiny.do(run, stage, 1) for stage in STAGES)  # all are done, and know it


def test_it_ranks_the_answers_of_the_next_run(trained, tmp_path):
    run, _ = trained
    reward = shutil.copytree(run.folder.iteration(1) / "model", tmp_path / "reward")
    feedback = {"ranker": "reward_model", "settings": {"source": str(reward)}}
    once = {"iterations": 1, "training__learning_rate": 1e-3}
    asking = Run(config.load(tiny.experiment(tmp_path, feedback=feedback, **once)), QUIET)
    check(asking)
    assert all(tiny.do(asking, stage, 1) for stage in STAGES[:2])
    ranked = pq.read_table(asking.folder.iteration(1) / "ranked.parquet").to_pylist()
    assert len({row["score"] for row in ranked}) > 20
    counts = json.loads((asking.folder.iteration(1) / "stage.json").read_text())["rank"]["counts"]
    assert counts["ranker/candidates"] == 96 and counts["ranker/cut"] == 0
    by_prompt: dict[str, list[dict]] = {}
    for row in ranked:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for rows in by_prompt.values():
        best = [row["score"] for row in rows if row["chosen"]]
        assert not best or best == [max(row["score"] for row in rows)]
    # The same path, but another model: what it ranked is not gone on with.
    weights = (reward / "model.safetensors").read_bytes()
    (reward / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="its input ranker 1 has changed"):
        tiny.do(Run(asking.experiment, QUIET), STAGES[1], 1)


def test_training_goes_on_from_a_reward_model(trained, tmp_path):
    run, _ = trained
    shutil.copytree(run.folder.iteration(1) / "model", tmp_path / "model")
    file = experiment(tmp_path, data__limit=24, training__epochs=1)
    more = Run(config.load(file), QUIET)
    check(more)
    params, source = more.programs.load(more.policy(0).path), run.programs.load(run.policy(1).path)
    np.testing.assert_array_equal(params["score"], source["score"])
    assert np.any(params["score"])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": {"greedy": 1, "dataset": True}}, "candidates: {greedy: 0, samples: 0"),
        ({"lora": {"rank": 2, "alpha": 4}}, "adapters would leave its head at zero"),
        ({"training__token_statistics": True}, "token_statistics has nothing to report"),
        ({"text__layout": "paper"}, "text.layout: paper does not produce them"),
        ({"data__chosen_score": "goood"}, "missing column 'goood'; did you mean 'good'"),
        (
            {"data__chosen_score": None, "data__rejected_score": None},
            "objective.margin: the mar",
        ),
        ({"data__chosen_score": None}, "it needs data.chosen_score as well"),
    ],
)
def test_experiments_that_do_not_fit_are_refused(changes, message, tmp_path):
    def go():
        run = Run(config.load(experiment(tmp_path, **changes)), QUIET)
        check(run)
        tiny.do(run, STAGES[0], 1), tiny.do(run, STAGES[1], 1)

    with pytest.raises((RunError, DataError, config.ConfigError), match=message):
        go()


def test_a_reward_model_is_no_policy(trained, tmp_path):
    run, _ = trained
    shutil.copytree(run.folder.iteration(1) / "model", tmp_path / "model")
    tiny.write_prompts(tmp_path / "train.jsonl")
    tiny.write_prompts(tmp_path / "heldout.jsonl")
    with pytest.raises(RunError, match="is a reward model and cannot generate text"):
        check(Run(config.load(tiny.experiment(tmp_path)), QUIET))


def test_pairs_that_are_the_same_tokens_prefer_nothing(tmp_path):
    file = experiment(tmp_path)
    rows = pairs(96, seed=1)
    rows[5] |= {"chosen": "Yes.", "rejected": "Yes.x"}
    write(tmp_path / "train.jsonl", rows)
    template = tiny.TEMPLATE.replace("m['content']", "m['content'][:20].rstrip('x')")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    run = Run(config.load(file), QUIET)
    tiny.do(run, STAGES[0], 1), tiny.do(run, STAGES[1], 1)
    for work in (lambda: check(run), lambda: tiny.do(run, STAGES[2], 1)):
        with pytest.raises(ExampleError, match="prompt 1-5: chosen and rejected become the same"):
            work()
