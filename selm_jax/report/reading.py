"""Reads and checks the files of a run folder for a report.

If the digest of a file is recorded, the file must match it. Runs of early versions recorded no
digests and are shown as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selm_jax.config import plain_yaml
from selm_jax.shell import artifacts, jsonl
from selm_jax.shell.sealed import fits, unsealed


class ReportError(ValueError):
    """The files of one or more runs cannot be shown. The message says which and why."""


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not UTF-8 text: {error}") from error


def settings(path: Path) -> tuple[str, dict[str, Any]]:
    """Reads the settings of a run, and returns them as text and as a mapping."""
    try:
        text = plain_yaml.decoded(path.read_bytes())
        return text, mapping(plain_yaml.read(text)[0], path)
    except plain_yaml.YamlError as error:
        raise ReportError(f"{path}: {error}") from error


def json_file(path: Path) -> Any:
    try:
        return jsonl.value(text_of(path))
    except jsonl.JsonError as error:
        raise ReportError(f"{path} is not JSON: {error}. Restore the file from a copy") from error


def check_digest(path: Path, digest: str | None) -> None:
    """Raises ReportError if a recorded digest differs from the file's."""
    if digest is not None and artifacts.digest(path) != digest:
        raise not_as_written(path)


def sealed_mapping(value: Any, path: Path, key: str = "") -> dict[str, Any]:
    """Checks a mapping against the digest that it contains, and removes the digest."""
    found = mapping(value, path, key)
    if not fits(found, key):
        raise not_as_written(path, key)
    return unsealed(found)


def mapping(value: Any, path: Path, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(_where(path, key), value, "a mapping")
    return value


def number(value: Any, path: Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(f"{path}, {key}", value, "a number")
    return value


def not_as_written(path: Path, key: str = "") -> ReportError:
    return ReportError(
        f"{_where(path, key)} has changed since the run wrote it (its SHA-256 differs). "
        "Restore the file from a copy"
    )


def wrong(where: str, found: Any, expected: str) -> ReportError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ReportError(f"{where}: found {shown}, expected {expected}. Restore the file from a copy")


def _where(path: Path, key: str) -> str:
    return f"{path}, {key}" if key else str(path)
