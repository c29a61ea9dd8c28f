"""What the finished runs of a sweep measured: one row for each cell, compared with its baseline."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selm_jax.lab.stats import holm
from selm_jax.report.data import RunData, report_data
from selm_jax.report.sweep_page import Interval, Row
from selm_jax.shell import artifacts
from selm_jax.statistics import proportions
from selm_jax.statistics.crossed import estimate
from selm_jax.statistics.intervals import bounded
from selm_jax.sweep.plan import Cell, Sweep

_Range = tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Held-out answers of one run: a number for each prompt, by iteration; NaN where none is."""

    prompts: tuple[str, ...]
    greedy: Mapping[int, Float[np.ndarray, " prompts"]]  # score of the greedy answer
    sample: Mapping[int, Float[np.ndarray, " prompts"]]  # mean score of the sampled ones
    kl: Mapping[int, Float[np.ndarray, " prompts"]]  # their mean log-ratio to the start model; NaN
    # too where one of them was too long for it


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
    return Outcome(prompts, means["greedy"], means["sample"], means["kl"])


def table(plan: Sweep) -> list[Row]:
    """One row for each cell, about its finished runs."""
    finished: dict[str, dict[int, RunData]] = {}
    for member in plan.members:
        folder = Path(member.experiment.output)
        if (folder / "manifest.json").exists():
            data = report_data(folder)
            if not data.unfinished:
                finished.setdefault(member.cell.name, {})[member.seed] = data
    outcomes = {
        name: {s: outcome(run) for s, run in runs.items()} for name, runs in finished.items()
    }
    rows = []
    for cell in plan.cells:
        base = Cell({**cell.levels, plan.axis: plan.baseline}, {}).name
        runs, of_base = finished.get(cell.name, {}), finished.get(base, {})
        alike = base != cell.name and _ranks_alike(runs, of_base)
        others = outcomes.get(base, {}) if alike else {}
        rows.append(_row(plan, cell, runs, outcomes.get(cell.name, {}), others))
    return _with_holm(rows)


def _row(
    plan: Sweep,
    cell: Cell,
    runs: Mapping[int, RunData],
    own: Mapping[int, Outcome],
    others: Mapping[int, Outcome],
) -> Row:
    """The cell of these runs and outcomes, by seed; `others` are its baseline's."""
    members = [m for m in plan.members if m.cell is cell]
    scores = (
        score
        for o in (*own.values(), *others.values())
        for values in o.greedy.values()
        for score in values.tolist()
    )
    of_shares = proportions.counted(scores)
    unit, gap = ((0, 1), (-1, 1)) if of_shares else (None, None)
    return Row(
        levels=tuple(cell.levels.values()),
        changes=cell.told,
        runs=tuple(
            (m.seed, os.path.relpath(m.experiment.output, plan.folder), m.seed in runs)
            for m in members
        ),
        baseline=cell.levels[plan.axis] == plan.baseline,
        ranked=_mean_count(runs, "rank", "candidates"),
        updates=_mean_count(runs, "train", "updates"),
        greedy=_over(own, lambda o: _at_last(o.greedy), unit),
        gain=_over(own, _gain, gap),
        sample=_over(own, lambda o: _at_last(o.sample), unit),
        kl=_over(own, lambda o: _at_last(o.kl)),
        tokens=_mean_metric(runs, "length"),
        cut_off=_mean_metric(runs, "cut_off"),
        difference=_versus(own, others, lambda o: o.greedy, gap),
        difference_sample=_versus(own, others, lambda o: o.sample, gap),
        difference_by_seed=_seeds_apart(own, others),
        by_iteration=_by_iteration(own, lambda o: o.greedy, unit),
        kl_by_iteration=_by_iteration(own, lambda o: o.kl),
    )


def _by_iteration(
    outcomes: Mapping[int, Outcome],
    which: Callable[[Outcome], Mapping[int, np.ndarray]],
    share_of: _Range = None,
) -> dict[int, Interval]:
    ts = sorted({t for o in outcomes.values() for t in which(o)})
    found = {t: _over(outcomes, lambda o, t=t: which(o).get(t), share_of) for t in ts}
    return {t: each for t, each in found.items() if each is not None}


def _at_last(values: Mapping[int, np.ndarray]) -> np.ndarray | None:
    return values[max(values)] if values else None


def _gain(o: Outcome) -> np.ndarray | None:
    return o.greedy[max(o.greedy)] - o.greedy[0] if 0 in o.greedy else None


def _over(
    outcomes: Mapping[int, Outcome],
    which: Callable[[Outcome], np.ndarray | None],
    share_of: _Range = None,
) -> Interval | None:
    """The mean over seeds and prompts of what `which` takes from each run."""
    values = [which(o) for o in outcomes.values()]
    if (
        not values
        or any(v is None for v in values)
        or len({o.prompts for o in outcomes.values()}) > 1
    ):
        return None
    return _interval(np.array(values, np.float64), share_of)


def _versus(
    own: Mapping[int, Outcome],
    others: Mapping[int, Outcome],
    which: Callable[[Outcome], Mapping[int, np.ndarray]],
    share_of: _Range = None,
) -> Interval | None:
    """The mean difference of the last iterations, paired by seed and prompt."""
    pairs = [(own[s], others[s]) for s in own if s in others]
    if not pairs or len({o.prompts for pair in pairs for o in pair}) > 1:
        return None
    ends = [(_at_last(which(a)), _at_last(which(b))) for a, b in pairs]
    values = [a - b for a, b in ends if a is not None and b is not None]
    return _interval(np.array(values), share_of) if len(values) == len(pairs) else None


def _seeds_apart(own: Mapping[int, Outcome], others: Mapping[int, Outcome]) -> dict[int, float]:
    found = {
        s: _versus({s: own[s]}, {s: others[s]}, lambda o: o.greedy) for s in own if s in others
    }
    return {s: each.mean for s, each in found.items() if each is not None}


def _interval(
    values: Float[np.ndarray, "seeds prompts"], share_of: _Range = None
) -> Interval | None:
    """Over the prompts that have a value in all seeds; None of fewer than two values.

    Args:
      share_of: the ends of the values' range, where their mean is a share or a difference of shares.
    """
    values = values[:, np.isfinite(values).all(axis=0)]
    if values.size < 2:
        return None
    e = estimate(values)
    low, high = (e.low, e.high) if share_of is None else bounded(e, *share_of)
    return Interval(e.mean, low, high, e.p, e.seeds)


def _ranks_alike(one: Mapping[int, RunData], other: Mapping[int, RunData]) -> bool:
    """Whether their scores have one meaning: the same ranker gave them."""
    rankers = {
        tuple(
            (k, v) for k, v in run.settings.items() if re.match(r"feedback\.(ranker|settings)", k)
        )
        for run in (*one.values(), *other.values())
    }
    return len(rankers) == 1


def _with_holm(rows: Sequence[Row]) -> list[Row]:
    """All comparisons of the table are one family of tests."""
    p = {i: row.difference.p for i, row in enumerate(rows) if row.difference is not None}
    adjusted = dict(zip(p, holm(np.array(list(p.values()))), strict=True))
    return [dataclasses.replace(row, p_holm=adjusted.get(i)) for i, row in enumerate(rows)]


def _mean_count(runs: Mapping[int, RunData], stage: str, key: str) -> float | None:
    """Of a run's iterations together, the mean over runs."""
    sums = [
        sum(stages[stage].counts.get(key, 0) for stages in run.stages.values() if stage in stages)
        for run in runs.values()
    ]
    return float(np.mean(sums)) if sums else None


def _mean_metric(runs: Mapping[int, RunData], name: str) -> float | None:
    found = [run.metric(max(run.evaluations), name) for run in runs.values() if run.evaluations]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known and len(known) == len(runs) else None


def shared(plan: Sweep) -> dict[str, tuple[int, int]]:
    """By stage: how often it was done in this sweep, and how often taken from another run."""
    counts: dict[str, tuple[int, int]] = {}
    for member in plan.members:
        run = Path(member.experiment.output)
        for folder in artifacts.iterations(run).values() if run.exists() else ():
            for name, entry in artifacts.Stages(folder).read().items():
                if entry["done"]:
                    done, taken = counts.get(name, (0, 0))
                    was = "shared" in entry
                    counts[name] = (done + (not was), taken + was)
    return counts


def as_csv(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The rows as flat values, by the names of table.csv's columns."""
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
