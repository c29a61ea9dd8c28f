"""Reads, appends and removes lines of metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selm_jax.shell import artifacts, jsonl
from selm_jax.shell.words import redo


def read_lines(path: Path) -> list[Any]:
    """The values in a file of JSON lines; an empty list if the file does not exist.

    Raises:
      artifacts.ArtifactError: a line is not JSON.
    """
    if not path.exists():
        return []
    found = []
    for line in jsonl.lines(path.read_bytes()):
        try:
            found.append(line.value())
        except jsonl.JsonError as error:
            raise _not_json(path, line, error) from error
    return found


def _not_json(path: Path, line: jsonl.Line, error: jsonl.JsonError) -> artifacts.ArtifactError:
    return artifacts.ArtifactError(
        f"{path}, line {line.number}: not JSON: {error}. Restore the file from a copy, "
        "or delete this line and run the stage that wrote it again: "
        f"{redo(path.parent / 'T', 'STAGE')}"
    )


def rewrite_lines(path: Path, keep: Callable[[dict[str, Any]], bool] = lambda line: True) -> bool:
    """Removes lines that `keep` rejects and a torn last line; returns whether it removed any.

    Raises:
      artifacts.ArtifactError: a line before the last is not JSON.
    """
    if not path.exists():
        return False
    kept = []
    for line in jsonl.lines(path.read_bytes()):
        try:
            if keep(line.value()):
                kept.append(line.text)
        except jsonl.JsonError as error:
            if line.ended:  # if not, a kill cut it off, and the step that wrote it runs again
                raise _not_json(path, line, error) from error
    text = "".join(line + "\n" for line in kept)
    if text.encode() == path.read_bytes():
        return False
    artifacts.write_text(path, text)
    return True


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Appends one JSON line to a file."""
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(value, ensure_ascii=False) + "\n")
