"""The terminal shows texts literally, even where rich would read them as markup."""

import ast
import io
import re
import time
from pathlib import Path

import jax
import pytest
import tiny
from rich.console import Console
from rich.table import Table

import selm_jax
from selm_jax import config
from selm_jax.run.check import check
from selm_jax.run.run import Run
from selm_jax.shell import compiling
from selm_jax.shell.progress import Talk, bar, terminal
from selm_jax.shell.words import duration

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


# --- bars ---------------------------------------------------------------------------------------


def drawn(width: int, after: float | None = None, items: int = 40) -> str:
    """The last state of a bar at work, without colours."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, markup=False, legacy_windows=False
    )
    with bar(console, "iteration 12  generate", 1000, "responses", after) as advance:
        for _ in range(4):
            advance(items // 4, 100 * items)
            time.sleep(0.02)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", console.file.getvalue())


@pytest.mark.parametrize("width", [60, 120])
def test_a_bar_fits_and_tells_the_time_left_of_the_run(width):
    text = drawn(width, after=7260)
    lines = [line for line in text.splitlines() if "generate" in line]
    assert lines and max(map(len, lines)) <= width
    words = " ".join(text.split())
    assert re.search(r"\d+ s left, run 2 h 1 min", words)
    assert ("tokens/s" in words) == (width == 120) and "40/1000" in words


def test_a_bar_says_that_a_program_is_compiled(monkeypatch):
    monkeypatch.setattr(compiling, "seconds", lambda: 12.3)
    assert "compiling, 12 s" in drawn(60)
    monkeypatch.setattr(compiling, "seconds", lambda: 0.1)  # not worth a word
    assert "compiling" not in drawn(60)


def test_quiet_shows_no_bar(monkeypatch):
    monkeypatch.setattr("selm_jax.shell.progress._talk", Talk(quiet=True))
    assert drawn(120) == ""


def test_jax_says_when_it_compiles(tmp_path, monkeypatch):
    """The events that are listened to are those that JAX sends."""
    seen, said = [], []
    compiling.watch(said.append)
    monkeypatch.setattr(compiling, "_LONG", 0.0)
    begin = jax.monitoring.register_event_listener
    begin(
        lambda event, **_: seen.append(compiling.seconds()) if event == compiling._BEGINS else None
    )
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        jax.jit(lambda x: x * 2 + 0.125)(jax.numpy.ones(17)).block_until_ready()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert seen and all(each is not None for each in seen)
    assert compiling.seconds() is None and any("compiled" in each for each in said)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (3599, "1 h 0 min"), (7260, "2 h 1 min"),
     (180_000, "2 days 2 h")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
