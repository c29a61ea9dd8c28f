"""Plots the metrics that a run logs at every update: losses, implicit rewards, throughput."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from selm_jax.report.data import RunData, Update
from selm_jax.report.drawn import Drawing
from selm_jax.report.plots import Series, Style, lines, run_style, swatch
from selm_jax.report.summary import listed, number

Legend = tuple[tuple[Markup, str], ...]
"""Samples of lines or colours with their meanings."""

_UPDATES = "update, counted through the whole run"


@dataclass(frozen=True)
class Plot:
    """A plot with a title and an explanation for the reader.

    `drawing` is None if no run has data to draw yet; the page then says so.
    """

    title: str
    how: str
    drawing: Drawing | None
    legend: Legend = ()


_SMOOTH = "Faint: every update; line: running mean."
_IMPLICIT = (
    "β times the log-ratio of policy to reference; 0 at the start of an iteration. Chosen should "
    "end above rejected. DPO often drifts so that all of them fall together."
)
_TERMS = {
    "loss/dpo": (
        "Preference term",
        "Starts at log 2 ≈ 0.69 in every iteration, where policy and reference are the same.",
    ),
    "loss/optimism": (
        "Optimism term",
        "Starts at 0; below 0, the policy moved away from the explored answers. Note the scale.",
    ),
}
_DRAWN_ELSEWHERE = {
    *("loss", "grad_norm", "learning_rate", "step", "iteration", "examples", "optimism/reward"),
    *("logps/chosen", "logps/rejected"),
}
_KINDS_ELSEWHERE = ("rewards/", "time/", "memory/", "tokens", "padded", "padding")


def loss_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    """Plots what every objective logs: loss, log-probabilities, gradient norm, learning rate."""
    logps = (
        "Sum over the answer, nats. A steady fall while the margin grows means that both answers "
        "lose probability."
    )
    specs = [
        ("loss", "Loss", f"All terms together. {_SMOOTH}"),
        ("logps/chosen", "Log-probability of chosen answers", logps),
        ("logps/rejected", "Log-probability of rejected answers", logps),
        ("grad_norm", "Gradient norm", "Before clipping. Spikes mark suspicious updates."),
        ("learning_rate", "Learning rate", "As applied at each update."),
    ]
    return _present([by_update(runs, labels, *spec) for spec in specs], runs)


def own_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    """Plots the terms of the loss, and every other metric that an objective has logged."""
    found = dict.fromkeys(
        key for run in runs for update in run.updates for key in update.metrics if _is_own(key)
    )
    plots = []
    for key in found:
        title, how = _TERMS.get(key, (_title(key), f"The metric {key} at every update. {_SMOOTH}"))
        having = [
            label
            for run, label in zip(runs, labels, strict=True)
            if any(key in update.metrics for update in run.updates)
        ]
        if len(having) < len(runs):
            how += f" Only {listed(having)} logged it."
        plots.append(by_update(runs, labels, key, title, how))
    return [plot for plot in plots if plot.drawing is not None]


def _is_own(key: str) -> bool:
    return key not in _DRAWN_ELSEWHERE and not key.startswith(_KINDS_ELSEWHERE)


def _title(key: str) -> str:
    kind, _, name = key.partition("/")
    known = {"loss": "Loss term", "log_ratios": "Log-ratio", "logps": "Log-probability"}
    return f"{known[kind]}, {name}" if kind in known and name else key


def implicit_reward_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    roles = [
        ("rewards/chosen", "chosen", Style("c2", marker="^")),
        ("rewards/rejected", "rejected", Style("c1", dashes="5 2", marker="s")),
        (_explore(runs), "explore", Style("c0", dashes="1.6 1.8", marker="o")),
    ]
    if len(runs) > 1:
        plots = [
            by_update(runs, labels, key, f"Implicit reward, {role}", _IMPLICIT)
            for key, role, _ in roles
        ]
    else:
        series, present = [], []
        for key, role, style in roles:
            curve = _curve(runs[0].updates, key, style, role)
            series += curve
            if curve:
                present.append((swatch(Style(style.colour, style.dashes, "")), role))
        title = "Implicit rewards of chosen, rejected, explore"
        drawing = _draw_updates(runs, series, "implicit", title)
        plots = [Plot("Implicit rewards", _IMPLICIT, drawing, tuple(present))]
    margin = "Chosen minus rejected. It should grow from 0."
    accuracy = (
        "Share of pairs whose chosen answer has the higher implicit reward. If it is near 100 % "
        "early, the pairs are easy or are being memorized."
    )
    plots.append(by_update(runs, labels, "rewards/margins", "Margin", margin))
    plots.append(by_update(runs, labels, "rewards/accuracies", "Accuracy", accuracy, percent=True))
    return _present(plots, runs)


def _explore(runs: Sequence[RunData]) -> str:
    """The metric name of the explored answer's reward; early versions used `optimism/reward`."""
    measured = any("rewards/explore" in run.updates[-1].metrics for run in runs if run.updates)
    return "rewards/explore" if measured else "optimism/reward"


def _present(plots: Sequence[Plot], runs: Sequence[RunData]) -> list[Plot]:
    """Drops plots without data, or keeps all plots if no run has trained yet."""
    trained = any(run.updates for run in runs)
    return [plot for plot in plots if plot.drawing is not None or not trained]


def by_update(
    runs: Sequence[RunData],
    labels: Sequence[str],
    metric: str,
    title: str,
    how: str,
    *,
    percent: bool = False,
    include: Sequence[float] = (),
) -> Plot:
    series = [
        s
        for i, (run, label) in enumerate(zip(runs, labels, strict=True))
        for s in _curve(run.updates, metric, run_style(i), label)
    ]
    # The key becomes an id in the drawing, but the author of a loss may use any text as a name.
    key = "u-" + re.sub(r"[^a-z0-9]+", "-", metric.lower()) + f"-{zlib.crc32(metric.encode()):x}"
    drawing = _draw_updates(runs, series, key, title, percent=percent, include=include)
    return Plot(title, how, drawing)


def _draw_updates(
    runs: Sequence[RunData],
    series: list[Series],
    key: str,
    title: str,
    *,
    percent: bool = False,
    include: Sequence[float] = (),
) -> Drawing | None:
    if not series:
        return None
    borders = {tuple(u.index - 0.5 for u in run.updates if u.step == 1) for run in runs}
    rules = sorted(borders.pop())[1:] if len(borders) == 1 else ()
    faint = sorted(series, key=lambda one: not one.faint)
    return lines(
        faint,
        key=key,
        alt=f"{title} over updates. "
        + values_in_words([one for one in series if not one.faint], ends=True),
        xlabel=_UPDATES,
        whole_x=True,
        rules=rules,
        percent=percent,
        include=include,
        title=title,
    )


def _curve(updates: Sequence[Update], metric: str, style: Style, label: str) -> list[Series]:
    """A metric's line over updates, with gaps between iterations, where the reference changes."""
    x: list[float] = []
    raw: list[float] = []
    mean: list[float] = []
    present = [u for u in updates if metric in u.metrics]
    if not any(math.isfinite(u.metrics[metric]) for u in present):
        return []
    for k in sorted({u.iteration for u in present}):
        part = [u for u in present if u.iteration == k]
        values = [u.metrics[metric] for u in part]
        values = [value if math.isfinite(value) else math.nan for value in values]
        width = max(3, len(part) // 15) if len(part) >= 24 else 1
        x += [u.index for u in part] + [part[-1].index + 0.5]
        raw += [*values, math.nan]
        mean += [*running_mean(values, width), math.nan]
    smooth = Series(style=style, x=x, y=mean, markers=len(present) < 24, label=label)
    if raw == mean:
        return [smooth]
    return [Series(style, x, raw, markers=False, faint=True, label=label), smooth]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The centered mean over up to `width` values, ignoring NaN values.

    The window stays symmetric, so it shrinks to one value at both ends. The curve thus keeps the
    last value and the first one, which theory predicts (log 2 for the preference term).
    """
    last = len(values) - 1
    means = []
    for place in range(len(values)):
        half = min(width // 2, place, last - place)
        near = values[place - half : place + half + 1]
        finite = [value for value in near if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def values_in_words(series: Sequence[Series], ends: bool = False) -> str:
    """Describes the plotted values in words, for readers who cannot see the plot."""
    texts = []
    for place, one in enumerate(series, 1):
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
        if not points:
            continue
        shown = [points[0], points[-1]] if ends and len(points) > 2 else points
        values = ", ".join(f"{number(y)} at {number(round(x, 1))}" for x, y in shown)
        texts.append(f"Line {place}: {values}." if len(series) > 1 else f"{values}.")
    return " ".join(texts)
