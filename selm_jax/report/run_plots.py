"""Plots a run's evaluation and ranking: reward, KL, answers, explored answers, the gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from selm_jax.preferences.selection import PLACES
from selm_jax.report.curves import Legend, Plot, values_in_words
from selm_jax.report.data import KINDS, RunData
from selm_jax.report.plots import Part, Series, Style, columns, lines, run_style, swatch
from selm_jax.report.summary import measured, percent

_KIND_REWARD = {"greedy": "Greedy", "sample": "Sampled"}
_KIND_TITLE = {"greedy": "greedy answers", "sample": "sampled answers"}

Point = tuple[int, float, float, float]  # (iteration, value, ends of its bar or NaN)


def run_legend(labels: Sequence[str]) -> Legend:
    """The legend that names several runs; empty for a single run."""
    if len(labels) == 1:
        return ()
    return tuple((swatch(run_style(i)), label) for i, label in enumerate(labels))


def reward_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    plots = []
    for kind in KINDS:
        plots.append(
            by_iteration(
                runs,
                labels,
                f"reward_{kind}",
                lambda run, kind=kind: _interval_metric(run, f"reward_{kind}"),
                title=f"Reward of {_KIND_TITLE[kind]}",
                how="Mean score on the held-out prompts (a ranker that compares answers also gets "
                "the start model's greedy answer); bars are 95 % intervals. Iteration 0 is the "
                "start model. Overlapping bars do not mean that there is no difference: the "
                "prompts are the same, so look at the gain.",
            )
        )
    plots.append(
        by_iteration(
            runs,
            labels,
            "gain",
            lambda run: _interval_metric(run, "gain"),
            title="Gain over the start model",
            how="Score of each prompt's greedy answer minus that of the start model's answer to "
            "the same prompt. A bar that does not touch the zero line is a clear change.",
            zero=True,
        )
    )
    return plots


_OF_SETS = (
    ("reward_greedy", "reward of greedy answers"),
    ("gain", "gain over the start model"),
    ("capability", "capability, nats per token"),
    ("kl", "KL from the start, nats per answer"),
    ("accuracy", "accuracy on pairs"),
)


def set_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    """Plots the measures of each named held-out set."""
    sets = dict.fromkeys(name for run in runs for name in run.heldout_sets)
    plots = [
        by_iteration(
            runs, labels, f"set-{of}-{name}",
            lambda run, of=of, name=name: _interval_metric(run, run.of_set(of, name)),
            title=f"{of}: {words}",
            how="Bars are 95 % intervals over the prompts of this set.",
            zero=name in ("gain", "capability"),
        )
        for of in sets
        for name, words in _OF_SETS
    ]  # fmt: skip
    return [plot for plot in plots if plot.drawing]


def frontier_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    plots = []
    for kind in reversed(KINDS):
        series = []
        for index, run in enumerate(runs):
            points = [
                (kl, (low, high), *reward, k)
                for k, kl, low, high in _interval_metric(run, "kl")
                if (reward := _interval(run, k, f"reward_{kind}")) is not None
            ]
            if points:
                series.append(
                    Series(
                        style=run_style(index),
                        x=[p[0] for p in points],
                        y=[p[2] for p in points],
                        x_interval=[p[1] for p in points],
                        y_interval=[(p[3], p[4]) for p in points],
                        tags=[str(p[5]) for p in points],
                        label=labels[index],
                    )
                )
        alt = (
            f"Held-out reward of {_KIND_TITLE[kind]} against KL from the start. "
            + values_in_words(series)
        )
        plots.append(
            Plot(
                title=f"{_KIND_REWARD[kind]} reward against KL",
                how="Each numbered point is an iteration. Up is better, left is closer to the "
                "start model; the better of two methods is higher at the same KL. Bars are 95 % "
                "intervals of both values. KL is estimated from sampled answers.",
                drawing=lines(
                    series,
                    key=f"frontier-{kind}",
                    alt=alt,
                    xlabel="KL from the start, nats per answer",
                    title=f"{_KIND_REWARD[kind]} reward against KL",
                )
                if series
                else None,
            )
        )
    plots.append(
        by_iteration(
            runs,
            labels,
            "kl",
            lambda run: _interval_metric(run, "kl"),
            title="KL from the start, nats per answer",
            how="Mean log-ratio of the model to the start model over its own sampled answers. "
            "If KL grows while the reward does not, the change is useless. Chance can make a "
            "small estimate negative.",
            include=(0, 0),
        )
    )
    return plots


def answer_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    """Plots the answers' length, the variety of words, and the share cut off by the token limit."""
    specs: list[tuple[str, str, str, tuple[float, float]]] = [
        (
            "words",
            "Mean length, words",
            "Some rankers prefer long answers. Compare this with the reward, to see whether it "
            + "grows only with length.",
            (0, 0),
        ),
        (
            "distinct_2",
            "Distinct-2",
            "Share of different word pairs among all word pairs of all answers. It falls if "
            + "answers repeat themselves or each other, and a little if they become longer.",
            (0, 1),
        ),
        (
            "cut_off",
            "Cut-off answers",
            "Share of answers that reached the length limit before they ended. A rise often "
            + "means that the policy no longer ends its answers.",
            (0, 0.2),
        ),
    ]
    tables = [{kind: measured(run, kind) for kind in KINDS} for run in runs]
    plots = []
    for key, title, how, include in specs:
        series = []
        for index, table in enumerate(tables):
            for kind in KINDS:
                if table[kind]:
                    series.append(
                        Series(
                            style=_kind_style(index, kind),
                            x=list(table[kind]),
                            y=[getattr(value, key) for value in table[kind].values()],
                            label=f"{labels[index]}, {kind}" if len(runs) > 1 else kind,
                        )
                    )
        alt = f"{title} by iteration. " + values_in_words(series)
        drawing = lines(
            series,
            key=key.replace("_", "-"),
            alt=alt,
            xlabel="iteration",
            whole_x=True,
            percent=key == "cut_off",
            include=include,
            title=title,
        )
        plots.append(Plot(title=title, how=how, drawing=drawing if series else None))
    return plots


def answer_legend(labels: Sequence[str]) -> Legend:
    prefix = [f"{label}, " for label in labels] if len(labels) > 1 else [""]
    return tuple(
        (swatch(_kind_style(i, kind)), f"{label}{kind}")
        for i, label in enumerate(prefix)
        for kind in KINDS
    )


def explore_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    colours: dict[str, str] = dict(zip(PLACES, ("c0", "c5", "c1", "c4"), strict=True))
    plots = []
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        counts = {
            k: stages["rank"].explored for k, stages in run.stages.items() if "rank" in stages
        }
        counts = {k: row for k, row in counts.items() if sum(row.values())}
        places = [p for p in PLACES if p != "tied" or any(row[p] for row in counts.values())]
        parts = []
        for place in places:
            shares = [row[place] / sum(row.values()) for row in counts.values()]
            parts.append(Part(colours[place], shares, [percent(share) for share in shares], place))
        alt = "Place of the explored answer among the ranked. " + " ".join(
            f"Iteration {k}: " + ", ".join(f"{row[place]:.0f} {place}" for place in places) + "."
            for k, row in counts.items()
        )
        drawing = columns(
            [str(k) for k in counts],
            parts,
            key=f"explore-{index}",
            alt=alt,
            title="Place of the explored answer",
        )
        plots.append(
            Plot(
                title=label if len(runs) > 1 else "Place of the explored answer",
                how="Place among the ranked answers to its prompt, including shared places. The "
                "best answer is usually the chosen one, and the worst the rejected one; an answer "
                "in the middle only matters for the optimism term. Tied: all scores are equal.",
                drawing=drawing if counts else None,
                legend=tuple((swatch(Style(colours[p]), block=True), p) for p in places),
            )
        )
    return plots


def gap_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    """Plots how far the sampler's log-probabilities are from the scorer's, by iteration."""
    specs = [
        (
            "gap/mean",
            "Sampler against scorer, nats per token",
            "Mean absolute difference of the log-probabilities of the same tokens. It is rounding, "
            + "below 0.05, if both have the same weights. A jump means that the answers come from "
            + "another model, another precision or another prompt.",
        ),
        (
            "gap/k3",
            "KL of sampler and scorer, nats per token",
            "The K3 estimate: the mean of exp(d) - 1 - d for the difference d. A few tokens that "
            + "are far off count more here than in the mean.",
        ),
    ]
    return [
        plot
        for key, title, how in specs
        if (
            plot := by_iteration(
                runs, labels, key, lambda run, key=key: _gap(run, key), title=title, how=how,
                include=(0, 0),
            )
        ).drawing
    ]  # fmt: skip


def _gap(run: RunData, key: str) -> list[Point]:
    found = ((k, s["score"].counts.get(key)) for k, s in run.stages.items() if "score" in s)
    return [(k, value, math.nan, math.nan) for k, value in found if value is not None]


def by_iteration(
    runs: Sequence[RunData],
    labels: Sequence[str],
    key: str,
    points: Callable[[RunData], list[Point]],
    *,
    title: str,
    how: str,
    zero: bool = False,
    include: Sequence[float] = (),
) -> Plot:
    """Plots a value of each run by iteration; the drawing is None if no run has a point.

    Args:
      key: a name for the plot that is unique on the page.
      points: the points of a run.
      how: explains to the reader how to read the plot.
      zero: whether to draw a line at 0.
      include: values that the axis must show.
    """
    series = []
    for index, run in enumerate(runs):
        rows = points(run)
        # Runs are shifted a little, so that intervals do not hide each other.
        shift = 0.06 * (index - (len(runs) - 1) / 2) if len(runs) > 1 else 0.0
        if rows:
            series.append(
                Series(
                    style=run_style(index),
                    x=[row[0] + shift for row in rows],
                    y=[row[1] for row in rows],
                    y_interval=[(row[2], row[3]) for row in rows],
                    label=labels[index],
                )
            )
    if not series:
        return Plot(title, how, None)
    alt = f"{title} by iteration. " + values_in_words(series)
    drawing = lines(
        series,
        key=key.replace("_", "-").replace("/", "-"),
        alt=alt,
        xlabel="iteration",
        whole_x=True,
        zero=zero,
        include=include,
        title=title,
    )
    return Plot(title, how, drawing)


def _interval(run: RunData, k: int, name: str) -> tuple[float, float, float] | None:
    value = run.metric(k, name)
    if value is None:
        return None
    low, high = run.metric(k, f"{name}_low"), run.metric(k, f"{name}_high")
    return value, math.nan if low is None else low, math.nan if high is None else high


def _interval_metric(run: RunData, name: str) -> list[Point]:
    found = [(k, _interval(run, k, name)) for k in run.evaluations]
    return [(k, *values) for k, values in found if values is not None]


def _kind_style(index: int, kind: str) -> Style:
    base = run_style(index)
    if kind == "greedy":
        return base
    return Style(base.colour, "1.2 2", base.marker, hollow=True, thin=True)
