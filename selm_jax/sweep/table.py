"""Computes a sweep's table: one row per cell of the grid, compared with its baseline."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table

from selm_jax.report.data import RunData, report_data
from selm_jax.report.sweep_page import Row
from selm_jax.shell import artifacts
from selm_jax.shell import mirror as mirrors
from selm_jax.statistics.intervals import Estimate, difference, pooled
from selm_jax.statistics.multiple import holm
from selm_jax.statistics.proportions import counted
from selm_jax.sweep.grid import Cell, Sweep


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Held-out measures of one run: a number or NaN for each prompt and iteration.

    Attributes:
      greedy, sample: score of the greedy answer, and mean score of the sampled ones.
      kl: mean log-ratio of the sampled ones to the start model; NaN if one was too long for it.
      shares: the measures and iterations whose scores are all right, half right or wrong.
    """

    prompts: tuple[str, ...]
    greedy: Mapping[int, Float[np.ndarray, " prompts"]]
    sample: Mapping[int, Float[np.ndarray, " prompts"]]
    kl: Mapping[int, Float[np.ndarray, " prompts"]]
    shares: frozenset[tuple[str, int]]


def outcome(run: RunData) -> Outcome:
    prompts = tuple(dict.fromkeys(a.prompt_id for a in run.answers))
    at = {prompt: i for i, prompt in enumerate(prompts)}
    found: dict[tuple[str, int], list[list[float]]] = {}
    for a in run.answers:
        for key, value in ((a.kind, a.score), ("kl", a.logp - a.logp_start)):
            if key != "kl" or a.kind == "sample":
                cells = found.setdefault((key, a.iteration), [[] for _ in prompts])
                cells[at[a.prompt_id]].append(value)
    means: dict[str, dict[int, np.ndarray]] = {"greedy": {}, "sample": {}, "kl": {}}
    for (key, t), cells in found.items():
        means[key][t] = np.array([np.mean(each) if each else np.nan for each in cells])
    shares = {
        (key, t) for (key, t), cells in found.items() if key != "kl" and counted(chain(*cells))
    }
    return Outcome(prompts, **means, shares=frozenset(shares))


def table(grid: Sweep) -> list[Row]:
    """Computes the table's rows, one per cell of the grid, from finished runs."""
    finished: dict[str, dict[int, RunData]] = {}
    for member in grid.members:
        folder = member.folder
        if (folder / "manifest.json").exists():
            data = report_data(folder)
            if not data.unfinished:
                finished.setdefault(member.cell.name, {})[member.seed] = data
    outcomes = {
        name: {s: outcome(run) for s, run in runs.items()} for name, runs in finished.items()
    }
    rows = []
    for cell in grid.cells:
        base = Cell({**cell.levels, grid.axis: grid.baseline}, {}).name
        runs, of_base = finished.get(cell.name, {}), finished.get(base, {})
        alike = base != cell.name and _ranks_alike(runs, of_base)
        others = outcomes.get(base, {}) if alike else {}
        rows.append(_row(grid, cell, runs, outcomes.get(cell.name, {}), others))
    return _with_holm(rows)


def _row(
    grid: Sweep,
    cell: Cell,
    runs: Mapping[int, RunData],
    own: Mapping[int, Outcome],
    others: Mapping[int, Outcome],
) -> Row:
    """Computes one cell's row of results.

    Runs and outcomes are keyed by seed; `others` are the baseline's.
    """
    members = [m for m in grid.members if m.cell is cell]
    sweep = mirrors.named(grid.folder)
    return Row(
        levels=tuple(cell.levels.values()),
        changes=cell.told,
        runs=tuple(
            (m.seed, os.path.relpath(m.experiment.output, sweep), m.seed in runs) for m in members
        ),
        baseline=cell.levels[grid.axis] == grid.baseline,
        ranked=_mean_count(runs, "rank", "candidates"),
        updates=_mean_count(runs, "train", "updates"),
        greedy=_mean(own, "greedy"),
        gain=_gain(own),
        sample=_mean(own, "sample"),
        kl=_mean(own, "kl"),
        tokens=_mean_metric(runs, "length"),
        cut_off=_mean_metric(runs, "cut_off"),
        difference=_versus(own, others, "greedy"),
        difference_sample=_versus(own, others, "sample"),
        difference_by_seed=_seeds_apart(own, others),
        by_iteration=_by_iteration(own, "greedy"),
        kl_by_iteration=_by_iteration(own, "kl"),
    )


class _Table(NamedTuple):
    """One held-out measure of a cell's runs, and whether the measure is a share of prompts."""

    values: Float[np.ndarray, "seeds prompts"]
    share: bool
    prompts: tuple[str, ...]


def _table(outcomes: Sequence[Outcome], kind: str, t: int | None = None) -> _Table | None:
    """Collects the measure `kind` of several runs after iteration t or their last iteration.

    None if a run lacks it, or had other prompts than the others.
    """
    found = [(o, getattr(o, kind)) for o in outcomes]
    at = [max(by_iteration, default=0) if t is None else t for _, by_iteration in found]
    pairs = list(zip(found, at, strict=True))
    if len({o.prompts for o in outcomes}) != 1 or any(k not in each for (_, each), k in pairs):
        return None
    values = np.array([each[k] for (_, each), k in pairs], np.float64)
    share = all((kind, k) in o.shares for (o, _), k in pairs)
    return _Table(values, share, outcomes[0].prompts)


def _mean(outcomes: Mapping[int, Outcome], kind: str, t: int | None = None) -> Estimate | None:
    found = _table(list(outcomes.values()), kind, t)
    return None if found is None else pooled(found.values, share=found.share)


def _difference(one: _Table | None, other: _Table | None) -> Estimate | None:
    """Estimates a difference by seed and prompt. None if a table is missing or prompts differ."""
    if one is None or other is None or one.prompts != other.prompts:
        return None
    return difference(one.values, other.values, share=one.share and other.share)


def _gain(outcomes: Mapping[int, Outcome]) -> Estimate | None:
    runs = list(outcomes.values())
    return _difference(_table(runs, "greedy"), _table(runs, "greedy", 0))


def _by_iteration(outcomes: Mapping[int, Outcome], kind: str) -> dict[int, Estimate]:
    ts = sorted({t for o in outcomes.values() for t in getattr(o, kind)})
    found = {t: _mean(outcomes, kind, t) for t in ts}
    return {t: each for t, each in found.items() if each is not None}


def _versus(
    own: Mapping[int, Outcome], others: Mapping[int, Outcome], kind: str
) -> Estimate | None:
    """Estimates a cell's difference from the baseline after its last iteration, on common seeds."""
    seeds = [s for s in own if s in others]
    return _difference(*(_table([of[s] for s in seeds], kind) for of in (own, others)))


def _seeds_apart(own: Mapping[int, Outcome], others: Mapping[int, Outcome]) -> dict[int, float]:
    found = {s: _versus({s: own[s]}, {s: others[s]}, "greedy") for s in own if s in others}
    return {s: each.mean for s, each in found.items() if each is not None}


def _ranks_alike(one: Mapping[int, RunData], other: Mapping[int, RunData]) -> bool:
    """Says whether one ranker scored the runs of two cells, so that scores are comparable."""
    rankers = {
        tuple(
            (k, v) for k, v in run.settings.items() if re.match(r"feedback\.(ranker|settings)", k)
        )
        for run in (*one.values(), *other.values())
    }
    return len(rankers) == 1


def _with_holm(rows: Sequence[Row]) -> list[Row]:
    """Applies Holm's correction to the p-values of all comparisons in the table."""
    p = {i: each.p for i, each in enumerate(row.difference for row in rows) if each is not None}
    p = {i: value for i, value in p.items() if value is not None}
    adjusted = dict(zip(p, holm(np.array(list(p.values()))).tolist(), strict=True))
    return [dataclasses.replace(row, p_holm=adjusted.get(i)) for i, row in enumerate(rows)]


def _mean_count(runs: Mapping[int, RunData], stage: str, key: str) -> float | None:
    """A stage's count called `key`, summed over a run's iterations and averaged over runs."""
    sums = [
        sum(stages[stage].counts.get(key, 0) for stages in run.stages.values() if stage in stages)
        for run in runs.values()
    ]
    return float(np.mean(sums)) if sums else None


def _mean_metric(runs: Mapping[int, RunData], name: str) -> float | None:
    found = [run.metric(max(run.evaluations), name) for run in runs.values() if run.evaluations]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known and len(known) == len(runs) else None


def shared(grid: Sweep) -> dict[str, tuple[int, int]]:
    """For each stage, how often the sweep ran it and how often it copied another run's result."""
    counts: dict[str, tuple[int, int]] = {}
    for member in grid.members:
        run = member.folder
        for folder in artifacts.iterations(run).values() if run.exists() else ():
            for name, entry in artifacts.Stages(folder).read().items():
                if entry["done"]:
                    done, taken = counts.get(name, (0, 0))
                    was = "shared" in entry
                    counts[name] = (done + (not was), taken + was)
    return counts


def as_csv(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yields the rows as flat dictionaries, keyed by the columns of table.csv."""
    for row in rows:
        line: dict[str, Any] = {"cell": ", ".join(row.levels)}
        line["runs"] = sum(done for *_, done in row.runs)
        for name in ("ranked", "updates", "tokens", "cut_off"):
            line[name] = getattr(row, name)
        for name in ("greedy", "gain", "sample", "kl", "difference", "difference_sample"):
            value = getattr(row, name)
            for end in ("mean", "low", "high"):
                line[f"{name}_{end}"] = None if value is None else getattr(value, end)
        line["difference_seeds"] = None if row.difference is None else row.difference.seeds
        line["p"] = None if row.difference is None else row.difference.p
        yield line | {"p_holm": row.p_holm}


def shown(rows: Sequence[Row], grid: Sweep) -> Table:
    """A table for the terminal: held-out score, KL, and the difference from the baseline."""
    found = Table(box=None, pad_edge=False, title=f"{grid.title}: after the last iteration")
    found.add_column("setting", overflow="fold", ratio=2)
    for name in ("seeds", "score", "KL", f"against {grid.baseline}", "p (Holm)"):
        found.add_column(name, justify="right", overflow="fold")
    for row in rows:
        of_all = len(row.runs)
        versus = str(row.difference or ("baseline" if row.baseline else "-"))
        found.add_row(
            row.name,
            f"{row.seeds}" if row.seeds == of_all else f"{row.seeds} of {of_all}",
            _number(row.greedy), _number(row.kl), versus,
            "" if row.p_holm is None else f"{row.p_holm:.2g}",
        )  # fmt: skip
    return found


def _number(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.mean:.3f}"
