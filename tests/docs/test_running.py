"""The pages' commands run, word for word, where the pages' names stand for tiny things.

`reader` is that folder: `experiments/quickstart.yaml` names a tiny model there, and `runs/dpo` is a
copy of a tiny run. What takes longer than a few seconds is run by `pytest -m slow`; whole grids
of the laboratory by `pytest -m long`.
"""

from __future__ import annotations

import re
import shutil

import pages
import pytest
import tiny
from test_commands import NEEDS, RUN, TYPED, ids
from typer.testing import CliRunner

from selm_jax.cli import app

QUICK = ("selm report", "selm figures", "selm preview", "selm show")
# Whole grids of the laboratory, even with two seeds; tests/lab has smaller ones.
MINUTES = tuple(
    f"selm lab {verb}" for verb in ("theory", "conditions", "regret", "compare", "why", "decoder")
)
STANDS_FOR = {"start=HuggingFaceTB/SmolLM2-135M-Instruct": "start=my/start"}
FEWER = {"lab": ["--seeds", "2"]}  # for a verb, what makes it small; nothing else is added
ALSO = [pages.Command("README.md", "selm show runs/quickstart")]  # in the text, not in a block


def line(command: pages.Command) -> str:
    return " ".join(command.words())


def marked(command: pages.Command):
    quick = (
        line(command).startswith(QUICK) or line(command) == "selm run experiments/quickstart.yaml"
    )
    marks = [] if quick else [pytest.mark.slow]
    if line(command).startswith(MINUTES):
        marks.append(pytest.mark.long)
    return pytest.param(command, marks=marks, id=ids(command))


RUNNABLE = {line(c): c for c in [*TYPED, *ALSO] if not line(c).startswith((*NEEDS, *RUN))}


@pytest.mark.parametrize("command", [marked(c) for c in RUNNABLE.values()])
def test_it_runs_as_it_stands(command, reader, tmp_path, monkeypatch):
    folder = tmp_path / "reader"  # its own, as a command may write where another one reads
    shutil.copytree(reader, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    tiny.on_first_device(monkeypatch)
    made = re.findall(r"output=(\S+)", line(command))
    if "feedback=" in line(command) and not made:
        made = ["runs/quickstart"]
    for output in made:  # what it makes is not there yet
        shutil.rmtree(folder / output, ignore_errors=True)
    words = [STANDS_FOR.get(word, word) for word in command.words()][1:]
    told = CliRunner().invoke(app, [*words, *FEWER.get(words[0], [])])
    assert told.exit_code == 0, told.output
