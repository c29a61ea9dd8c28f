"""Writes the page of a sweep: a table, comparisons, and links to the pages of all runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from selm_jax.report import answer, summary
from selm_jax.report.curves import Legend, Plot, values_in_words
from selm_jax.report.data import flatten, written_settings
from selm_jax.report.files import Table
from selm_jax.report.header import is_rehearsal, shared_facts
from selm_jax.report.page import SCRIPT, STYLE, policy, templates
from selm_jax.report.plots import Estimated, Series, estimates, lines, run_style, swatch
from selm_jax.shell import artifacts
from selm_jax.shell import mirror as mirrors
from selm_jax.statistics.intervals import Estimate


@dataclass(frozen=True)
class Row:
    """The results of one cell of a sweep's grid (a combination of settings), over its seeds.

    A value is None if there is none, or if it cannot be compared.

    Attributes:
      levels: the level on each axis, in the order of the axes.
      changes: the changes to the base experiment, each as `key.path=value`.
      runs: for each run its seed, its folder relative to the page, and whether it is finished.
      baseline: whether the other rows of its group are compared with this one.
      ranked, updates: number of answers that the ranker scored, and of updates, per run.
      greedy, sample: held-out score after the last iteration, of greedy and of sampled answers.
      gain: score of the greedy answers minus that of the start model.
      kl: KL from the start model, in nats per sampled answer.
      tokens, cut_off: mean length of greedy answers, and the share that reached the length limit.
      difference, difference_sample: score minus the baseline's, paired by seed and prompt.
      difference_by_seed: `difference` for each seed separately.
      by_iteration, kl_by_iteration: `greedy` and `kl` after each iteration; 0 is the start model.
      p_holm: p value of `difference`, Holm-corrected over all comparisons of the sweep.
    """

    levels: tuple[str, ...]
    changes: tuple[str, ...]
    runs: tuple[tuple[int, str, bool], ...]
    baseline: bool
    ranked: float | None
    updates: float | None
    greedy: Estimate | None
    gain: Estimate | None
    sample: Estimate | None
    kl: Estimate | None
    tokens: float | None
    cut_off: float | None
    difference: Estimate | None
    difference_sample: Estimate | None
    difference_by_seed: Mapping[int, float]
    by_iteration: Mapping[int, Estimate]
    kl_by_iteration: Mapping[int, Estimate]
    p_holm: float | None = None

    @property
    def name(self) -> str:
        return ", ".join(self.levels)

    @property
    def seeds(self) -> int:
        return sum(finished for *_, finished in self.runs)


@dataclass(frozen=True)
class Group:
    """The rows that are compared with one baseline, with the result in words and plots."""

    title: str
    verdict: str
    rows: Sequence[Row]
    plots: Sequence[Plot]
    legend: Legend
    links: Markup


def write(
    out: Path,
    rows: Sequence[Row],
    *,
    title: str,
    about: str,
    command: str,
    axes: Sequence[str],
    axis: str,
    against: str,
    failed: Mapping[str, str],
    shared: Mapping[str, tuple[int, int]],
) -> None:
    """Writes a sweep's page, completely or not at all; the same values give the same bytes.

    Args:
      axes: the names of all axes.
      axis, against: the axis whose levels are compared, and the level that is the baseline.
      failed: for each run that failed, the reason.
      shared: for each stage, how often it was run and how often it was copied from another run.
    """
    place = list(axes).index(axis)  # index of the compared level in a row's levels
    runs = _finished(out.parent, rows)
    same, varied = shared_facts(runs)
    text = (
        templates()
        .get_template("sweep.html.jinja")
        .render(
            title=title,
            about=about,
            command=command,
            style=Markup(STYLE),
            script=Markup(SCRIPT),
            policy=policy(SCRIPT),
            same=same,
            varied=varied,
            rehearsed=any(is_rehearsal(settings) for settings, _ in runs),
            axis=axis,
            place=place,
            against=against,
            groups=list(_groups(rows, axes, axis, against)),
            finished=sum(row.seeds for row in rows),
            planned=sum(len(row.runs) for row in rows),
            seeds=sorted({seed for row in rows for seed, *_ in row.runs}),
            compared=sum(row.difference is not None for row in rows),
            pages=with_pages(out.parent, (run for row in rows for _, run, _ in row.runs)),
            failed=failed,
            shared=shared,
        )
    )
    artifacts.write_text(out, text)


def _groups(rows: Sequence[Row], axes: Sequence[str], axis: str, against: str) -> Iterator[Group]:
    """Yields groups of rows that differ only in the level of the compared axis."""

    place = list(axes).index(axis)

    def rest(row: Row) -> str:
        levels = zip(axes, row.levels, strict=True)
        return ", ".join(f"{name} {level}" for name, level in levels if name != axis)

    levels = list(dict.fromkeys(row.levels[place] for row in rows))
    styles = {level: run_style(i) for i, level in enumerate(levels)}
    for i, key in enumerate(dict.fromkeys(map(rest, rows))):
        mine = [row for row in rows if rest(row) == key]
        named = [(row.levels[place], row) for row in mine]
        legend = tuple((swatch(styles[level]), level) for level, _ in named)
        yield Group(
            title=key,
            verdict=_verdict(named, against),
            rows=mine,
            plots=list(_plots(named, styles, against, i)),
            legend=legend,
            links=_numbers(key or "comparison", axis, named).links,
        )


def _finished(folder: Path, rows: Sequence[Row]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Reads the settings and the manifest of every finished run below a sweep's folder."""
    runs = [folder / run for row in rows for _, run, finished in row.runs if finished]
    read = [written_settings(_run(run)) for run in runs]
    return [(dict(flatten(settings)), manifest) for manifest, _, settings in read]


def with_pages(folder: Path, runs: Iterable[str]) -> set[str]:
    """The runs below a sweep's folder, by relative path, that have a page."""
    return {run for run in runs if (_run(folder / run) / "report.html").exists()}


def _run(folder: Path) -> Path:
    """Where the files of a run below a sweep's folder are; in a bucket it has its own mirror."""
    return mirrors.local(mirrors.named(folder))


def _verdict(named: Sequence[tuple[str, Row]], against: str) -> str:
    """Writes a group's comparisons in words, with p values corrected over the whole sweep."""
    compared = [
        answer.Compared(level, row.difference, row.p_holm)
        for level, row in named
        if row.difference is not None
    ]
    seeds = min((each.difference.seeds for each in compared), default=1)
    return answer.sentence(against, compared, seeds)


def _numbers(title: str, axis: str, named: Sequence[tuple[str, Row]]) -> Table:
    """A table of a group's results with unrounded numbers."""
    single = ("seeds", "ranked", "updates", "tokens", "cut_off", "p_holm")
    estimated = ("greedy", "gain", "difference", "sample", "difference_sample", "kl")
    columns = [axis, *single, *(f"{n}{end}" for n in estimated for end in ("", "_low", "_high"))]
    data = [
        [
            level,
            *(getattr(row, name) for name in single),
            *(
                getattr(getattr(row, name), end, None)
                for name in estimated
                for end in ("mean", "low", "high")
            ),
        ]
        for level, row in named
    ]
    return Table(title, columns, data)


def _plots(named, styles, against: str, i: int) -> Iterator[Plot]:
    yield _differences(named, styles, against, i)
    yield _by_iteration(named, styles, i)
    yield _against_kl(named, styles, i)


def _differences(named, styles, against: str, i: int) -> Plot:
    shown = [(level, row, row.difference) for level, row in named if row.difference is not None]
    marks = [
        Estimated(
            styles[level].colour, d.mean, d.low, d.high, list(row.difference_by_seed.values())
        )
        for level, row, d in shown
    ]
    alt = f"Difference of the held-out reward to {against}. " + " ".join(
        f"{level}: {summary.number(d.mean, True)}." for level, _, d in shown
    )
    how = (
        "After the last iteration, paired by seed and prompt. Bars are 95 % intervals over seeds "
        "and prompts; small dots are single seeds. If a bar does not touch the zero line, expect a "
        "difference for other seeds and prompts too."
    )
    if any(d.seeds == 1 for *_, d in shown):
        how = (
            "After the last iteration, paired by prompt. Bars are 95 % intervals; with one seed, "
            "only over prompts. A bar that does not touch the zero line is then a difference "
            "between these two models, which another seed may not show."
        )
    return Plot(
        f"Greedy reward minus that of {against}",
        how,
        estimates(
            [level for level, *_ in shown],
            marks,
            key=f"difference-{i}",
            alt=alt,
            title=f"Greedy reward minus that of {against}",
        )
        if shown
        else None,
    )


def _by_iteration(named, styles, i: int) -> Plot:
    several = itertools.count()
    series = []
    for level, row in named:
        if row.by_iteration:
            shift = 0.05 * (next(several) - (len(named) - 1) / 2)
            points = list(row.by_iteration.items())
            series.append(
                Series(
                    styles[level],
                    [t + shift for t, _ in points],
                    [e.mean for _, e in points],
                    y_interval=[(_end(e.low), _end(e.high)) for _, e in points],
                    label=level,
                )
            )
    return Plot(
        "Reward of greedy answers",
        "Mean over seeds and held-out prompts by iteration; 0 is the start model. All use the same "
        "prompts, so differences are more certain than these bars suggest.",
        lines(
            series,
            key=f"reward-{i}",
            alt="Held-out reward by iteration. " + values_in_words(series),
            xlabel="iteration",
            whole_x=True,
        )
        if series
        else None,
    )


def _against_kl(named, styles, i: int) -> Plot:
    series = []
    for level, row in named:
        ts = [t for t in row.by_iteration if t in row.kl_by_iteration]
        if ts:
            series.append(
                Series(
                    styles[level],
                    [row.kl_by_iteration[t].mean for t in ts],
                    [row.by_iteration[t].mean for t in ts],
                    label=level,
                )
            )
    return Plot(
        "Greedy reward against KL",
        "Each point is an iteration. Up is better, left is closer to the start model; the better "
        "of two methods is higher at the same KL.",
        lines(
            series,
            key=f"frontier-{i}",
            alt="Held-out reward against KL from the start. " + values_in_words(series),
            xlabel="KL from the start, nats per answer",
        )
        if series
        else None,
    )


def _end(value: float | None) -> float:
    """An end of an interval for the plots, where NaN means that there is none."""
    return math.nan if value is None else value
