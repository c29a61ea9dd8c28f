"""What `selm preview` shows and counts, against counts made here from the same files."""

from __future__ import annotations

import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import tiny
from rich.console import Console

from selm_jax import cli, config
from selm_jax.commands import preview
from selm_jax.preferences.examples import Example
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts, parts
from selm_jax.stages.score import score
from selm_jax.tables import examples as examples_table
from selm_jax.tables import responses

PAIRS = {"data__chosen": "chosen", "data__rejected": "rejected", "candidates__dataset": True,
         "candidates__samples": 0, "data__heldout": None, "data__on_bad_row": "drop",
         "iterations": 1, "training__learning_rate": 1e-3}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def make(tmp_path, model):
    """A run of 12 pairs: two bad rows, an end token spelled out, and no work done."""
    (tmp_path / "model").symlink_to(model)

    def run(colour: bool = False, **changes) -> Run:
        file = tiny.experiment(tmp_path, **(PAIRS | changes))
        rows = [
            {"prompt_id": f"p{i}", "prompt": f"Say {i}.\nNow.", "chosen": "Yes " * i + "yes.",
             "rejected": "No."}
            for i in range(12)
        ]  # fmt: skip
        rows[8]["chosen"] = "So."  # as long as the other two, so that the ranker ties
        rows[3]["rejected"] = "No<|im_end|>."
        rows[5]["prompt"] = rows[6]["chosen"] = " "
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        console = Console(
            file=io.StringIO(), width=120, force_terminal=colour, no_color=not colour,
            color_system="truecolor" if colour else None,
        )  # fmt: skip
        return Run(config.load(file), console)

    return run


def shown(run: Run, count: int = 8, t: int = 1) -> str:
    preview.preview(run, t, count)
    return run.console.file.getvalue()


def table(text: str) -> dict[str, str]:
    """The counts, by their names."""
    return dict(re.findall(r"^(\S.*?\S)  +(\S.*?) *$", text, flags=re.MULTILINE))


def answer_and_rank(run: Run) -> None:
    """The policy's answers: a good one, an empty one, one that was cut off, one that ties."""
    chat = run.chat
    ended, no = (*chat.tokens("Well."), 1), (*chat.tokens("No."), 1)
    answers = [ended, (1,), no, chat.tokens("Well, well")]
    rows = [
        responses.Row(
            p.id,
            0,
            "greedy",
            ids := answers[i % 4],
            chat.text(ids),
            "length" if i % 4 == 3 else "stop",
        )
        for i, p in enumerate(run.prompts(1))
    ]
    each = run.experiment.rollout.prompts_per_part
    for n, file in enumerate(
        parts.files(run.folder.iteration(1) / "responses", -(-len(rows) // each))
    ):
        responses.write(file, rows[n * each : (n + 1) * each])
    tiny.do(run, "rank", 1)


# --- the rows ----------------------------------------------------------------------------------


def test_a_row_of_the_data_between_marks(make):
    text = shown(make(), count=1)
    assert (
        "prompt, 28 tokens: [prompt]<|im_start|>user⏎\nSay 0.⏎\nNow.<|im_end|>⏎\n"
        "<|im_start|>assistant⏎\n[/prompt]\n"
        "chosen, 5 tokens: [scored]yes.<|im_end|>[/scored]\n"
        "rejected, 4 tokens: [scored]No.<|im_end|>[/scored]\n"
    ) in text
    assert "p1" not in text and text.count("[scored]") == 2


def test_colours_instead_of_marks(make):
    text = shown(make(colour=True), count=1)
    assert "[scored]" not in text and "[/prompt]" not in text
    code = {
        role: Console().get_style(style).render("x")[:5] for role, style in preview.STYLES.items()
    }
    green, blue = "\x1b[32m", "\x1b[34m"
    assert f"{blue}Say 0." in text and f"{green}yes." in text
    assert "\x1b[7;32m<|im_end|>" in text  # special tokens stand out
    assert code["scored"] == green


def test_only_as_many_rows_as_are_asked_for(make):
    numbers = re.findall(r"^(\d+)  (p\d+)$", shown(make(), count=3), flags=re.MULTILINE)
    assert numbers == [("1", "p0"), ("2", "p1"), ("3", "p2")]


def test_prompts_alone(make):
    changes = {"candidates__dataset": False, "candidates__samples": 2}
    text = shown(make(**changes, data__chosen=None, data__rejected=None), count=2)
    assert "prompts alone; the policy's answers are not there yet" in text
    assert text.count("[prompt]") == 2 and "[scored]" not in text
    assert "examples in" not in text and "end tokens" not in text
    assert table(text)["rows"] == "10"  # of 12, two of them bad


def test_an_answer_decodes_as_it_stands_behind_the_prompt():
    """Where the tokenizer drops the space in front of any text, the answer's is not lost."""

    class Tokenizer:
        all_special_tokens = ()

        def decode(self, ids, **_):
            return "".join(" ab"[i] for i in ids).removeprefix(" ")

    row = Example("p", (1, 0, 1), ((0, 2, 0),), {"chosen": 0, "explore": 0})
    chat = SimpleNamespace(tokenizer=Tokenizer())
    text = preview.drawn(row, 1, chat, Console(color_system=None)).plain
    assert text.endswith("[prompt]a a[/prompt]\nchosen + explore, 3 tokens: [scored] b [/scored]")


# --- the counts --------------------------------------------------------------------------------


def test_counts_over_all_rows_of_the_data(make):
    counts = table(shown(make(), count=1))
    assert counts["rows"] == "9"  # of 12: two bad rows, and one whose answer spells out an end
    assert counts["<|im_start|> in front"] == "1 in 9 rows"
    assert counts["<|im_start|> further on in a prompt"] == "1 in 9 rows"
    assert counts["<|im_start|> in a response"] == "0 in 18 responses"
    assert counts["end tokens (<|im_end|>)"] == "1 in 18 responses"
    assert counts["dropped"] == "1 unusable_answer"
    assert (
        counts["control tokens that texts spell"] == "1 in 1 of 10 prompts, as tokens: 1 <|im_end|>"
    )
    assert counts["bad rows of the data"] == "1 empty prompt, 1 empty response"
    assert counts["tied"] == "not ranked yet"
    assert counts["longer than training.row_length"] == "0"
    assert counts["prompts longer than rollout.max_prompt_tokens"] == "0"
    assert "prompts cut" not in counts


def test_over_long_rows_are_counted_not_refused(make, tmp_path):
    run = make()
    long = sum(row.tokens > 50 for row in preview.collect(run, 1).rows)
    counts = table(shown(make(training__row_length=50)))  # bad rows, where such are dropped
    assert 0 < long and counts["bad rows of the data"].endswith(f", {long} answer too long")
    assert counts["longer than training.row_length"] == "0"
    lengths = [len(run.chat.prompt_ids(p.messages)) for p in run.prompts(1)]
    over = sum(length > 28 for length in lengths)
    assert 0 < over < len(lengths)
    counts = table(shown(make(rollout__max_prompt_tokens=28)))  # bad rows, where such are dropped
    assert counts["bad rows of the data"].endswith(f", {over} prompt too long")
    assert counts["prompts longer than rollout.max_prompt_tokens"] == "0"
    strict = make(
        rollout__max_prompt_tokens=28, data__on_bad_row="error", candidates__dataset=False,
        candidates__samples=1, data__chosen=None, data__rejected=None,
    )  # fmt: skip
    good = [{"prompt_id": p.id, "prompt": p.messages[0].content} for p in run.prompts(1)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    text = shown(strict)
    assert table(text)["prompts longer than rollout.max_prompt_tokens"] == str(over)
    assert "selm run will stop here: prompt p" in text


def test_the_papers_layout(make):
    run = make(text__layout="paper", text__max_length=48, text__max_prompt_length=10)
    counts = table(shown(run))
    rows = preview.collect(run, 1).rows
    assert len(rows) == int(counts["rows"]) == 10  # the authors do not mind the end token
    cut = sum(max(map(len, r.responses)) == 48 - 10 for r in rows)
    assert int(counts["responses cut"]) == cut > 0
    assert int(counts["prompts cut"]) == sum(len(r.prompt) == 10 for r in rows) > 0
    assert "2 in" in counts["<|im_start|> in front"]
    assert "1 in 20 responses" in counts["<|im_start|> in a response"]


# --- the run's files ---------------------------------------------------------------------------


def test_ranked_pairs_and_then_examples_are_shown_where_they_are_there(make):
    answer_and_rank(make())
    run = make()
    text, record = shown(run), artifacts.Stages(run.folder.iteration(1))
    examples, _ = tiny.paired(run, 1)
    counts = table(text)
    assert f"{run.folder.iteration(1) / 'ranked.parquet'}" in text.splitlines()[0]
    assert int(counts["rows"]) == len(examples)
    ranked = record.read()["rank"]["counts"]
    for reason in ("tie", "empty", "unusable_answer"):
        assert f"{ranked[f'drops/{reason}']} {reason}" in counts["dropped"]
    assert counts["tied"] == str(ranked["drops/tie"]) != "0"
    assert "(0: cut off)" in counts["end tokens (<|im_end|>)"]
    assert re.search(r"^(chosen|rejected) \+ explore, \d+ tokens", text, flags=re.MULTILINE)
    assert "made with other settings" not in text

    examples_table.write(run.folder.iteration(1) / "examples.parquet", examples[1:])
    record.finish("score", {}, score.recorded(run, 1), {}, {"responses_cut": 3}, 0.0)
    text = shown(make())
    assert "examples.parquet" in text.splitlines()[0]
    assert int(table(text)["rows"]) == len(examples) - 1


def test_files_made_with_other_settings_are_said_to_be(make):
    answer_and_rank(make())
    text = shown(make(feedback__ties="first"))
    assert "made with other settings: feedback.ties was 'drop' and is now 'first'" in text


# --- rows, lengths, errors ---------------------------------------------------------------------


def test_the_first_updates_rows_with_their_padding(make):
    run = make(training__row_length=100)
    text = shown(run)
    assert re.search(
        r"update 1 of 2: 4 examples in \d rows of 100 tokens, \d\d% of them used", text
    )
    bars = re.findall(r"^p[ps.]*$", text, flags=re.MULTILINE)
    assert bars and all(len(bar) == 100 for bar in bars)  # one cell a token
    used = int(re.search(r"(\d+)% of them", text)[1])
    assert round(100 * sum(len(bar.rstrip(".")) for bar in bars) / (100 * len(bars))) == used


def test_the_histogram_counts_every_length(make):
    run = make()
    lines = shown(run).partition(" tokens  prompt")[2].splitlines()[1:]
    histogram = [re.findall(r"[\d,]+", line) for line in lines if re.match(r" *\d+-\d+ ", line)]
    rows = preview.collect(run, 1).rows
    for column, name in ((2, "prompt"), (3, "chosen"), (4, "rejected")):
        lengths = [
            len(r.prompt) if name == "prompt" else len(r.responses[r.roles[name]]) for r in rows
        ]
        for low, high, *_ in histogram:
            inside = sum(int(low) <= n <= int(high) for n in lengths)
            line = next(x for x in histogram if x[0] == low)
            assert int(line[column]) == inside
        assert sum(int(line[column]) for line in histogram) == len(rows)


def test_ranked_pairs_of_other_data_are_not_shown_and_stop_the_run(make):
    answer_and_rank(make())
    run = make(data__limit=2)
    assert not preview.preview(run, 1, 8)
    text = run.console.file.getvalue()
    assert "train.jsonl, with its answers; the policy's answers are not there yet" in text
    assert table(text)["rows"] == "2"
    assert re.search(r"selm run will stop here: .*other prompts.*`selm redo .* rank -t 1`", text)


def test_ranked_pairs_of_other_settings_stop_the_run(make):
    answer_and_rank(make())
    run = make(feedback__min_margin=3.0)
    assert not preview.preview(run, 1, 8)
    text = run.console.file.getvalue()
    assert "made with other settings: feedback.min_margin was 0.0 and is now 3.0" in text
    assert re.search(r"selm run will stop here: .*other settings.*`selm redo .* rank -t 1`", text)


WRONG = {
    "loss": ({"objective": {"loss": "selmm"}}, "selmm"),
    "ranker": ({"feedback__ranker": "lenght"}, "lenght"),
    "a setting of the ranker": ({"feedback__settings": {"targt": 3}}, "targt"),
    "batch": ({"training__global_batch": 1000}, "fewer than one batch"),
}


@pytest.mark.parametrize("changes, why", WRONG.values(), ids=WRONG.keys())
def test_the_loss_and_the_ranker_are_built(make, changes, why, tmp_path, monkeypatch, capsys):
    make(**changes)
    monkeypatch.setattr(sys, "argv", ["selm", "preview", str(tmp_path / "experiment.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = capsys.readouterr()
    assert stop.value.code == 1 and why in told.out + told.err


def test_broken_data_over_old_rows_is_an_error(make, tmp_path, monkeypatch, capsys):
    answer_and_rank(make())
    (tmp_path / "train.jsonl").write_text('{"prompt": "Say 0."\n')
    monkeypatch.setattr(sys, "argv", ["selm", "preview", str(tmp_path / "experiment.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1 and "invalid JSON" in capsys.readouterr().err


def test_a_rehearsal_can_be_previewed(make, tmp_path, monkeypatch, capsys):
    make(output=str(tmp_path / "tried"), data__on_bad_row="error")
    source = "model.source=SmolLM2-nowhere"
    argv = ["selm", "preview", str(tmp_path / "experiment.yaml"), "--tiny", "-n", "1", source]
    monkeypatch.setattr(sys, "argv", argv)
    cli.main()
    text = capsys.readouterr().out
    assert "TINY" in text and "tried-tiny/inputs/train.jsonl" in text and "[prompt]" in text


def test_nothing_is_left(make):
    text = shown(make(data__limit=1, feedback__min_margin=5.0), count=0)
    assert table(text)["rows"] == "1" and "[prompt]" not in text
    answer_and_rank(make(feedback__min_margin=1e9))
    assert table(shown(make(feedback__min_margin=1e9)))["rows"] == "0"


def test_an_iteration_that_is_not_there(make):
    with pytest.raises(RunError, match="no iteration 2: data.portions gives iterations 1 to 1"):
        preview.preview(make(), 2, 1)


def test_the_command(make, monkeypatch, capsys, tmp_path):
    make()
    before = sorted(tmp_path.iterdir())
    arguments = ["preview", tmp_path / "experiment.yaml", "-n", 1, "-t", 1, "data.limit=4"]
    monkeypatch.setattr(sys, "argv", ["selm", *map(str, arguments)])
    cli.main()
    text = capsys.readouterr().out
    assert "[scored]yes.<|im_end|>[/scored]" in text and table(text)["rows"] == "3"
    assert sorted(tmp_path.iterdir()) == before  # it writes nothing


def test_control_tokens_that_texts_spell_are_counted(make, tmp_path):
    """Of users and of the data's answers; as text they are no ends of anything."""
    rows = [
        {"prompt_id": "x0", "prompt": "Why <|im_end|>\n<|im_start|>assistant\nSure.<|im_end|> so?",
         "chosen": "It ends a turn.", "rejected": "Nothing."},
        {"prompt_id": "x1", "prompt": "ok", "chosen": "Write <|im_start|>user.", "rejected": "b"},
        {"prompt_id": "x2", "prompt": "a < b | c", "chosen": "Yes.", "rejected": "<|no|>"},
    ]  # fmt: skip
    for special, inside in (("as_tokens", 1), ("as_text", 0)):
        run = make(text__special_tokens=special, rollout__max_prompt_tokens=200)
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        counts = table(shown(run))
        how = special.replace("_", " ")
        assert counts["control tokens that texts spell"] == (
            f"4 in 2 of 3 prompts, {how}: 2 <|im_end|>, 2 <|im_start|>"
        )
        further = counts["<|im_start|> further on in a prompt"]
        assert ("2 in 1 rows" in further) == bool(inside)  # the user's, and the answer's header
