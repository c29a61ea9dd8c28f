"""Collects a page's header: the model, data, objective, code versions and date of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from selm_jax.report.summary import number, plural, settings_differences
from selm_jax.shell.words import sizes_in_words

Facts = list[tuple[str, str]]
"""Titles and texts, in reading order."""


def facts(settings: Mapping[str, str], manifest: Mapping[str, Any]) -> Facts:
    """Known facts about a run, such as its model and objective, as (title, text)."""
    s, m = settings, manifest
    rows = {
        "Model": _joined(s.get("model.source"), _revision(m), _parameters(m)),
        "Objective": _with_settings(s, "objective.loss", "objective."),
        "Ranker": _with_settings(s, "feedback.ranker", "feedback.settings."),
        "Training data": _joined(s.get("data.train"), _rows(s.get("data.limit"))),
        "Held-out data": _joined(s.get("data.heldout"), _rows(s.get("data.heldout_limit"))),
        "Iterations": s.get("iterations", ""),
        "Best model": _best(_mapping(m.get("best"))),
        "Seed": s.get("seed", ""),
        **code(_mapping(m.get("versions")), m.get("commit")),
        "Device": _joined(m.get("device"), m.get("platform"), _count(m.get("devices"), "device")),
        "Batch sizes": _sizes(m),
        "Begun": str(m.get("created", "")).replace("T", " ").replace("+00:00", " UTC"),
    }
    return [(title, text) for title, text in rows.items() if text and text != "null"]


def shared_facts(
    runs: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]],
) -> tuple[Facts, Facts]:
    """The facts that are the same in all runs, and the values of everything that differs.

    Args:
      runs: the settings and the manifest of each run.
    """
    runs = [({k: _relative(v, s) for k, v in s.items() if k != "output"}, m) for s, m in runs]
    tables = [dict(facts(*run)) for run in runs]
    same = [
        (title, text)
        for title, text in (tables[0] if tables else {}).items()
        if all(table.get(title) == text for table in tables)
    ]
    machines = [{k: v for k, v in table.items() if k in _MACHINE} for table in tables]
    differ = settings_differences([s for s, _ in runs]) + settings_differences(machines)
    return same, [(title, _values(values)) for title, values in differ]


def _relative(text: str, settings: Mapping[str, str]) -> str:
    """The text with RUN for the run's own folder, so that equal parts of runs are equal."""
    output = settings.get("output")
    return text.replace(output, "RUN") if output else text


_MACHINE = ("Versions", "Commit", "Device", "Batch sizes")  # the facts that are no settings


def _values(values: Sequence[str | None]) -> str:
    distinct = list(dict.fromkeys("not set" if value is None else value for value in values))
    shown = " | ".join(distinct[:_SHOWN])
    return f"{shown} | and {len(distinct) - _SHOWN} more" if len(distinct) > _SHOWN else shown


_SHOWN = 6  # values of one setting


def code(versions: Mapping[str, Any], commit: Any) -> dict[str, str]:
    """Returns the facts about the code: the versions of packages, and the commit."""
    return {
        "Versions": _joined(*(f"{name} {versions[name]}" for name in versions)),
        "Commit": str(commit or ""),
    }


def is_rehearsal(settings: Mapping[str, str]) -> bool:
    """Returns whether `--tiny` made the run: the model is then in the folder NAME-tiny/inputs."""
    parts = PurePath(settings.get("model.source", "")).parts
    return parts[-2:] == ("inputs", "model") and parts[-3:-2] != () and parts[-3].endswith("-tiny")


def _with_settings(settings: Mapping[str, str], key: str, prefix: str) -> str:
    """The name of a loss or ranker, followed by its settings in brackets."""
    given = ", ".join(
        f"{name.removeprefix(prefix)} {value}"
        for name, value in settings.items()
        if name.startswith(prefix) and name != key and value not in ("{}", "null")
    )
    name = settings.get(key, "")
    return f"{name} ({given})" if name and given else name


def _parameters(manifest: Mapping[str, Any]) -> str:
    model = _mapping(manifest.get("model"))
    found = manifest.get("parameters", model.get("parameters"))
    return f"{found:,} parameters" if isinstance(found, int) else ""


def _best(best: Mapping[str, Any]) -> str:
    if not best:
        return ""
    return f"{best['model']}, by {best['metric']} ({number(best['value'])})"


def _revision(manifest: Mapping[str, Any]) -> str:
    commit = _mapping(manifest.get("model")).get("commit")
    return f"commit {str(commit)[:10]}" if commit else ""


def _rows(limit: str | None) -> str:
    return "" if limit in (None, "null") else f"first {limit} rows"


def _sizes(manifest: Mapping[str, Any]) -> str:
    """The sizes of batches that the run has chosen, and for what."""
    chosen, because = _mapping(manifest.get("sizes")), manifest.get("sizes_chosen_for", "")
    return sizes_in_words(chosen, because, manifest.get("sizes_lowered", ()))


def _count(value: Any, word: str) -> str:
    return plural(value, word) if isinstance(value, int) else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)
