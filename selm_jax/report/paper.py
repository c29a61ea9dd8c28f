"""Draws figures 2 to 6 of the paper (arXiv 2405.19332) from the data of any runs.

The data of a figure is a list of flat rows, which is saved as CSV beside the drawing. Numbers that
the paper itself published are drawn hollow, dotted and grey, and labelled as such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from selm_jax.report.data import ReportError, RunData
from selm_jax.report.drawing import COLOURS, MARKERS, MUTED, PaperFigure, dashes, drawings, matrix
from selm_jax.report.summary import number, rankers_of
from selm_jax.statistics import proportions

# --- Figure 2: win rates --------------------------------------------------------------------------


def win_rates(runs: Sequence[RunData], labels: Sequence[str]) -> PaperFigure:
    """Draws a matrix of win rates between all iterations of all runs, on held-out prompts.

    An entry is the share of prompts on which the row's greedy answer scores higher than the
    column's.

    The scores are the stored ones of the runs' ranker; a tie counts as half a win. A prompt is left
    out if a judge gave no readable score for one of its answers. The players are all iterations of
    all runs; equal start models are one player. The intervals cover the choice of prompts
    (`proportions`).

    Raises:
      ReportError: the runs have different held-out prompts or different rankers, or no prompt has
        scores from all players.
    """
    _check_one_ranker(runs, "a win rate")
    players: dict[str, dict[tuple[str, str], float]] = {}
    for run, label in zip(runs, labels, strict=True):
        for t in reversed(run.iterations):
            scores = _greedy(run, t)
            if t and scores:
                players[f"{label}, iteration {t}"] = scores
            elif scores and scores not in players.values():  # equal start models count once
                players["start" if "start" not in players else f"{label}, start"] = scores
    prompts = {tuple(sorted(scores)) for scores in players.values()}
    if len(prompts) != 1:
        raise ReportError(
            f"the runs have {len(prompts)} different sets of held-out prompts. Name runs with the "
            "same set"
        )
    keys = [
        key for key in prompts.pop() if all(math.isfinite(each[key]) for each in players.values())
    ]
    if not keys:
        raise ReportError(
            "no held-out prompt has a score in all iterations of these runs; name other runs, or "
            "evaluate them again with `selm measure`"
        )
    table = {name: np.array([scores[key] for key in keys]) for name, scores in players.items()}
    rows = []
    for a, mine in table.items():
        for b, other in table.items():
            wins = np.where(mine > other, 1.0, np.where(mine == other, 0.5, 0.0))
            low, high = (0.5, 0.5) if a == b else proportions.interval(wins)
            rows.append(
                {"row": a, "column": b, "win_rate": 100 * wins.mean(), "low": 100 * low,
                 "high": 100 * high, "ties": float((mine == other).mean()), "prompts": len(keys)}
            )  # fmt: skip
    return PaperFigure("figure2_win_rates", rows, matrix(rows, "Win rate of row over column, %"))


# --- Figure 3: rewards ----------------------------------------------------------------------------


def reward_histograms(runs: Sequence[RunData], labels: Sequence[str]) -> list[PaperFigure]:
    """Draws histograms of the scores of greedy held-out answers, by run and by iteration."""
    _check_one_ranker(runs, "a histogram of rewards")
    groups = {
        label: _known(_greedy(run, _last(run))) for run, label in zip(runs, labels, strict=True)
    }
    figures = [_histogram("figure3_rewards_by_run", "after the last iteration", groups)]
    for run, label in zip(runs, labels, strict=True):
        by_iteration = {
            f"iteration {t}" if t else "start": _known(_greedy(run, t)) for t in run.iterations
        }
        name = f"figure3_rewards_by_iteration_{_slug(label)}"
        figures.append(_histogram(name, label, by_iteration))
    return figures


def _histogram(name: str, title: str, groups: Mapping[str, Sequence[float]]) -> PaperFigure:
    groups = {name: scores for name, scores in groups.items() if scores}
    if not groups:
        raise ReportError(
            "no held-out answer of these runs has a score, so there is no reward to show; name "
            "runs whose ranker gives scores"
        )
    values = np.concatenate([np.asarray(v) for v in groups.values()])
    edges = np.histogram_bin_edges(values, bins=min(24, max(6, int(len(values) ** 0.5))))
    rows = []
    for group, scores in groups.items():
        counts, _ = np.histogram(scores, edges)
        rows += [
            {
                "group": group,
                "from": float(a),
                "to": float(b),
                "answers": int(n),
                "share": n / len(scores),
            }
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
        ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (group, scores) in enumerate(groups.items()):
            shares = [row["share"] for row in rows if row["group"] == group]
            colour = COLOURS[i % len(COLOURS)]
            axes.stairs(shares, edges, color=colour, linewidth=1.6, fill=False, linestyle=dashes(i),
                        label=f"{group} (mean {number(float(np.mean(scores)))})")  # fmt: skip
            axes.plot(
                np.mean(scores), 0, marker=MARKERS[i % 6], color=colour, clip_on=False, zorder=4
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("reward of greedy held-out answers; markers: means")
        axes.set_ylabel("share of answers")
        axes.set_title(f"Rewards {title}" if title.startswith("after") else f"Rewards of {title}")
        figure.legend(loc="outside lower left", ncols=2)

    return PaperFigure(name, rows, drawings((5.6, 3.6 + 0.2 * (len(groups) // 2)), draw))


# --- Figures 4 and 5: implicit rewards, SELM minus DPO --------------------------------------------


@dataclass(frozen=True)
class Implicit:
    """The implicit rewards beta * log(pi / pi_ref) of one policy, by role and prompt."""

    label: str
    of: Mapping[str, Mapping[str, float]]  # role -> prompt id -> reward


def implicit_differences(
    name: str, title: str, baseline: Implicit, others: Sequence[Implicit]
) -> PaperFigure:
    """Plots each prompt's implicit reward minus the baseline's, sorted; one panel per role.

    Prompts whose reward is NaN are left out. Raises ReportError if the policies have different
    prompts.
    """
    rows = []
    for other in others:
        for role, rewards in other.of.items():
            base = baseline.of[role]
            if set(base) != set(rewards):
                raise ReportError(
                    f"{other.label} and {baseline.label} have {role} for different prompts; "
                    "compare policies on the same prompts"
                )
            known = (p for p in base if math.isfinite(rewards[p] - base[p]))
            gaps = sorted((rewards[p] - base[p], p) for p in known)
            rows += [
                {"run": other.label, "minus": baseline.label, "role": role, "place": i,
                 "prompt_id": p,
                 "reward": rewards[p], "baseline_reward": base[p], "difference": gap}
                for i, (gap, p) in enumerate(gaps)
            ]  # fmt: skip
    roles = list(others[0].of)

    def draw(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(1, len(roles), sharey=True))
        for role, axes in zip(roles, panels, strict=True):
            axes.axhline(0, color=MUTED, linewidth=0.8)
            for i, other in enumerate(others):
                gaps = [
                    r["difference"] for r in rows if (r["run"], r["role"]) == (other.label, role)
                ]
                above = np.mean(np.array(gaps) > 0)
                axes.plot(
                    range(1, len(gaps) + 1), gaps, color=COLOURS[i % len(COLOURS)], linewidth=1.6,
                    linestyle=dashes(i),
                    label=f"{other.label}: {100 * above:.0f} % above 0",
                )  # fmt: skip
            axes.set_title(role)
            axes.set_xlabel("prompts, sorted for each curve")
            axes.legend()
        panels[0].set_ylabel(f"implicit reward minus {baseline.label}'s")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)

    return PaperFigure(name, rows, drawings((4.2 * len(roles) + 0.6, 3.5), draw))


def own_samples(run: RunData, label: str, t: int, beta: float) -> Implicit:
    """Computes implicit rewards of a policy's held-out samples from stored log-probabilities.

    The reference is the run's start model. The reward of a prompt is the mean over its samples; it
    is NaN if a sample has no log-probabilities.
    """
    found: dict[str, list[float]] = {}
    for a in run.answers:
        if (a.iteration, a.kind) == (t, "sample"):
            found.setdefault(a.prompt_id, []).append(beta * (a.logp - a.logp_start))
    return Implicit(label, {"own samples": {p: float(np.mean(x)) for p, x in found.items()}})


# --- Figure 6: one change at a time ---------------------------------------------------------------

PANELS: Mapping[str, tuple[str, ...]] = {
    "Number of iterations": ("iterations",),
    "New answers": ("candidates.dataset", "candidates.greedy", "candidates.samples"),
    "Batch": ("training.global_batch",),
    "Learning rate": ("training.learning_rate",),
    "Label update": ("feedback.rule",),
    "Explored response": ("feedback.explore",),
    "Reference": ("training.reference_policy",),
    "Objective": ("objective.loss", "objective.alpha", "objective.beta", "objective.convention"),
    "Layout": ("text.layout",),
}
"""The settings that belong to each panel; a run is in the first panel with one of its changes."""


def panels(runs: Sequence[RunData], labels: Sequence[str]) -> PaperFigure | None:
    """Plots held-out reward after the last iteration, with one panel per changed setting.

    Changes are relative to the first run. The result is None if no run differs from the first in a
    setting of `PANELS`, or if no run was evaluated.
    """
    _check_one_ranker(runs, "a panel")
    rows = []
    first = runs[0].settings
    for panel, keys in PANELS.items():
        for run, label in zip(runs[1:], labels[1:], strict=True):
            if _panel(first, run.settings) == panel:
                changed = [
                    f"{k}: {run.settings.get(k)}"
                    for k in keys
                    if run.settings.get(k) != first.get(k)
                ]
                if not any(row["panel"] == panel for row in rows):
                    rows.append(
                        {"panel": panel, "run": labels[0], "change": ""} | _last_reward(runs[0])
                    )
                rows.append(
                    {"panel": panel, "run": label, "change": "; ".join(changed)} | _last_reward(run)
                )
    rows = [row for row in rows if row["reward"] is not None]
    names = list(dict.fromkeys(row["panel"] for row in rows))
    if not names:
        return None

    def draw(figure: Figure) -> None:
        cut = min(len(names), 3)
        grid = figure.subplots(-(-len(names) // cut), cut, squeeze=False, sharey=True).ravel()
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        for panel, axes in zip(names, grid, strict=False):
            mine = [row for row in rows if row["panel"] == panel]
            for x, row in enumerate(mine):
                colour = MUTED if x == 0 else COLOURS[(x - 1) % len(COLOURS)]
                axes.plot([x, x], [row["low"], row["high"]], color=colour, linewidth=1.6)
                axes.plot(x, row["reward"], MARKERS[x % 6], color=colour)
            axes.axhline(mine[0]["reward"], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.set_xticks(range(len(mine)), [row["run"] for row in mine], rotation=30, ha="right")
            axes.set_xlim(-0.6, max(len(mine), 3) - 0.4)
            axes.grid(False, axis="x")
            axes.set_title(panel)
        for axes in grid[::cut]:
            axes.set_ylabel("held-out reward, 95 %")

    height = 3.1 * -(-len(names) // 3)
    return PaperFigure(
        "figure6_one_change", rows, drawings((3.0 * min(len(names), 3) + 0.6, height), draw)
    )


def _panel(first: Mapping[str, str], settings: Mapping[str, str]) -> str | None:
    for panel, keys in PANELS.items():
        if any(settings.get(key) != first.get(key) for key in keys):
            return panel
    return None


def _last_reward(run: RunData) -> dict[str, Any]:
    t = max(run.evaluations, default=0)
    names = {"reward": "reward_greedy", "low": "reward_greedy_low", "high": "reward_greedy_high"}
    return {"iterations": t} | {key: run.metric(t, name) for key, name in names.items()}


# --- helpers --------------------------------------------------------------------------------------


def _last(run: RunData) -> int:
    return max((a.iteration for a in run.answers), default=0)


def _greedy(run: RunData, t: int) -> dict[tuple[str, str], float]:
    return {
        (a.prompt_id, a.prompt): a.score
        for a in run.answers
        if a.kind == "greedy" and a.iteration == t
    }


def _known(scores: Mapping[tuple[str, str], float]) -> list[float]:
    return [score for score in scores.values() if math.isfinite(score)]


def _check_one_ranker(runs: Sequence[RunData], what: str) -> None:
    rankers = rankers_of(runs)
    if len(rankers) > 1:
        raise ReportError(
            f"the runs were scored by {len(rankers)} rankers, so {what} over all of them has no "
            f"meaning: {'; '.join(', '.join(v for _, v in r) for r in sorted(rankers))}. "
            "Name runs with the same ranker"
        )


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)
