"""No file that a person names is deleted: files replace files, and folders are ours or empty."""

from __future__ import annotations

import json
import os
import sys
import typing
from pathlib import Path

import pytest
import tiny
import typer
import yaml
from typer.models import ParameterInfo

from selm_jax import cli, config
from selm_jax.shell import artifacts, mirror, paths
from selm_jax.shell.lock import only_one
from selm_jax.shell.paths import PathError, claim


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by name."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture
def theirs(tmp_path):
    """A folder with somebody's work in it."""
    folder = tmp_path / "thesis"
    (folder / "chapters").mkdir(parents=True)
    (folder / "chapters" / "1.tex").write_text("years of work")
    (folder / "config.yaml").write_text("colour: blue\n")
    (folder / ".lock").write_text("held by another program\n")
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return tiny.experiment(tmp_path_factory.mktemp("base"))


def said(capsys, monkeypatch, *arguments) -> str:
    """The error message of a `selm` command that is refused: one message, no traceback."""
    monkeypatch.setattr(sys, "argv", ["selm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# --- the command line ---------------------------------------------------------------------------


def path_parameters(app: typer.Typer, name: str = "selm"):
    """The options and arguments of every verb that are paths, with what reads them."""
    for command in app.registered_commands:
        verb = f"{name} {command.name or command.callback.__name__.rstrip('_')}"
        hints = typing.get_type_hints(command.callback, include_extras=True)
        for argument, hint in hints.items():
            if Path in (kinds := _flat(hint)):
                (info,) = [kind for kind in kinds if isinstance(kind, ParameterInfo)]
                # In an annotation typer keeps the first name of an option as the default.
                names = (str(info.default), *(info.param_decls or ()))
                flag = next((n for n in names if n.startswith("--")), f"--{argument}")
                yield f"{verb} {flag}", info.parser
    for group in app.registered_groups:
        yield from path_parameters(group.typer_instance, f"{name} {group.name}")


def _flat(hint) -> list:
    """`Annotated[list[Path] | None, x]` as [Annotated, list, Path, None, x]."""
    return [hint, *(each for part in typing.get_args(hint) for each in _flat(part))]


PATHS = dict(path_parameters(cli.app))
FILES = [name for name, parser in PATHS.items() if parser is paths.file_to_write]
FOLDERS = [name for name, parser in PATHS.items() if parser is paths.folder_to_write]


def test_every_path_of_the_command_line_is_entered():
    """No path is a bare `Path`, which would not expand `~` and might replace anything."""
    parsers = {paths.place, paths.file_to_write, paths.folder_to_write, mirror.entered}
    assert set(PATHS.values()) == parsers
    assert {"selm report --out", "selm plan --json", "selm bench --json"} <= set(FILES)
    assert {"selm annotate --export", "selm eval mt_bench --cache"} <= set(FILES)
    assert {"selm figures --out", "selm export --to", "selm lab regret --out"} <= set(FOLDERS)
    assert {f"selm eval {x} --out" for x in ("heldout", "winrate", "lm_eval", "mt_bench")} <= set(
        FOLDERS
    )


@pytest.mark.parametrize("option", FILES)
def test_a_file_option_that_is_given_a_folder(option, theirs, capsys, monkeypatch):
    before = content(theirs)
    *verb, flag = option.split()[1:]
    message = said(capsys, monkeypatch, *verb, "experiment.yaml", f"{flag}={theirs}")
    assert str(theirs) in message and "is a folder" in message
    assert content(theirs) == before


@pytest.mark.parametrize("option", FOLDERS)
def test_a_folder_option_that_is_given_a_file(option, tmp_path, capsys, monkeypatch):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    *verb, flag = option.split()[1:]
    for path in (file, file / "below"):
        message = said(capsys, monkeypatch, *verb, "experiment.yaml", f"{flag}={path}")
        assert f"{file}" in message and "is a file" in message
    assert file.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_home_is_home_on_the_command_line_and_in_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for parser in set(PATHS.values()):
        assert parser("~/x") == tmp_path / "home" / "x"
        assert parser("a/~/x") == Path("a/~/x")
        with pytest.raises(PathError, match="~nobody-of-this-name/x: there is no user"):
            parser("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "manifest.json", "metrics.jsonl", "iteration_1/stage.json", ".lock",
     "iteration_1/model/config.json", "store/abc/entry.json", "run 1/config.yaml"],
)  # fmt: skip
def test_a_file_option_that_is_given_what_a_run_goes_on_from(name, tmp_path, capsys, monkeypatch):
    for folder in dict.fromkeys((tmp_path, (tmp_path / name).parent if " " in name else tmp_path)):
        claim(folder)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / name)
    for file in (tmp_path / name, tmp_path / "link"):
        message = said(capsys, monkeypatch, "report", "run", f"--out={file}")
        assert f"{file} belongs to a run and is not replaced" in message
    assert (tmp_path / name).read_text() == "{}"
    for free in ("report.html", "mine.json", "judge.sqlite"):
        (tmp_path / free).touch()
        assert paths.file_to_write(tmp_path / free) == tmp_path / free


# --- run folders --------------------------------------------------------------------------------


def test_home_is_home_in_an_experiment_and_a_sweep(experiment, tmp_path, monkeypatch):
    from selm_jax.sweep.grid import read_sweep

    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.load(experiment, ["output=~/x"]).output == str(tmp_path / "x")
    (tmp_path / "base.yaml").write_text(experiment.read_text())
    file = tmp_path / "sweep.yaml"
    grid = {"training.global_batch": [2, 4]}
    file.write_text(yaml.safe_dump({"output": "~/s", "base": "~/base.yaml", "grid": grid}))
    found = read_sweep(file)
    assert found.folder == tmp_path / "s"
    assert found.members[0].experiment.output.startswith(str(tmp_path / "s"))


@pytest.mark.parametrize("verb", ["run", "generate"])
def test_a_folder_that_is_not_a_runs(verb, experiment, theirs, capsys, monkeypatch):
    before = content(theirs)
    which = ["--iteration", "1"] if verb == "generate" else []
    message = said(capsys, monkeypatch, verb, experiment, *which, f"output={theirs}")
    assert f"{theirs} is not empty (.lock, chapters, config.yaml)" in message
    assert content(theirs) == before
    monkeypatch.chdir(theirs)
    assert "is not empty" in said(capsys, monkeypatch, verb, experiment, *which, "output=.")
    assert content(theirs) == before


def test_an_output_without_a_name(experiment, theirs, capsys, monkeypatch):
    monkeypatch.chdir(theirs)
    before = content(theirs)
    message = said(capsys, monkeypatch, "run", experiment, "output=")
    assert "output: " in message
    message = said(capsys, monkeypatch, "run", experiment, "output=''")
    assert "output: " in message and "the path is empty" in message
    assert content(theirs) == before


@pytest.mark.parametrize("tiny_too", [False, True])
def test_a_folder_that_is_not_a_sweeps(tiny_too, experiment, tmp_path, theirs, capsys, monkeypatch):
    file = tmp_path / "sweep.yaml"
    output = str(theirs)
    if tiny_too:
        theirs.rename(tmp_path / "thesis-tiny")
        theirs = tmp_path / "thesis-tiny"
    said_ = {"output": output, "base": str(experiment), "grid": {"seed_of": [1]}}
    said_["grid"] = {"training.global_batch": [2, 4]}
    file.write_text(yaml.safe_dump(said_))
    before = content(theirs)
    message = said(capsys, monkeypatch, "sweep", file, *(["--tiny"] if tiny_too else []))
    assert f"{theirs} is not empty" in message
    assert content(theirs) == before


def test_a_rehearsal_keeps_off_a_folder_that_is_not_its_own(
    experiment, theirs, capsys, monkeypatch, tmp_path
):
    theirs = theirs.rename(tmp_path / "thesis-tiny")
    before = content(theirs)
    message = said(
        capsys,
        monkeypatch,
        "run",
        experiment,
        "--tiny",
        "model.source=org/zephyr",
        f"output={tmp_path / 'thesis'}",
    )
    assert f"{theirs} is not empty" in message
    assert content(theirs) == before


def test_a_folder_that_is_held_is_marked_and_stays_this_programs(tmp_path):
    folder = tmp_path / "run"
    with only_one(folder):
        (folder / "anything").write_text("x")
    (folder / "stray").write_text("a note that somebody put there")
    claim(folder)
    (folder / paths.MARK).unlink()
    with pytest.raises(PathError, match=r"is not empty \(anything, stray\)"):
        claim(folder)


RECORDS = {
    "manifest.json": {"name": "run", "versions": {"selm_jax": "0.1", "jax": "0.10"}},
    "iteration_0/stage.json": {"evaluate": {"done": True, "inputs": {}, "settings": {}}},
    "stage.json": {"answer": {"done": False, "inputs": {}, "settings": {}}},
    "store/abc/entry.json": {"outputs": {}, "about": {}},
    "judge/alpaca_eval.json": {"benchmark": "AlpacaEval 2.0", "selm_jax": "0.1"},
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("torn", [False, True])
def test_folders_of_versions_that_left_no_mark(name, torn, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(RECORDS[name])
    (tmp_path / name).write_text(text[: len(text) // 2] if torn else text)
    (tmp_path / ".lock").touch()
    if torn:
        with pytest.raises(PathError):
            claim(tmp_path)
    else:
        claim(tmp_path)


def test_an_iteration_of_a_run_is_no_run(tmp_path):
    for name in ("manifest.json", "iteration_0/stage.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(RECORDS[name]))
    claim(tmp_path)
    with pytest.raises(PathError, match=r"iteration_0 is not empty \(stage.json\)"):
        claim(tmp_path / "iteration_0")
    assert [p.name for p in (tmp_path / "iteration_0").iterdir()] == ["stage.json"]


LOCK = {"machine": "m", "host": "h", "process": 1, "id": "x"}


@pytest.mark.parametrize(
    "name,text",
    [(".lock", ""), (".lock", json.dumps(LOCK)), (".DS_Store", "x"), ("._a", "x"),
     ("Thumbs.db", "x"), (".nfs0001", "x"), (paths.MARK, "selm_jax m")],
)  # fmt: skip
def test_what_nobody_loses_does_not_fill_a_folder(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    claim(tmp_path)
    assert (tmp_path / paths.MARK).exists()
    (tmp_path / "other").write_text("x")
    claim(tmp_path)


@pytest.mark.parametrize("text", ["held", "{}", "[]", '{"machine": 3}', "\0\1\2"])
def test_a_lock_of_another_program_stays(text, tmp_path):
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(PathError, match=r"\.lock"), only_one(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    assert (tmp_path / ".lock").read_text() == text


# --- writing ------------------------------------------------------------------------------------


def test_a_file_never_replaces_a_folder(theirs):
    before = content(theirs)
    worked = []
    with pytest.raises(PathError, match="is a folder"), artifacts.whole(theirs) as partial:
        worked.append(partial)
    assert not worked and content(theirs) == before
    with artifacts.whole(theirs, replaces_folder=True) as partial:
        partial.write_text("ours")
    assert theirs.read_text() == "ours"


def test_what_happens_to_be_named_like_a_leftover_stays(tmp_path):
    (tmp_path / "report.html.partial").write_text("a download of theirs")
    artifacts.write_text(tmp_path / "report.html", "x")
    assert (tmp_path / "report.html.partial").read_text() == "a download of theirs"


def test_a_link_stays_a_link_and_what_it_leads_to_stays(tmp_path, theirs):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    artifacts.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    before = content(theirs)
    link = tmp_path / "model"
    link.symlink_to(theirs)
    with pytest.raises(PathError, match="is a folder"):
        artifacts.write_text(link, "x")
    with artifacts.whole(link, replaces_folder=True) as partial:
        partial.mkdir()
    assert link.is_dir() and not link.is_symlink() and content(theirs) == before


def test_a_device_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PathError, match="is not a regular file"):
        artifacts.write_json(tmp_path / "pipe", {})
    with pytest.raises(PathError, match="is not a regular file"):
        paths.file_to_write("/dev/null")
    assert not list(tmp_path.glob("*partial"))
