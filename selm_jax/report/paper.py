"""The paper's figures from any runs: what each shows, as data; how it is drawn, as SVG.

Figures 2 to 6 of arXiv 2405.19332. A figure is its data first: a list of flat rows, which lies as
CSV beside the drawing. Numbers that the paper itself published are drawn hollow, dotted and grey,
and say so in the drawing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from selm_jax.report import published
from selm_jax.report.data import RunData
from selm_jax.report.summary import number

Rows = list[dict[str, Any]]

_COLOURS = ("#1c6fc4", "#942c10", "#00594a", "#743080", "#8a6800", "#68737c")  # page.css, light
_MARKERS = "os^Dv*"
_INK, _MUTED, _GRID, _PUBLISHED = "#1d2127", "#5b626d", "#e4e4de", "#8b8f96"
_RC = {
    "svg.hashsalt": "selm_jax.paper", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": _MUTED, "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED, "ytick.color": _MUTED, "text.color": _INK, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": _GRID, "legend.frameon": False, "axes.titlesize": 10,
    "axes.titlelocation": "left", "font.family": "sans-serif", "legend.fontsize": 8,
}  # fmt: skip


@dataclass(frozen=True)
class PaperFigure:
    """A drawing and the numbers in it; `name` is that of its two files."""

    name: str
    rows: Rows
    svg: bytes

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()


# --- Figure 2: who beats whom ---------------------------------------------------------------------


def win_rates(runs: Sequence[RunData], labels: Sequence[str]) -> PaperFigure:
    """Share of held-out prompts on which the row's greedy answer scores higher than the column's.

    The scores are those that the runs' ranker gave and that are stored; a tie is half a win. The
    players are every iteration of every run, the start models once. Raises ValueError if the
    answers are not to the same prompts or not scored by one ranker.
    """
    _check_one_ranker(runs, "a win rate")
    players: dict[str, dict[tuple[str, str], float]] = {}
    for run, label in zip(runs, labels, strict=True):
        for t in reversed(run.iterations):
            scores = _greedy(run, t)
            if t and scores:
                players[f"{label}, iteration {t}"] = scores
            elif scores and scores not in players.values():  # runs that start alike, start once
                players["start" if "start" not in players else f"{label}, start"] = scores
    prompts = {tuple(sorted(scores)) for scores in players.values()}
    if len(prompts) != 1:
        raise ValueError(f"the runs' held-out answers are to {len(prompts)} sets of prompts")
    keys = prompts.pop()
    table = {name: np.array([scores[key] for key in keys]) for name, scores in players.items()}
    rows = []
    for a, mine in table.items():
        for b, other in table.items():
            wins = np.where(mine > other, 1.0, np.where(mine == other, 0.5, 0.0))
            low, high = _bootstrap(wins)
            rows.append(
                {"row": a, "column": b, "win_rate": 100 * wins.mean(), "low": 100 * low,
                 "high": 100 * high, "ties": float((mine == other).mean()), "prompts": len(keys)}
            )  # fmt: skip
    return PaperFigure("figure2_win_rates", rows, _matrix(rows, "Win rate of row over column, %"))


def published_win_rates(name: str) -> PaperFigure:
    data = published.load(name)
    rows = [
        {
            "row": row["model"],
            "column": column,
            "win_rate": float(row[column]),
            "source": data.source,
        }
        for row in data.rows
        for column in row
        if column != "model"
    ]
    title = "Length-controlled win rate, AlpacaEval 2.0, %"
    return PaperFigure(f"published_{name}", rows, _matrix(rows, title, data.source))


def _matrix(rows: Rows, title: str, source: str | None = None) -> bytes:
    names = list(dict.fromkeys(row["row"] for row in rows))
    values = np.array([row["win_rate"] for row in rows]).reshape(len(names), -1)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(False)
        shown = axes.imshow(
            values,
            cmap="Greys" if source else "RdBu",
            vmin=20,
            vmax=120 if source else 80,
        )
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                dark = shown.norm(value) > 0.8 or (not source and shown.norm(value) < 0.2)
                axes.text(
                    j, i, f"{value:.1f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else _INK, style="italic" if source else "normal",
                )  # fmt: skip
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.set_title(title)
        for spine in axes.spines.values():
            spine.set_visible(False)

    size = 2.4 + 0.52 * len(names)
    return _svg((size + 0.6, size), draw, source)


# --- Figure 3: rewards ----------------------------------------------------------------------------


def reward_histograms(runs: Sequence[RunData], labels: Sequence[str]) -> list[PaperFigure]:
    """Scores of greedy held-out answers: of each run's last iteration, and of each iteration."""
    _check_one_ranker(runs, "a histogram of rewards")
    groups = {
        label: [s for s in _greedy(run, _last(run)).values()]
        for run, label in zip(runs, labels, strict=True)
    }
    figures = [_histogram("figure3_rewards_by_run", "after the last iteration", groups)]
    for run, label in zip(runs, labels, strict=True):
        by_iteration = {
            f"iteration {t}" if t else "start": list(_greedy(run, t).values())
            for t in run.iterations
        }
        name = f"figure3_rewards_by_iteration_{_slug(label)}"
        figures.append(_histogram(name, label, {k: v for k, v in by_iteration.items() if v}))
    return figures


def _histogram(name: str, title: str, groups: Mapping[str, Sequence[float]]) -> PaperFigure:
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
            colour = _COLOURS[i % len(_COLOURS)]
            axes.stairs(shares, edges, color=colour, linewidth=1.6, fill=False, linestyle=_dashes(i),
                        label=f"{group} (mean {number(float(np.mean(scores)))})")  # fmt: skip
            axes.plot(
                np.mean(scores), 0, marker=_MARKERS[i % 6], color=colour, clip_on=False, zorder=4
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("reward of greedy held-out answers; markers: means")
        axes.set_ylabel("share of answers")
        axes.set_title(f"Rewards {title}" if title.startswith("after") else f"Rewards of {title}")
        axes.legend()

    return PaperFigure(name, rows, _svg((5.6, 3.4), draw))


# --- Figures 4 and 5: implicit rewards, SELM minus DPO --------------------------------------------


@dataclass(frozen=True)
class Implicit:
    """Implicit rewards beta * log(pi / pi_ref) of one policy, by prompt, for each role."""

    label: str
    of: Mapping[str, Mapping[str, float]]  # role -> prompt id -> reward


def implicit_differences(
    name: str, title: str, baseline: Implicit, others: Sequence[Implicit]
) -> PaperFigure:
    """Implicit reward minus the baseline's, prompt by prompt, sorted: one curve for each role.

    Raises ValueError where two policies were not asked about the same prompts.
    """
    rows = []
    for other in others:
        for role, rewards in other.of.items():
            base = baseline.of[role]
            if set(base) != set(rewards):
                raise ValueError(f"{other.label} and {baseline.label}: {role} of different prompts")
            gaps = sorted((rewards[p] - base[p], p) for p in base)
            rows += [
                {"run": other.label, "minus": baseline.label, "role": role, "place": i, "prompt_id": p,
                 "reward": rewards[p], "baseline_reward": base[p], "difference": gap}
                for i, (gap, p) in enumerate(gaps)
            ]  # fmt: skip
    roles = list(others[0].of)

    def draw(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(1, len(roles), sharey=True))
        for role, axes in zip(roles, panels, strict=True):
            axes.axhline(0, color=_MUTED, linewidth=0.8)
            for i, other in enumerate(others):
                gaps = [
                    r["difference"] for r in rows if (r["run"], r["role"]) == (other.label, role)
                ]
                above = np.mean(np.array(gaps) > 0)
                axes.plot(
                    range(1, len(gaps) + 1), gaps, color=_COLOURS[i % len(_COLOURS)], linewidth=1.6,
                    linestyle=_dashes(i),
                    label=f"{other.label}: {100 * above:.0f} % above 0",
                )  # fmt: skip
            axes.set_title(role)
            axes.set_xlabel("prompts, sorted for each curve")
            axes.legend()
        panels[0].set_ylabel(f"implicit reward minus {baseline.label}'s")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)

    return PaperFigure(name, rows, _svg((4.2 * len(roles) + 0.6, 3.5), draw))


def own_samples(run: RunData, label: str, t: int, beta: float) -> Implicit:
    """Implicit rewards of a policy's own held-out samples, from what its evaluation stored.

    The reference is the run's start model; a prompt's samples are averaged.
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
"""Panels by the settings that are changed; a run is in the first that names one of its changes."""


def panels(runs: Sequence[RunData], labels: Sequence[str]) -> PaperFigure | None:
    """Held-out reward after the last iteration, one panel for each kind of change to the first run.

    None if no run differs from the first in a setting of `PANELS`, or none was evaluated.
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
                colour = _MUTED if x == 0 else _COLOURS[(x - 1) % len(_COLOURS)]
                axes.plot([x, x], [row["low"], row["high"]], color=colour, linewidth=1.6)
                axes.plot(x, row["reward"], _MARKERS[x % 6], color=colour)
            axes.axhline(mine[0]["reward"], color=_MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.set_xticks(range(len(mine)), [row["run"] for row in mine], rotation=30, ha="right")
            axes.set_xlim(-0.6, max(len(mine), 3) - 0.4)
            axes.grid(False, axis="x")
            axes.set_title(panel)
        for axes in grid[::cut]:
            axes.set_ylabel("held-out reward, 95 %")

    height = 3.1 * -(-len(names) // 3)
    return PaperFigure(
        "figure6_one_change", rows, _svg((3.0 * min(len(names), 3) + 0.6, height), draw)
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


# --- what was published ---------------------------------------------------------------------------


def published_figures() -> list[PaperFigure]:
    """Tables 1 and 2, the model cards and figure 2 of the paper, marked as what they are."""
    made = []
    for name, column, unit in (
        ("table1", "lc_win_rate", "length-controlled win rate, AlpacaEval 2.0, %"),
        ("table1", "mt_bench", "MT-Bench"),
        ("table2", "mean", "mean of six academic benchmarks"),
        ("model_cards", "lc_win_rate", "length-controlled win rate, AlpacaEval 2.0, %"),
        ("model_cards", "mt_bench", "MT-Bench"),
    ):
        made.append(_published_by_iteration(published.load(name), column, unit))
    return made + [published_win_rates(n) for n in published.NAMES if n.startswith("figure2")]


def _published_by_iteration(data: published.Published, column: str, unit: str) -> PaperFigure:
    shown = [(row, value) for row, value in data.numbers(column) if row["iteration"]]
    bases = list(dict.fromkeys(row["base"] for row, _ in shown))
    rows = [
        {key: row[key] for key in ("model", "base", "method", "iteration")}
        | {column: value, "source": data.source}
        for row, value in data.numbers(column)
    ]

    def draw(figure: Figure) -> None:
        grid = np.atleast_1d(figure.subplots(1, len(bases)))
        for base, axes in zip(bases, grid, strict=True):
            points = [
                (row["method"], int(row["iteration"]), value)
                for row, value in shown
                if row["base"] == base
            ]
            start = [(t, value) for method, t, value in points if method == "start"]
            for method, marker in (("DPO", "s"), ("SELM", "o")):
                line = start + [(t, value) for m, t, value in points if m == method]
                if len(line) > len(start):
                    axes.plot(
                        *zip(*line, strict=True), marker=marker, markerfacecolor="white", color=_PUBLISHED,
                        linestyle=":", linewidth=1.3, label=f"{method}, {published.LABEL}",
                    )  # fmt: skip
            axes.set_title(base, style="italic")
            axes.set_xlabel("iteration; 0: the start")
            axes.set_xticks(range(4))
            axes.legend(fontsize=7)
        grid[0].set_ylabel(unit)

    name = f"published_{data.name}_{column}"
    return PaperFigure(name, rows, _svg((3.5 * len(bases) + 0.4, 3.4), draw, data.source))


# --- what they share ------------------------------------------------------------------------------


def _svg(
    size: tuple[float, float], draw: Callable[[Figure], None], source: str | None = None
) -> bytes:
    """The drawing; with a source it says that its numbers were published elsewhere."""
    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        if source is not None:
            figure.text(
                0.99, 0.995, published.LABEL, ha="right", va="top", fontsize=8, color="#a33c00"
            )
        out = io.BytesIO()
        figure.savefig(
            out, format="svg", facecolor="white", metadata={"Date": None, "Creator": None}
        )
        return out.getvalue()


def _dashes(i: int) -> Any:
    return ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))[i % 4]


def _last(run: RunData) -> int:
    return max((a.iteration for a in run.answers), default=0)


def _greedy(run: RunData, t: int) -> dict[tuple[str, str], float]:
    return {
        (a.prompt_id, a.prompt): a.score
        for a in run.answers
        if a.kind == "greedy" and a.iteration == t
    }


def _check_one_ranker(runs: Sequence[RunData], what: str) -> None:
    rankers = {
        tuple(
            (k, v)
            for k, v in run.settings.items()
            if k.startswith(("feedback.ranker", "feedback.settings"))
        )
        for run in runs
    }
    if len(rankers) > 1:
        raise ValueError(
            f"the runs were scored by {len(rankers)} rankers, so {what} over all of them means "
            f"nothing: {'; '.join(', '.join(v for _, v in r) for r in sorted(rankers))}. Name runs of one"
        )


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    if values.std() == 0:
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)
