"""Which paths this program writes to. A path comes from a person, and what lies there may be theirs.

A file replaces a file, never a folder. Into a folder that has something in it this program writes
only if it made that folder: it leaves a mark in each that it takes.
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
    """A path that cannot serve for what it was given. Nothing was written; the message says why."""


def place(text: str | Path) -> Path:
    """The path that a person meant: `~` at its beginning is their home folder.

    Raises:
      PathError: it is empty, or begins with `~NAME` where nobody of that name has a home.
    """
    if not str(text):
        raise PathError("an empty path names nothing; expected the name of a file or folder")
    if not str(text).startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise PathError(
            f"{text}: nobody of this name has a home folder here; write ./{text} if that is meant"
        ) from None


def file_to_write(text: str | Path) -> Path:
    """The path that a person gave for a file that is to be written.

    Raises:
      PathError: as `check_file`; or a run or a sweep goes on from the file that is there.
    """
    path = check_file(place(text))
    if path.exists() and _is_record(path.resolve()):
        raise PathError(f"{path}: belongs to a run, and stays as it is; expected another name")
    return path


def folder_to_write(text: str | Path) -> Path:
    """The path that a person gave for a folder that is to be made, or added to.

    Raises:
      PathError: a file is there, or in place of a folder around it.
    """
    return _check_folder(place(text))


def check_file(path: Path) -> Path:
    """The path, if a file may be written there.

    Raises:
      PathError: a folder is there, or something else that is no file, such as a device; or what
        should be a folder around it is a file.
    """
    if path.is_dir():
        raise PathError(f"{path}: is a folder, and stays as it is; expected the name of a file")
    if path.exists() and not path.is_file():
        raise PathError(f"{path}: is no file that could be replaced; expected the name of a file")
    return _check_above(path)


def _check_folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise PathError(f"{path}: is a file; expected the name of a folder")
    return _check_above(path)


def _check_above(path: Path) -> Path:
    there = next((folder for folder in path.parents if folder.exists()), None)
    if there is not None and not there.is_dir():
        raise PathError(f"{path}: {there} is a file; expected a folder there")
    return path


def claim(folder: Path) -> None:
    """Makes a folder, or takes one that is empty or was made by this program.

    Raises:
      PathError: something else is in it.
    """
    _check_folder(folder)
    if _is_marked(folder):
        return
    if folder.exists() and not _was_made_here(folder):
        found = sorted(each.name for each in folder.iterdir() if not _is_nothing(each))
        if found:
            raise PathError(
                f"{folder}: has something in it ({some(found)}), and was not made by "
                "this program. Nothing was written. Name a folder that is new or empty"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(_TOLD, encoding="utf-8")


def make_private(path: Path) -> None:
    """Makes an empty file that nobody else may read, unless there is a file: for a database, whose
    neighbours (write-ahead log) take their permissions from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def is_leftover(name: str) -> bool:
    """Whether the system leaves files of this name where nobody asked for them."""
    return name in _LEFTOVERS or name.startswith(("._", ".nfs"))


_LEFTOVERS = {".DS_Store", "Thumbs.db", "desktop.ini", ".directory"}


_RECORDS = {MARK, "config.yaml", "manifest.json", "metrics.jsonl", "stage.json", "store"}


def _is_record(file: Path) -> bool:
    """Whether a run, a sweep or an evaluation reads the file when it goes on."""
    for folder in filter(_is_marked, file.parents):
        name = file.relative_to(folder).parts[0]
        if name in _RECORDS or name.startswith((".lock", "iteration_")):
            return True
    return False


def _is_marked(folder: Path) -> bool:
    mark = folder / MARK
    return mark.is_file() and mark.read_bytes() == _TOLD.encode()


def _is_nothing(path: Path) -> bool:
    """A file that nobody loses: the system's, a lock of this program, or a mark that is being made."""
    if not path.is_file():
        return False
    if path.name == ".lock" or path.name.startswith(".lock."):
        return path.stat().st_size == 0 or {"machine", "process"} <= _json(path).keys()
    if path.name == MARK:
        return _TOLD.encode().startswith(path.read_bytes())
    return is_leftover(path.name)


def _was_made_here(folder: Path) -> bool:
    """Whether a version of this program that left no mark has made the folder: by its records."""
    manifest = _json(folder / "manifest.json")
    if isinstance(manifest.get("versions"), dict) and "selm_jax" in manifest["versions"]:
        return True  # a run
    if (folder.parent / "manifest.json").exists():
        return False  # what lies in a run is a part of it, such as an iteration
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
    """The JSON object of a file; empty where it is none."""
    try:
        return read_object(file)
    except (OSError, JsonFileError):
        return {}
