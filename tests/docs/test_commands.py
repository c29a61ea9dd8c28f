"""Every command of the pages is one that the program takes.

A command of `selm` is read by the command line's own parser, and the settings that it changes by
the reader of experiments. Nothing is started here: `test_running.py` runs all commands, except for
those that need what no test has, such as a network, people or hours. They are listed below.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import pages
import pytest
import typer

from selm_jax import config
from selm_jax.cli import app

ROOT = pages.ROOT
COMMANDS = list(dict.fromkeys(pages.commands()))
OURS = [command for command in COMMANDS if command.words()[:1] == ["selm"]]
TYPED = [command for command in OURS if not command.is_form]
FORMS = [command for command in [*OURS, *pages.mentions()] if command.is_form]
FORMS += [command for command in pages.mentions() if not command.is_form]
OTHERS = [command for command in COMMANDS if command not in OURS]

# What a command needs that no test has, by what it begins with. These are read and not run.
NEEDS = {
    "selm eval lm_eval": "the network: tasks' data from the Hub",
    "selm eval alpaca_eval": "a judge, and files that are not ours to ship",
    "selm eval mt_bench": "a judge, and files that are not ours to ship",
    "selm run experiments/paper": "accelerators, and hours",
    "selm report runs/paper": "the runs of the line before",
    "selm sweep experiments/ablations": "accelerators, and hours",
    "selm sweep experiments/study": "two hours",
    "selm sweep experiments/middle": "an hour",
    "selm sweep experiments/needle": "half an hour",
    "selm plan": "libtpu, and minutes for each program; tests/plan has smaller ones",
    "selm bench": "a quiet machine; tests/bench has a smaller one",
    "selm show gs://": "a bucket; tests/resume/test_bucket.py has one",
    "selm run experiments/quickstart.yaml output=gs://": "a bucket, as above",
    "selm run my.yaml": "the reader's experiment",
    "selm sweep idea.yaml": "the reader's experiment",
    "selm annotate": "people; tests/annotate has a browser",
    "selm run experiments/quickstart.yaml feedback={ranker: human}": "people",
    "selm eval winrate runs/quickstart runs/dpo -o evaluations/pairrm": "the weights of PairRM",
    "selm eval winrate a=a.jsonl b=b.jsonl": "a judge",
}
# Where a command is run that `test_running.py`, which runs all others as they stand, cannot run.
RUN = {
    "selm run experiments/reward_model.yaml": "tests/run/test_reward_model.py",
    "selm run experiments/middle": "tests/experiments/test_middle.py",
    "selm run experiments/quickstart.yaml output=runs/asked": "tests/feedback/models",
}


def root() -> click.Group:
    found = typer.main.get_command(app)
    assert hasattr(found, "commands")
    return found


def verb_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The verb that the words name, and what is left of them."""
    command, rest = root(), words[1:]
    while hasattr(command, "commands"):
        names = command.commands
        assert rest and rest[0] in names, f"no verb {rest[:1]}; there are {', '.join(names)}"
        command, rest = names[rest[0]], rest[1:]
    return command, rest


def ids(command: pages.Command) -> str:
    return f"{command.page}: {command.text[:60]}"


@pytest.mark.parametrize("command", TYPED, ids=ids)
def test_the_command_line_takes_it(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing there is in the way of what an option would write
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("selm_jax.shell.mirror._mirrors", {})
    verb, rest = verb_of(command.words())
    verb.make_context(verb.name, rest)


@pytest.mark.parametrize("command", FORMS, ids=ids)
def test_its_verb_and_its_options_exist(command):
    words = command.text.split()
    for name in words[1].split("|") if len(words) > 1 else ():
        if name.isupper() or name.startswith(("[", "-")):
            continue
        group = root().commands.get(name)
        assert group is not None, f"no verb {name}"
        inner = words[2] if len(words) > 2 else ""
        if hasattr(group, "commands") and re.fullmatch(r"[a-z_]+", inner):
            assert inner in group.commands, f"no verb {name} {inner}"
            group = group.commands[inner]
        if hasattr(group, "commands"):
            continue
        known = {option for p in group.params for option in (*p.opts, *p.secondary_opts)}
        asked = set(re.findall(r"(?<!\S)\[?(--?[a-z][\w-]*)", command.text))
        assert asked <= known | {"--help", "-h"}, asked - known


@pytest.mark.parametrize(
    "command", [c for c in TYPED if re.search(r"selm (run|preview|plan|sweep) ", c.text)], ids=ids
)
def test_its_settings_exist(command):
    """This is checked where the experiment is one of the repository's."""
    verb, rest = verb_of(command.words())
    given = verb.make_context(verb.name, list(rest)).params
    file = Path(given.get("experiment") or given.get("file"))
    overrides = list(given.get("overrides") or ())
    if command.words()[1] == "sweep" or not (ROOT / file).exists():
        assert not str(file).startswith("experiments/") or (ROOT / file).exists()
        pytest.skip("a sweep, or an experiment of the reader's")
    config.load(ROOT / file, overrides)


@pytest.mark.parametrize("command", OTHERS, ids=ids)
def test_what_it_names_exists(command):
    words = command.words()
    for word in words[1:]:
        if re.match(r"(tests|benchmarks|docs|experiments)/", word):
            assert (ROOT / word.split("::")[0]).exists(), word
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for extras in re.findall(r"\[([a-z,-]+)\]", command.text):
        if words[0] == "pip":
            known = project["project"]["optional-dependencies"]
            assert set(extras.split(",")) <= set(known)
    if words[0] == "pytest" and "-m" in words:
        marks = project["tool"]["pytest"]["ini_options"]["markers"]
        assert words[words.index("-m") + 1] in {mark.split(":")[0] for mark in marks}


def test_where_commands_are_run_exists():
    assert all((ROOT / file).exists() for file in RUN.values())


def test_nothing_is_said_of_commands_that_stand_nowhere():
    words = [" ".join(command.words()) for command in OURS]
    for start in {**NEEDS, **RUN}:
        assert any(line.startswith(start) for line in words), start
