"""The report's HTML page: `write` puts one run, or several side by side, into one file."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from selm_jax.report import run_plots, summary
from selm_jax.report.curves import Legend, Plot, implicit_reward_plots, loss_plots
from selm_jax.report.data import Answer, ReportError, RunData, Stage, flatten, report_data
from selm_jax.report.plots import run_style, swatch
from selm_jax.shell import artifacts
from selm_jax.shell.paths import check_file

MAX_PROMPTS = 256
"""Held-out prompts whose answers are on the page; all prompts enter all numbers and plots."""

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

_UNITS = ("prompts", "candidates", "responses", "tokens", "updates", "examples", "tokens_useful")
"""The counts that are work; of these alone a throughput is worth reading."""


@dataclass(frozen=True)
class Section:
    """A heading with plots; `note` says what the section answers."""

    key: str
    title: str
    note: str
    plots: Sequence[Plot]
    legend: Legend = ()


def write(runs: Sequence[Path], out: Path) -> None:
    """Writes the report of the run folders `runs` to the file `out`, whole or not at all.

    The same folders give the same bytes. Several runs are drawn over each other.

    Raises:
      PathError: `out` is a folder.
      FileNotFoundError, ReportError: a run folder is not there or not readable (see
        `report_data`), no run or the same run twice was asked for.
    """
    if not runs:
        raise ReportError("no run to report on; expected at least one run folder")
    folders = [Path(run) for run in runs]
    twice = {str(f) for f in folders if [g.resolve() for g in folders].count(f.resolve()) > 1}
    if twice:
        raise ReportError(f"the same run folder twice: {', '.join(sorted(twice))}; name each once")
    check_file(Path(out))
    text = render([report_data(folder) for folder in folders])
    with artifacts.whole(Path(out)) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def templates() -> jinja2.Environment:
    """The pages' templates: what is put in is escaped, and a name that is not there is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable,
    )
    environment.filters.update(number=summary.number, percent=summary.percent)
    return environment


def render(runs: Sequence[RunData]) -> str:
    """The page as text."""
    labels = unique_labels(runs)
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    # The policy names our one script by its hash: no text of a run can become a script,
    # and nothing can be fetched, even if the escaping had a hole.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    answers, left_out = answer_cards(runs, labels)
    several = len(runs) > 1
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            title=f"Comparison of {len(runs)} runs" if several else labels[0],
            several=several,
            style=Markup(STYLE),
            script=Markup(script),
            policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
            runs=[
                _run_view(run, label, i)
                for i, (run, label) in enumerate(zip(runs, labels, strict=True))
            ],
            comparisons=[
                (label, summary.paired_difference(runs[0], run))
                for run, label in list(zip(runs, labels, strict=True))[1:]
            ],
            sections=sections(runs, labels),
            answers=answers,
            left_out=left_out,
            different_settings=summary.settings_differences([run.settings for run in runs]),
            different_machines=summary.settings_differences([_machine(run) for run in runs]),
        )
    )


def sections(runs: Sequence[RunData], labels: Sequence[str]) -> list[Section]:
    """The sections that hold plots, in the reader's order."""
    legend = run_plots.run_legend(labels)
    return [
        Section(
            "reward",
            "Held-out reward",
            "Did the answers to prompts that were never trained on get better?",
            run_plots.reward_plots(runs),
            legend,
        ),
        Section(
            "frontier",
            "Reward against distance",
            "What did the reward cost, measured by how far the policy moved?",
            run_plots.frontier_plots(runs),
            legend,
        ),
        Section(
            "texts",
            "The answers themselves",
            "Is the reward earned, or did the answers collapse?",
            run_plots.answer_plots(runs),
            run_plots.answer_legend(labels),
        ),
        Section(
            "loss",
            "Loss",
            "Did the optimisation go well?",
            loss_plots(runs),
            legend,
        ),
        Section(
            "implicit",
            "Implicit rewards",
            "What did the policy learn to tell apart?",
            implicit_reward_plots(runs),
            legend,
        ),
        Section(
            "ranking",
            "Ranking",
            "How good was the answer each iteration's model explored, and what was dropped and why?",
            run_plots.explore_plots(runs, labels),
        ),
        Section(
            "time",
            "Time",
            "Where did the time go, and how fast was each stage?",
            run_plots.time_plots(runs, labels),
            legend,
        ),
    ]


def unique_labels(runs: Sequence[RunData]) -> list[str]:
    """The runs' names; where two share one, their folders tell them apart."""
    names = [run.name for run in runs]
    return [
        f"{n} ({r.path})" if names.count(n) > 1 else n for n, r in zip(names, runs, strict=True)
    ]


def answer_cards(
    runs: Sequence[RunData], labels: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """One card per held-out prompt, its answers by run and kind, iterations side by side.

    Also the number of prompts beyond `MAX_PROMPTS`, which get no card. A prompt is its id and its
    text: runs that use an id for different texts get different cards.
    """
    cards: dict[tuple[str, str], dict[tuple[int, str], list[Answer]]] = {}
    for index, run in enumerate(runs):
        for answer in run.answers:
            card = cards.setdefault((answer.prompt_id, answer.prompt), {})
            card.setdefault((index, answer.kind), []).append(answer)
    shown = [
        {
            "id": prompt_id,
            "prompt": prompt,
            "gain": _gain(groups.get((0, "greedy"), [])),
            "groups": [
                {
                    "label": labels[index] if len(runs) > 1 else "",
                    "swatch": swatch(run_style(index)) if len(runs) > 1 else "",
                    "kind": kind,
                    "answers": [_answer_view(runs[index], a, answers) for a in answers],
                }
                for (index, kind), answers in sorted(groups.items())
            ],
        }
        for (prompt_id, prompt), groups in list(cards.items())[:MAX_PROMPTS]
    ]
    return shown, max(0, len(cards) - MAX_PROMPTS)


def _answer_view(run: RunData, answer: Answer, group: Sequence[Answer]) -> dict[str, Any]:
    start = [other.score for other in group if other.iteration == 0]
    only = len(start) == 1 and answer.iteration > 0
    return {
        "iteration": answer.iteration,
        "text": answer.text,
        "cut_off": answer.finish == "length",
        "finish": answer.finish,
        "score": answer.score,
        "unread": math.isnan(answer.score) and bool(run.metric(answer.iteration, "unread")),
        "change": answer.score - start[0] if only else None,
    }


def _gain(greedy: Sequence[Answer]) -> float:
    """Score of the last greedy answer minus the start model's; 0 where either is missing."""
    scores = {a.iteration: a.score for a in greedy if math.isfinite(a.score)}
    return scores[max(scores)] - scores[0] if 0 in scores else 0.0


def _run_view(run: RunData, label: str, index: int) -> dict[str, Any]:
    known = summary.evaluated(run)
    last = known[-1] if known else None
    return {
        "label": label,
        "swatch": swatch(run_style(index)),
        "progress": summary.progress(run),
        "paragraph": summary.paragraph(run),
        "alarms": summary.alarms(run),
        "unfinished": run.unfinished,
        "notes": run.notes,
        "method": run.method,
        "last": last,
        "evaluations": _evaluation_rows(run),
        "pairs": any(run.metric(k, "pairs/accuracy") is not None for k in run.evaluations),
        "dropped": _dropped(run),
        "stages": _stage_rows(run),
        "config": run.config_text,
        "manifest": _manifest(run),
    }


def _evaluation_rows(run: RunData) -> list[dict[str, Any]]:
    greedy = summary.measured(run, "greedy")
    rows = []
    for k in sorted(set(run.evaluations) | set(greedy)):
        values = {
            name: tuple(run.metric(k, f"{name}{end}") for end in ("", "_low", "_high"))
            for name in (
                "reward_greedy",
                "reward_sample",
                "gain",
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


def _dropped(run: RunData) -> dict[str, Any] | None:
    """Kept pairs and dropped prompts by reason (rows) and iteration (columns)."""
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
    # Kept, yet in no update: the last batch of an iteration would not have been whole.
    left = {k: _count(run, k, "train", "left_over") for k in ranked}
    if any(left.values()):
        rows.append(row("of the kept: left over from the last batch", left))
    return {"columns": list(ranked), "rows": rows}


def _count(run: RunData, iteration: int, stage: str, key: str) -> float:
    found = run.stages[iteration].get(stage)
    return found.counts.get(key, 0) if found else 0


def _stage_rows(run: RunData) -> list[dict[str, Any]]:
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
    """A stage's counts, or with its seconds its throughput. Counts with a `/` in their name are
    parts of others or no counts at all, and the reasons and places stand elsewhere."""
    parts = []
    for key, count in stage.counts.items():
        if "/" in key or not count or (seconds and key not in _UNITS):
            continue
        amount = count / seconds if seconds else count
        whole = not seconds or amount >= 100
        text = f"{amount:,.0f}" if whole else summary.number(amount)
        parts.append(f"{text} {key.replace('_', ' ')}")
    return ", ".join(parts) or "–"


def _manifest(run: RunData) -> dict[str, str]:
    return dict(flatten({key: value for key, value in run.manifest.items() if key != "name"}))


def _machine(run: RunData) -> dict[str, str]:
    """The manifest but for what the ranker was asked."""
    return {k: v for k, v in _manifest(run).items() if not k.startswith("feedback")}


def printable(value: Any) -> Any:
    """Characters that HTML forbids, made visible: NUL as ␀, other controls likewise."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(map(_visible, value.replace("\r\n", "\n")))


def _visible(sign: str) -> str:
    code = ord(sign)
    if code < 0x20 and sign not in "\n\t":
        return chr(0x2400 + code)
    if 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE:
        return "\N{REPLACEMENT CHARACTER}"
    return sign
