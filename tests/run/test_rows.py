"""All rows are checked before any work: a bad row stops the run at its start, or is dropped.

Dropped rows are counted.
"""

import io
import json
import shutil
import sys

import pytest
import tiny
from rich.console import Console

from selm_jax import cli, config
from selm_jax.commands.preview import preview
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.preferences.own_answers import rated_example
from selm_jax.run.check import check, check_rows
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.text.chat import UnusableAnswer
from selm_jax.text.prompts import DataError
from selm_jax.text.template import Template

PAIRS = {"data__chosen": "chosen", "data__rejected": "rejected", "candidates__dataset": True,
         "candidates__samples": 0, "data__heldout": None, "iterations": 2, "data__portions": 2,
         "training__global_batch": 1}  # fmt: skip
TAUGHT = {"candidates__greedy": 0, "objective": {"loss": "dpo", "beta": 0.1}}
SFT = {"candidates__greedy": 0, "objective": {"loss": "sft"}, "data__rejected": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def make(tmp_path, model):
    """A run over 8 pairs with changed rows, {number: its changes}, and changed settings."""
    (tmp_path / "model").symlink_to(model)

    def run(changed=None, /, **settings) -> Run:
        file = tiny.experiment(tmp_path, **(PAIRS | settings))
        rows = [
            {"prompt_id": f"p{i}", "prompt": f"Say {i}.", "chosen": "Yes.", "rejected": "No."}
            for i in range(8)
        ]  # fmt: skip
        for i, change in (changed or {}).items():
            rows[i] |= change
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Run(config.load(file), Console(file=io.StringIO(), width=300))

    return run


def told(run: Run) -> str:
    return run.console.file.getvalue()


LONG = {
    # name: (changes of row 6, settings, what is said)
    "the model": ({"chosen": "x" * 600}, {"training__row_length": 1024}, "made for at most 512"),
    "a row": ({"rejected": "x" * 200}, {}, "has 128 (training.row_length)"),
    "a row, both": (
        {"chosen": "x" * 60, "rejected": "y" * 60}, {}, "has 128 (training.row_length)",
    ),
    "a row, taught pairs": ({"rejected": "x" * 200}, TAUGHT, "has 128 (training.row_length)"),
    "the model, taught answers": (
        {"chosen": "x" * 600}, SFT | {"training__row_length": 1024}, "made for at most 512",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_an_answer_of_the_data_that_is_too_long_is_found_at_the_start(make, name):
    changes, settings, said = LONG[name]
    with pytest.raises(RunError, match="prompt p6: with its .*1 of 8 prompts.*on_bad_row") as e:
        check(make({6: changes}, **settings))
    assert said in str(e.value)
    run = make({6: changes}, **settings, data__on_bad_row="drop")
    check(run)
    assert "train.jsonl: rows left out, answer too long: 1" in told(run)
    assert [[p.id for p in run.prompts(t)] for t in (1, 2)] == [
        ["p0", "p1", "p2", "p3"], ["p4", "p5", "p7"]
    ]  # fmt: skip


def test_answers_that_are_not_used_may_be_long(make):
    check(make({6: {"rejected": "x" * 900}}, **SFT))
    prompts_alone = {"candidates__dataset": False, "candidates__samples": 2}
    check(make({6: {"rejected": "x" * 900}}, **prompts_alone))
    cut = {"text__max_length": 64, "text__max_prompt_length": 40}
    check(make({6: {"rejected": "x" * 900}}, text__layout="paper", **cut))


def test_all_are_too_long(make):
    changed = {i: {"chosen": f"{i}" * 200} for i in range(8)}
    with pytest.raises(RunError, match="the answers of all 8 prompts are too long: with its"):
        check(make(changed, data__on_bad_row="drop"))


def test_a_row_too_long_is_said_by_the_preview(make):
    run = make({6: {"rejected": "x" * 200}})
    preview(run, 1, 0)  # of the iteration that has not got it
    assert "selm run will stop here: prompt p6: with its answers" in told(run)
    run = make()
    preview(run, 1, 0)
    assert "stop here" not in told(run)


def test_an_answer_that_the_template_changes_is_found_in_whichever_row(make, model, tmp_path):
    thinking = shutil.copytree(model, tmp_path / "thinking")
    template = tiny.TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
    (thinking / "chat_template.jinja").write_text(template)
    run = make({7: {"rejected": "No, <think>never</think>."}}, model__source=str(thinking))
    with pytest.raises(UnusableAnswer, match=r"prompt p7, rejected: .*changes the answer"):
        check(run)


def test_pairs_of_a_reward_model_are_looked_at_too(make, tmp_path):
    settings = TAUGHT | {"objective": {"loss": "bradley_terry"}}
    with pytest.raises(RunError, match="prompt p6: .*made for at most 512"):
        check(make({6: {"chosen": "x" * 600}}, **settings, training__row_length=1024))
    heldout = [{"prompt": "Hm.", "chosen": "y" * 600, "rejected": "No."}]
    (tmp_path / "heldout.jsonl").write_text(json.dumps(heldout[0]) + "\n")
    settings |= {"data__heldout": str(tmp_path / "heldout.jsonl"), "training__row_length": 1024}
    with pytest.raises(RunError, match="prompt [0-9a-f]{16}: .*1 of 9 prompts"):
        check(make(**settings))


# Scores of the data, as CSV keeps them: text.

SCORED = TAUGHT | {
    "objective": {"loss": "bradley_terry", "margin": 1.0},
    "data__chosen_score": "good", "data__rejected_score": "bad",
}  # fmt: skip


def test_scores_in_csv_reach_the_margins(make, tmp_path):
    run = make(**SCORED, data__train=str(tmp_path / "x.csv"))
    (tmp_path / "x.csv").write_text(
        "prompt_id,prompt,chosen,rejected,good,bad\n"
        + "".join(f"p{i},Say {i}.,Yes.,No.,{i}.5, 1e-1\n" for i in range(8))
    )
    check(run)
    prompt = run.prompts(2)[0]
    assert prompt.id == "p4" and prompt.row == {"good": 4.5, "bad": 0.1}
    texts = {"chosen": "Yes.", "rejected": "No."}
    scores = {"chosen": prompt.row["good"], "rejected": prompt.row["bad"]}
    assert rated_example(run.chat, run.programs.config.head, prompt, texts, scores).scores == (
        4.5,
        0.1,
    )


@pytest.mark.parametrize("value", [None, "high", True, "nan", [1]])
def test_a_score_that_is_no_number_is_a_bad_row(make, value):
    changed = {i: {"good": 1, "bad": "0"} for i in range(8)}
    changed[5] = {"good": value, "bad": 0}
    with pytest.raises(DataError, match=r"row 6 \(line 6\), column 'good': no number"):
        check(make(changed, **SCORED))
    run = make(changed, **SCORED, data__on_bad_row="drop")
    assert run.data.all_prompts.dropped == {"no number": (6,)}


# The columns that a ranker reads.


def test_rows_that_the_ranker_cannot_use_are_found_at_the_start(make):
    pytest.importorskip("if_verifiable")
    columns = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    changed = {i: columns for i in range(8)}
    check(make(changed, feedback__ranker="verifiable"))
    changed[7] = {"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}
    with pytest.raises(FeedbackError, match="prompt 'p7': .*did you mean 'punctuation:no_comma'"):
        check(make(changed, feedback__ranker="verifiable"))


# Prompts enough for one update.


def test_too_few_prompts_for_one_batch_are_found_before_any_work(make):
    said = "iteration 1 has 4 usable prompts, .* fewer than one batch .* = 5.*Set .* to 4 or less"
    with pytest.raises(RunError, match=said):
        check(make(training__global_batch=5))
    run = make(training__global_batch=5)
    preview(run, 1, 0)
    assert "selm run will stop here:" in told(run) and "fewer than one batch" in told(run)


def test_only_the_prompts_that_are_left_count(make):
    """A row that is dropped gives no pair, and neither does one beyond the limit."""
    bad = {6: {"chosen": ""}}
    check(make(bad, data__on_bad_row="drop", training__global_batch=3))
    with pytest.raises(RunError, match="iteration 2 has 3 usable prompts"):
        check(make(bad, data__on_bad_row="drop", training__global_batch=4))
    with pytest.raises(RunError, match="iteration 1 has 2 usable prompts"):
        check(make(data__limit=2, training__global_batch=3))


# What is said, on the command line.


def test_a_system_column_is_used_and_told_of(make):
    changed = {i: {"system": "Answer in French."} for i in range(6)}
    for say in (lambda run: check(run), lambda run: preview(run, 1, 1)):
        run = make(changed)
        say(run)
        assert "the column 'system' gives 6 of 8 prompts their system message" in told(run)
        assert run.prompts(1)[0].messages[0].content == "Answer in French."
        run = make(changed, data__system="Be brief.")
        say(run)
        assert "the column 'system' is not read" in told(run)
        (first, _) = run.prompts(1)[0].messages
        assert first.content == "Be brief."


def test_a_template_without_system_messages_names_the_column(make, model, tmp_path):
    strict = shutil.copytree(model, tmp_path / "strict")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(refuses + tiny.TEMPLATE)
    changed, settings = {3: {"system": "Be brief."}}, {"model__source": str(strict)}
    with pytest.raises(RunError, match="prompt p3: .*No system.*data.system_column to null"):
        check(make(changed, **settings))
    check(make(changed, **settings, data__system_column=None))


SURROGATES = {"prompt": "Half an emoji \ud83d here", "chosen": "Yes \udc00.", "note": ["\ud83d"]}


@pytest.mark.parametrize("column", SURROGATES)
@pytest.mark.parametrize("verb", ["run", "preview", "generate"])
def test_half_a_surrogate_pair_gives_a_message_without_traceback(
    make, capsys, monkeypatch, column, verb
):
    run = make({6: {column: SURROGATES[column]}})
    file = run.folder.path.parent / "experiment.yaml"
    more = ["-t", "1"] if verb == "generate" else []
    monkeypatch.setattr(sys, "argv", ["selm", verb, str(file), *more])
    with pytest.raises(SystemExit):
        cli.main()
    message = capsys.readouterr().err
    assert f"train.jsonl, row 7 (line 7), column '{column}': lone surrogate" in message
    assert "Traceback" not in message
    assert not [p for p in run.folder.path.rglob("*") if p.is_file() and p.name[0] != "."]


def test_or_half_a_surrogate_pair_is_dropped_and_counted_as_a_bad_row(make):
    changed = {i: {column: SURROGATES[column]} for i, column in enumerate(SURROGATES)}
    run = make(changed, data__on_bad_row="drop")
    check(run)
    assert "train.jsonl: rows left out, lone surrogate: 3" in told(run)
    assert [p.id for p in run.data.all_prompts] == ["p3", "p4", "p5", "p6", "p7"]


# Held-out prompts that are trained on.


def test_prompts_of_the_training_data_are_not_held_out(make, tmp_path):
    file = str(tmp_path / "train.jsonl")
    for name in (file, f"{tmp_path}/./train.jsonl"):
        with pytest.raises(RunError, match="is data.train, and 8 of 8 held-out .* first is p0"):
            check(make(data__heldout=name))
    run = make(data__heldout=file)
    preview(run, 1, 0)
    assert "selm run will stop here: data.heldout:" in told(run)
    # The rows in front, which no portion is cut from, are others.
    front = {"data__heldout": file, "data__heldout_limit": 3}
    run = make(**front, data__skip=3)
    check(run)
    assert "trained on too" not in told(run)
    with pytest.raises(RunError, match="1 of 3 held-out prompts are trained on too .* is p2"):
        check(make(**front, data__skip=2))


def test_prompts_that_are_trained_on_too_are_counted(make, tmp_path):
    system = {"role": "system", "content": "Be brief."}
    prompts = [
        "Say 3.", " Say\n4. ", "Say 3", "say 3.", [system, {"role": "user", "content": "Say 5."}],
        [{"role": "user", "content": "Say 6."}, {"role": "assistant", "content": "6"},
         {"role": "user", "content": "Say 6."}],
    ]  # fmt: skip
    rows = [{"prompt_id": f"h{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for say in (lambda run: check(run), lambda run: preview(run, 1, 0)):
        run = make(data__heldout=str(tmp_path / "heldout.jsonl"), rollout__max_prompt_tokens=100)
        say(run)
        assert "3 of 6 held-out prompts are trained on too (the first is h0)" in told(run)


def test_no_text_is_rendered_twice(make, monkeypatch):
    """Checking a large data set takes minutes, so each of a pair's 3 texts is rendered once."""
    run = make()
    _ = run.chat  # which tries a made-up question
    rendered = []
    render = Template.render

    def counted(self, messages, answer_follows):
        rendered.append((json.dumps(messages), answer_follows))
        return render(self, messages, answer_follows)

    monkeypatch.setattr(Template, "render", counted)
    _ = run.data.own_answers
    rendered.clear()
    check_rows(run)
    of_rows = [each for each in rendered if '"Yes."' not in each[0] and each[1]]
    assert len(of_rows) <= 8 + 1  # the layout is tried once more
    assert len(rendered) <= 3 * 8 + 2
