"""Checks a path before the program writes there, so that it never replaces the user's files.

A file may replace a file, but never a folder. The program writes into a folder that is not empty
only if it made that folder itself: it leaves a mark (`.selm`) in each folder that it makes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from selm_jax.shell.json_file import JsonFileError, read_object
from selm_jax.shell.words import some

MARK = ".selm"
_TOLD = "selm_jax made this folder, and replaces files in it.\n"


class PathError(RuntimeError):
    """A path cannot be used as requested. Nothing was written; the message says why."""


def place(text: str | Path) -> Path:
    """The path that the user entered, with a leading `~` replaced by the home folder.

    Raises:
      PathError: it is empty, or begins with `~NAME` and there is no such user.
    """
    if not str(text):
        raise PathError("the path is empty; expected the name of a file or folder")
    if not str(text).startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise PathError(
            f"{text}: there is no user of this name; write ./{text} for a file of this name"
        ) from None


def cache_root() -> Path:
    """The cache: `$SELM_CACHE`, else `$XDG_CACHE_HOME/selm_jax`, else `~/.cache/selm_jax`."""
    if root := os.environ.get("SELM_CACHE"):
        return Path(root).expanduser()
    # The XDG specification asks to ignore a path that is not absolute.
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "selm_jax"


def file_to_write(text: str | Path) -> Path:
    """The path that the user entered for a file to write, if the file may be written.

    Raises:
      PathError: no file can be written there (see `check_file`), or a run needs the file there.
    """
    path = check_file(place(text))
    if path.exists() and _is_record(path.resolve()):
        raise PathError(f"{path} belongs to a run and is not replaced; choose another name")
    return path


def folder_to_write(text: str | Path) -> Path:
    """The path that the user entered for a folder to make or to add files to.

    Raises:
      PathError: the path or one of its parents is a file.
    """
    return _check_folder(place(text))


def check_file(path: Path) -> Path:
    """Returns the path if a file may be written there.

    Raises:
      PathError: there is a folder, or something else that is not a file, such as a device; or one
        of its parents is a file.
    """
    if path.is_dir():
        raise PathError(f"{path} is a folder and is not replaced; expected the name of a file")
    if path.exists() and not path.is_file():
        raise PathError(f"{path} is not a regular file; expected the name of a file")
    return _check_above(path)


def _check_folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise PathError(f"{path} is a file; expected the name of a folder")
    return _check_above(path)


def _check_above(path: Path) -> Path:
    there = next((folder for folder in path.parents if folder.exists()), None)
    if there is not None and not there.is_dir():
        raise PathError(f"{path}: {there} is a file; expected a folder there")
    return path


def claim(folder: Path) -> None:
    """Makes a folder and marks it, or accepts one that is empty or was made by this program.

    Raises:
      PathError: the folder contains something that this program did not make.
    """
    _check_folder(folder)
    if _is_marked(folder):
        return
    if folder.exists() and not _was_made_here(folder):
        found = sorted(each.name for each in folder.iterdir() if not _is_nothing(each))
        if found:
            raise PathError(
                f"{folder} is not empty ({some(found)}) and was not made by this program. "
                "Nothing was written. Choose a folder that is new or empty"
            )
    mark(folder)


def mark(folder: Path) -> None:
    """Makes a folder and marks it as made by this program."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(_TOLD, encoding="utf-8")


def make_private(path: Path) -> None:
    """Makes an empty file that only its owner may read, unless the file exists.

    For a database: SQLite gives the files that it adds (the write-ahead log) the same permissions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def is_leftover(name: str) -> bool:
    """Says whether operating systems create files of this name by themselves, such as .DS_Store."""
    return name in _LEFTOVERS or name.startswith(("._", ".nfs"))


_LEFTOVERS = {".DS_Store", "Thumbs.db", "desktop.ini", ".directory"}


_RECORDS = {MARK, "config.yaml", "manifest.json", "metrics.jsonl", "stage.json", "store"}


def _is_record(file: Path) -> bool:
    """Returns whether a run, a sweep or an evaluation needs the file to resume."""
    for folder in filter(_is_marked, file.parents):
        name = file.relative_to(folder).parts[0]
        if name in _RECORDS or name.startswith((".lock", "iteration_")):
            return True
    return False


def _is_marked(folder: Path) -> bool:
    mark = folder / MARK
    return mark.is_file() and mark.read_bytes() == _TOLD.encode()


def _is_nothing(path: Path) -> bool:
    """Says whether a file may be ignored: the system's, our lock, or our half-written marker."""
    if not path.is_file():
        return False
    if path.name == ".lock" or path.name.startswith(".lock."):
        return path.stat().st_size == 0 or {"machine", "process"} <= _json(path).keys()
    if path.name == MARK:
        return _TOLD.encode().startswith(path.read_bytes())
    return is_leftover(path.name)


def _was_made_here(folder: Path) -> bool:
    """Says whether an early version of this program, which left no marker, made the folder."""
    manifest = _json(folder / "manifest.json")
    if isinstance(manifest.get("versions"), dict) and "selm_jax" in manifest["versions"]:
        return True  # a run
    if (folder.parent / "manifest.json").exists():
        return False  # a folder inside a run is a part of it, such as an iteration
    for file in (folder / "stage.json", *folder.glob("iteration_*/stage.json")):
        stages = _json(file).values()  # a run, or answers to a benchmark
        if stages and all(isinstance(each, dict) and "done" in each for each in stages):
            return True
    entries = map(_json, folder.glob("store/*/entry.json"))  # a sweep
    scored = map(_json, (*folder.glob("*.json"), *folder.glob("*/alpaca_eval.json")))
    return any({"outputs", "about"} <= e.keys() for e in entries) or any(
        "selm_jax" in each for each in scored
    )


def _json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        return read_object(file)
    except (OSError, JsonFileError):
        return {}
