"""The command line: its verbs, their help, and what every one of them accepts."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from selm_jax import __version__
from selm_jax.cli import app
from selm_jax.config.reference import reference, sections

VERBS = {
    "": ["run", "generate", "rank", "score", "train", "measure", "export", "redo", "sweep",
         "preview", "show", "settings", "report", "figures", "annotate", "plan", "bench"],
    "lab": [
        *("regret", "map", "conditions", "why", "idea", "theory", "decoder", "compare", "acquire"),
    ],
    "eval": ["heldout", "winrate", "alpaca_eval", "lm_eval", "mt_bench"],
}  # fmt: skip
EVERY = [[*group.split(), verb] for group, verbs in VERBS.items() for verb in verbs]


def told(*arguments: str, width: int = 100) -> str:
    """What the program says; its exit status is 0."""
    found = CliRunner(env={"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)}).invoke(
        app, list(arguments), catch_exceptions=False, terminal_width=width
    )
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture
def ran(monkeypatch):
    """The stages that verbs have run."""
    seen = []
    monkeypatch.setattr("selm_jax.commands.runs.opened", lambda *_, **__: None)
    monkeypatch.setattr("selm_jax.iterate.run_stage", lambda _, name, t: seen.append((name, t)))
    return seen


@pytest.mark.parametrize(
    ("verb", "stage"),
    [
        ("generate", "generate"), ("rank", "rank"), ("score", "score"), ("train", "train"),
        ("measure", "evaluate"), ("evaluate", "evaluate"),
    ],
)  # fmt: skip
def test_a_verb_runs_its_stage(ran, verb, stage):
    told = CliRunner().invoke(app, [verb, "some.yaml", "-t", "3"], catch_exceptions=False)
    assert told.exit_code == 0 and ran == [(stage, 3)]
    assert ("`selm measure`" in told.stderr) == (verb == "evaluate")


def listed(text: str) -> list[str]:
    """The verbs of a list of commands."""
    return [line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line.strip()]


@pytest.mark.parametrize("group", VERBS)
def test_every_verb_is_listed_in_a_whole_sentence(group):
    """Also at 60 columns; the old name of `measure` is not shown."""
    text = told(*group.split(), "-h", width=60)
    assert set(listed(text)) == set(VERBS[group]) | ({"lab", "eval"} if not group else set())
    assert "..." not in text.partition("Commands:")[2]


@pytest.mark.parametrize("verb", EVERY, ids=" ".join)
def test_every_verb_says_what_it_needs_and_writes_with_an_example(verb):
    text = told(*verb, "-h")
    assert "Needs: " in text and "Writes: " in text and f"selm {' '.join(verb)}" in text
    assert told(*verb, "--help") == text
    for switch in ("-q, --quiet", "-v, --verbose"):
        assert switch in text


@pytest.mark.parametrize("verb", EVERY, ids=" ".join)
def test_every_option_shows_its_default(verb):
    options = told(*verb, "-h").partition("\nOptions:\n")[2]
    for each in re.split(r"\n(?=  -)", options):
        flags = each.split("  ")[1]
        takes_a_value = "<" in flags or "FILE" in flags or "FOLDER" in flags
        words = " ".join(each.split())
        assert not takes_a_value or "[default: " in words or "[required]" in words, each


def test_square_brackets_arrive_on_the_terminal():
    assert "pip install 'selm_jax[tpu]'" in " ".join(told("plan", "-h").split())
    assert "pip install 'selm_jax[lm-eval]'" in " ".join(told("eval", "lm_eval", "-h").split())


def test_version():
    assert told("--version") == f"selm_jax {__version__}\n"


def test_completion_knows_the_verbs():
    found = CliRunner().invoke(
        app, [], prog_name="selm",
        env={"_SELM_COMPLETE": "complete_bash", "COMP_WORDS": "selm re", "COMP_CWORD": "1"},
    )  # fmt: skip
    assert set(found.output.split()) == {"report", "redo"}
    assert "--install-completion" in told("-h")


def test_settings_shows_the_reference():
    everything = told("settings")
    for section in sections():
        for setting in reference(section):
            assert f"\n{setting.key}: " in everything
    training = told("settings", "training", width=60)
    assert "training.rows: auto" in training and "rollout" not in training.split("\n")[0]
    assert max(map(len, training.splitlines())) <= 60
    assert told("settings", "training.rows").count(": ") == 1
    wrong = CliRunner().invoke(app, ["settings", "trainig"])
    assert "did you mean 'training'" in str(wrong.exception)
