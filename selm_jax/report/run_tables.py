"""Makes the tables of a run: rows for the page, and data for CSV and LaTeX files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selm_jax.report import summary
from selm_jax.report.data import RunData, Stage, flatten
from selm_jax.report.files import Table

_UNITS = ("prompts", "candidates", "responses", "tokens", "updates", "examples", "tokens_useful")
"""The counts that measure work, for which a throughput is shown."""


def evaluation_rows(run: RunData) -> list[dict[str, Any]]:
    greedy = summary.measured(run, "greedy")
    rows = []
    for k in sorted(set(run.evaluations) | set(greedy)):
        values = {
            name: tuple(run.metric(k, f"{name}{end}") for end in ("", "_low", "_high"))
            for name in (
                "reward_greedy",
                "reward_sample",
                "gain",
                "capability",
                "kl",
                "pairs/accuracy",
                "pairs/margins",
            )
        }
        values["accuracy"], values["margins"] = values["pairs/accuracy"], values["pairs/margins"]
        rows.append(
            {
                "iteration": k,
                **values,
                "entropy": run.metric(k, "entropy"),
                "length": run.metric(k, "length"),
                "prompts": run.metric(k, "prompts"),
                "unread": run.metric(k, "unread"),
                "texts": greedy.get(k),
            }
        )
    return rows


SET_MEASURES = ("reward_greedy", "reward_sample", "gain", "capability", "kl", "accuracy")


def set_rows(run: RunData) -> list[dict[str, Any]]:
    """The measures of the named held-out sets, each with the ends of its interval."""
    return [
        {
            "name": of,
            "iteration": k,
            **{
                name: tuple(
                    run.metric(k, f"{run.of_set(of, name)}{end}") for end in ("", "_low", "_high")
                )
                for name in SET_MEASURES
            },
            "prompts": run.metric(k, f"{of}/prompts") or run.metric(k, f"{of}/pairs"),
        }
        for of in run.heldout_sets
        for k in run.evaluations
    ]


def set_table(label: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    ends = ("", "_low", "_high")
    columns = ["set", "iteration", *(f"{n}{end}" for n in SET_MEASURES for end in ends), "prompts"]
    data = [
        [r["name"], r["iteration"], *(v for n in SET_MEASURES for v in r[n]), r["prompts"]]
        for r in rows
    ]
    return Table(f"{label}_heldout_sets", columns, data)


def dropped(run: RunData) -> dict[str, Any] | None:
    """A table of kept pairs and of dropped prompts, by reason (rows) and iteration (columns)."""
    ranked = {k: stages["rank"] for k, stages in run.stages.items() if "rank" in stages}
    if not ranked:
        return None
    reasons = dict.fromkeys(reason for stage in ranked.values() for reason in stage.drops)
    pairs = {k: stage.counts.get("pairs", 0) for k, stage in ranked.items()}
    totals = {k: pairs[k] + sum(stage.drops.values()) for k, stage in ranked.items()}

    def row(title: str, counts: dict[int, float]) -> dict[str, Any]:
        return {
            "title": title,
            "cells": [(counts[k], counts[k] / totals[k] if totals[k] else None) for k in ranked],
        }

    rows = [row("kept as pairs", pairs)] + [
        row(
            reason.replace("_", " "), {k: stage.drops.get(reason, 0) for k, stage in ranked.items()}
        )
        for reason in reasons
    ]
    # These were kept but are in no update, because the last batch would have been incomplete.
    left = {k: _count(run, k, "train", "left_over") for k in ranked}
    if any(left.values()):
        rows.append(row("of the kept: left over from the last batch", left))
    return {"columns": list(ranked), "rows": rows}


def _count(run: RunData, iteration: int, stage: str, key: str) -> float:
    found = run.stages[iteration].get(stage)
    return found.counts.get(key, 0) if found else 0


def stage_rows(run: RunData) -> list[dict[str, Any]]:
    return [
        {
            "iteration": k,
            "name": stage.name,
            "seconds": stage.seconds,
            "work": _amounts(stage),
            "rate": _amounts(stage, stage.seconds) if stage.seconds else "–",
        }
        for k, stages in run.stages.items()
        for stage in stages.values()
    ]


def _amounts(stage: Stage, seconds: float | None = None) -> str:
    """Writes a stage's counts in words, or its throughput if `seconds` is set.

    Keys with a `/` are left out: they are parts of other counts, or they are shown elsewhere.
    """
    parts = []
    for key, count in stage.counts.items():
        if "/" in key or not count or (seconds and key not in _UNITS):
            continue
        amount = count / seconds if seconds else count
        whole = not seconds or amount >= 100
        text = f"{amount:,.0f}" if whole else summary.number(amount)
        parts.append(f"{text} {key.replace('_', ' ')}")
    return ", ".join(parts) or "–"


def manifest(run: RunData) -> dict[str, str]:
    return dict(flatten({key: value for key, value in run.manifest.items() if key != "name"}))


def machine(run: RunData) -> dict[str, str]:
    """The entries of a run's manifest on versions and devices, without its settings."""
    return {k: v for k, v in manifest(run).items() if not k.startswith(_SETTINGS)}


_SETTINGS = ("feedback", "method", "model.source", "objective")


def evaluation_table(label: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of unrounded held-out metrics, with the ends of each interval in two columns."""
    intervals = (
        "reward_greedy",
        "reward_sample",
        "gain",
        "capability",
        "kl",
        "accuracy",
        "margins",
    )
    intervals = [n for n in intervals if any(row[n][0] is not None for row in rows)]
    texts = ("words", "distinct_2", "different", "cut_off")
    columns = ["iteration", *(f"{n}{end}" for n in intervals for end in ("", "_low", "_high"))]
    columns += ["entropy", "tokens", *texts, "prompts"]
    data = [
        [
            row["iteration"],
            *(value for n in intervals for value in row[n]),
            *(row["entropy"], row["length"]),
            *(getattr(row["texts"], n, None) for n in texts),
            row["prompts"],
        ]
        for row in rows
    ]
    return Table(f"{label}_heldout", columns, data)


def dropped_table(label: str, found: Mapping[str, Any]) -> Table:
    columns = ["outcome", *(f"iteration {k}" for k in found["columns"])]
    rows = [[row["title"], *(count for count, _ in row["cells"])] for row in found["rows"]]
    return Table(f"{label}_dropped", columns, rows)


def stage_table(label: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    names = ("iteration", "name", "seconds", "work", "rate")
    columns = ("iteration", "stage", "seconds", "work done", "per second")
    return Table(f"{label}_stages", columns, [[row[name] for name in names] for row in rows])
