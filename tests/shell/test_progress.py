"""The terminal shows texts literally, even where rich would read them as markup."""

import ast
import io
import re
from pathlib import Path

import pytest
import tiny
from rich.table import Table

import selm_jax
from selm_jax import config
from selm_jax.run.check import check
from selm_jax.run.run import Run
from selm_jax.shell.progress import bar, terminal

ODD = [
    "runs/a[1]/x",
    "data [/data] [bold red]x",
    "[/]",
    ":smile: and :warning:",
    "[link=x]y",
    "\\[z]",
]
MODULES = sorted(Path(selm_jax.__file__).parent.rglob("*.py"))


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, so that there are bars
    monkeypatch.setenv("COLUMNS", "200")

    def of(say) -> str:
        console = terminal()
        console.file = io.StringIO()
        say(console)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # no colours

    return of


def table(console, text):
    found = Table(title=text)
    found.add_column(text)
    found.add_row(text)
    console.print(found)


def working(console, text):
    with bar(console, text, 3, text) as advance:
        advance(1, 5)


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize(
    ("say", "times"),
    [
        (lambda console, text: console.print(text, style="red", highlight=False), 1),
        (lambda console, text: console.rule(text), 1),
        (table, 3),
        (working, 2),
    ],
    ids=["print", "rule", "table", "bar"],
)
def test_every_text_is_literal(shown, say, times, text):
    assert shown(lambda console: say(console, text)).count(text) >= times


def test_nobody_makes_another_terminal():
    """A console or a text column made elsewhere would read text in brackets as styles."""
    made = {}
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if node.func.id in ("Console", "TextColumn") and options.get("markup") is not False:
                    made[file.name] = node.lineno
    assert len(MODULES) > 100 and made == {}


def test_names_of_data_are_shown_as_they_are(tmp_path, capsys):
    folder = tmp_path / "a[" / "b] :smile:"
    folder.mkdir(parents=True)
    file = tiny.experiment(tmp_path, data__train=str(folder / "train.jsonl"), iterations=1,
                           data__on_bad_row="drop", training__learning_rate=1e-3,
                           training__global_batch=1)  # fmt: skip
    (folder / "train.jsonl").write_text('{"prompt": "Say x."}\n{"prompt": ""}\n')
    check(Run(config.load(file)))
    assert f"{folder}/train.jsonl: rows left out, empty prompt: 1" in capsys.readouterr().out
