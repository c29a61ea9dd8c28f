"""Writes the report's HTML page: one file about one run, or about several side by side."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from selm_jax.report import answer, cards, run_plots, run_tables, summary, words
from selm_jax.report.curves import (
    Legend,
    Plot,
    implicit_reward_plots,
    loss_plots,
    own_plots,
)
from selm_jax.report.data import ReportError, RunData, report_data
from selm_jax.report.files import Table, link
from selm_jax.report.header import facts, is_rehearsal, shared_facts
from selm_jax.report.length_plots import length_plots
from selm_jax.report.plots import run_style, swatch
from selm_jax.report.task_tables import fallen, task_plots, task_rows, task_table
from selm_jax.report.time_plots import time_plots
from selm_jax.shell import artifacts
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.mirror import entered
from selm_jax.shell.paths import check_file, place

_HERE = Path(__file__).parent
STYLE = (_HERE / "page.css").read_text(encoding="utf-8")
SCRIPT = "".join(
    (_HERE / name).read_text(encoding="utf-8") for name in ("page.js", "words.js", "save.js")
)


@dataclass(frozen=True)
class Section:
    """A section of the page: a heading with plots; `note` is the question that they answer."""

    key: str
    title: str
    note: str
    plots: Sequence[Plot]
    legend: Legend = ()


def write(runs: Sequence[Path], out: Path, names: Sequence[str | None] = ()) -> None:
    """Writes the report on the run folders `runs` to the file `out`, completely or not at all.

    The same folders give the same bytes. The plots of several runs share their axes.

    Args:
      names: names for the runs on the page; None stands for a run's own name.

    Raises:
      PathError: `out` is a folder.
      FileNotFoundError, ReportError: a run folder is missing or unreadable (see `report_data`),
        there are no runs, or a run or a name occurs twice.
    """
    if not runs:
        raise ReportError("no run to report on; expected at least one run folder")
    folders = [Path(run) for run in runs]
    twice = {str(f) for f in folders if [g.resolve() for g in folders].count(f.resolve()) > 1}
    if twice:
        raise ReportError(
            f"the same run folder is given twice: {', '.join(sorted(twice))}; give each folder once"
        )
    given = [name for name in names if name]
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise ReportError(f"two runs are called {twice[0]!r}; give each run a different name")
    check_file(Path(out))
    found = [report_data(folder) for folder in folders]
    if names:
        pairs = zip(found, names, strict=True)
        found = [dataclasses.replace(run, name=name or run.name) for run, name in pairs]
    text = render(found)
    with artifacts.whole(Path(out)) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def named(argument: str) -> tuple[str | None, Path]:
    """Splits `NAME=FOLDER` into name and folder; the name is None if there is only a folder."""
    name, equals, folder = argument.partition("=")
    if not equals or "/" in name or place(argument).exists():
        return None, entered(argument)
    return name.strip() or None, entered(folder)


def templates() -> jinja2.Environment:
    """Makes the Jinja environment of the pages; it escapes values and forbids undefined names."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable,
    )
    environment.filters.update(
        number=summary.number, percent=summary.percent, p_value=summary.p_value
    )
    environment.globals.update(link=link)
    return environment


def render(runs: Sequence[RunData]) -> str:
    """Renders the report on these runs as HTML text."""
    labels = unique_labels(runs)
    script = SCRIPT
    answers, left_out = cards.answer_cards(runs, labels)
    several = len(runs) > 1
    same = shared_facts([(run.settings, run.manifest) for run in runs])[0] if several else []
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            title=f"Comparison of {len(runs)} runs" if several else labels[0],
            several=several,
            style=Markup(STYLE),
            script=Markup(script),
            policy=policy(script),
            runs=[
                _run_view(run, label, i, said=dict(same))
                for i, (run, label) in enumerate(zip(runs, labels, strict=True))
            ],
            same=same,
            comparisons=[
                (label, summary.paired_difference(runs[0], run))
                for run, label in list(zip(runs, labels, strict=True))[1:]
            ],
            verdict=answer.of_runs(runs, labels) if several else "",
            rehearsals=[
                label for run, label in zip(runs, labels, strict=True) if is_rehearsal(run.settings)
            ],
            sections=sections(runs, labels),
            pairs=cards.pairs(runs, labels),
            words=words.of_page(runs, labels),
            side_by_side=_dropped_side_by_side(runs, labels),
            answers=answers,
            left_out=left_out,
            differences=[
                _differences(caption, key, labels, tables)
                for caption, key, tables in (
                    ("Settings that differ", "settings", [run.settings for run in runs]),
                    (
                        "Versions and machines that differ",
                        "machines",
                        [run_tables.machine(run) for run in runs],
                    ),
                )
                if several
            ],
        )
    )


def policy(script: str) -> str:
    """The page's Content-Security-Policy: load nothing, run only this script (by its hash).

    So no text of a run can become a script, even if the escaping had a bug.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _differences(
    caption: str, key: str, labels: Sequence[str], tables: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    rows = summary.settings_differences(tables)
    table = Table(f"{key}_that_differ", ["key", *labels], [[k, *values] for k, values in rows])
    return {"caption": caption, "rows": rows, "links": table.links}


def _dropped_side_by_side(runs: Sequence[RunData], labels: Sequence[str]) -> dict[str, Any] | None:
    """A table of the dropped prompts of several runs over all iterations, by reason and run."""
    found = [run_tables.dropped(run) for run in runs]
    if len(runs) == 1 or not any(found):
        return None
    sums = [
        {row["title"]: sum(count for count, _ in row["cells"]) for row in each["rows"]}
        if each
        else {}
        for each in found
    ]
    totals = [
        sum(n for title, n in each.items() if not title.startswith("of the kept")) for each in sums
    ]
    titles = list(dict.fromkeys(title for each in sums for title in each))
    rows = [
        (title, [(each.get(title, 0), each.get(title, 0) / total if total else None)
                 for each, total in zip(sums, totals, strict=True)])
        for title in titles
    ]  # fmt: skip
    table = Table("dropped", ["outcome", *labels], [[t, *(n for n, _ in row)] for t, row in rows])
    return {"rows": rows, "links": table.links}


def sections(runs: Sequence[RunData], labels: Sequence[str]) -> list[Section]:
    """Makes the page's sections with plots, in reading order."""
    found = [*_answers(runs, labels), *_training(runs, labels)]
    return [section for section in found if section.plots]


def _answers(runs: Sequence[RunData], labels: Sequence[str]) -> list[Section]:
    """The sections on held-out answers, and on the lengths of all answers."""
    legend = run_plots.run_legend(labels)
    return [
        Section(
            "reward",
            "Held-out reward",
            "Did the answers to prompts that were not trained on improve?",
            run_plots.reward_plots(runs, labels),
            legend,
        ),
        Section(
            "tasks",
            "Tasks of the capability guard",
            "Does the policy still do what the reward does not see?",
            task_plots(runs, labels),
            legend,
        ),
        Section(
            "sets",
            "Other held-out sets",
            "Does what holds for the main held-out prompts hold for the other sets?",
            run_plots.set_plots(runs, labels),
            legend,
        ),
        Section(
            "frontier",
            "Reward against distance",
            "How far did the policy move from the start model to get its reward?",
            run_plots.frontier_plots(runs, labels),
            legend,
        ),
        Section(
            "texts",
            "The answers themselves",
            "Did the answers really improve, or did they collapse?",
            run_plots.answer_plots(runs, labels),
            run_plots.answer_legend(labels),
        ),
        Section(
            "lengths",
            "Lengths",
            "Did the answers only become longer?",
            length_plots(runs, labels),
            legend,
        ),
    ]


def _training(runs: Sequence[RunData], labels: Sequence[str]) -> list[Section]:
    """The sections on the loss, the ranking, the sampler and the time."""
    legend = run_plots.run_legend(labels)
    return [
        Section(
            "loss",
            "Loss",
            "Did the optimisation go well?",
            loss_plots(runs, labels),
            legend,
        ),
        Section(
            "implicit",
            "Implicit rewards",
            "Did the policy learn to prefer the chosen answers?",
            implicit_reward_plots(runs, labels),
            legend,
        ),
        Section(
            "terms",
            "Terms and metrics of the objective",
            "What does each term of the loss do, and what else does the objective report?",
            own_plots(runs, labels),
            legend,
        ),
        Section(
            "ranking",
            "Ranking",
            "How good was each iteration's explored answer, and what was dropped and why?",
            run_plots.explore_plots(runs, labels),
        ),
        Section(
            "gap",
            "Sampler and scorer",
            "Were the answers sampled from the policy that is trained?",
            run_plots.gap_plots(runs, labels),
            legend,
        ),
        Section(
            "time",
            "Time and memory",
            "Where did the time go, how fast was training, and how much memory did it take?",
            time_plots(runs, labels),
            legend,
        ),
    ]


def unique_labels(runs: Sequence[RunData]) -> list[str]:
    """The names of the runs, each with its folder if two runs share a name."""
    names = [run.name for run in runs]
    return [
        f"{n} ({mirrors.named(r.path)})" if names.count(n) > 1 else n
        for n, r in zip(names, runs, strict=True)
    ]


def _run_view(run: RunData, label: str, index: int, said: Mapping[str, str]) -> dict[str, Any]:
    """Collects what the template shows of a run, except `said`, which the page says of all runs."""
    known = summary.evaluated(run)
    evaluations, dropped = run_tables.evaluation_rows(run), run_tables.dropped(run)
    stages, sets = run_tables.stage_rows(run), run_tables.set_rows(run)
    tasks = task_rows(run)
    manifest = run_tables.manifest(run)
    tables = {
        "evaluations": run_tables.evaluation_table(label, evaluations),
        "sets": run_tables.set_table(label, sets),
        "tasks": task_table(label, tasks),
        "dropped": dropped and run_tables.dropped_table(label, dropped),
        "stages": run_tables.stage_table(label, stages),
        "manifest": Table(f"{label}_versions", ["key", "value"], list(manifest.items())),
    }
    return {
        "label": label,
        "swatch": swatch(run_style(index)),
        "facts": [row for row in facts(run.settings, run.manifest) if row[0] not in said],
        "progress": summary.progress(run),
        "paragraph": summary.paragraph(run),
        "alarms": [*summary.alarms(run), *fallen(run)],
        "unfinished": run.unfinished,
        "notes": run.notes,
        "method": run.method,
        "last": known[-1] if known else None,
        "evaluations": evaluations,
        "sets": sets,
        "tasks": tasks,
        "pairs": any(run.metric(k, "pairs/accuracy") is not None for k in run.evaluations),
        "dropped": dropped,
        "stages": stages,
        "config": run.config_text,
        "manifest": manifest,
        "links": {key: table.links if table else "" for key, table in tables.items()},
    }


def printable(value: Any) -> Any:
    """Replaces characters that HTML forbids with visible ones, such as NUL with ␀."""
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
