"""What a run logs at every update, as plots: losses, implicit rewards, throughput."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from selm_jax.report.data import RunData, Update
from selm_jax.report.plots import Series, Style, lines, run_style, swatch
from selm_jax.report.summary import number

Legend = tuple[tuple[Markup, str], ...]
"""Samples of lines or colours with what they stand for."""

_UPDATES = "update, counted through the whole run"


@dataclass(frozen=True)
class Plot:
    """`svg` is None where no run has anything to draw yet; the page then says so."""

    title: str
    how: str
    svg: Markup | None
    legend: Legend = ()


def loss_plots(runs: Sequence[RunData]) -> list[Plot]:
    smooth = "Faint: every update; line: running mean."
    return [
        by_update(runs, "loss", "Loss", f"The two terms together. {smooth}"),
        by_update(
            runs,
            "loss/dpo",
            "Preference term",
            "Starts at log 2 ≈ 0.69 in every iteration, because policy and reference are then "
            "the same. Dotted rules part the iterations.",
        ),
        by_update(
            runs,
            "loss/optimism",
            "Optimism term",
            "Starts at 0 and falls as the policy leaves the explored answers of the model it "
            "started from. Mind the scale: it is small beside the preference term.",
        ),
        by_update(
            runs,
            "logps/chosen",
            "Log-probability of chosen answers",
            "Sum over the answer, nats. A steady fall while the margin grows means that both "
            "answers lose probability.",
        ),
        by_update(
            runs, "grad_norm", "Gradient norm", "Before clipping. Spikes name the updates to doubt."
        ),
        by_update(runs, "learning_rate", "Learning rate", "As applied at each update."),
    ]


def implicit_reward_plots(runs: Sequence[RunData]) -> list[Plot]:
    roles = [
        ("rewards/chosen", "chosen", Style("c2", marker="^")),
        ("rewards/rejected", "rejected", Style("c1", dashes="5 2", marker="s")),
        ("optimism/reward", "explore", Style("c0", dashes="1.6 1.8", marker="o")),
    ]
    how = (
        "β times the log-ratio of policy to reference; 0 at the start of an iteration. Chosen "
        "should end above rejected; all three falling together is the usual drift of DPO."
    )
    if len(runs) > 1:
        plots = [by_update(runs, key, f"Implicit reward, {role}", how) for key, role, _ in roles]
    else:
        series, present = [], []
        for key, role, style in roles:
            curve = _curve(runs[0].updates, key, style)
            series += curve
            if curve:
                present.append((swatch(Style(style.colour, style.dashes, "")), role))
        svg = _update_svg(runs, series, "implicit", "Implicit rewards of chosen, rejected, explore")
        plots = [Plot("Implicit rewards", how, svg, tuple(present))]
    plots.append(
        by_update(
            runs, "rewards/margins", "Margin", "Chosen minus rejected. It should grow from 0."
        )
    )
    plots.append(
        by_update(
            runs,
            "rewards/accuracies",
            "Accuracy",
            "Share of pairs whose chosen answer has the higher implicit reward. Near 100 % early "
            "means that pairs are easy or are being memorised.",
            percent=True,
        )
    )
    return plots


def by_update(
    runs: Sequence[RunData],
    metric: str,
    title: str,
    how: str,
    *,
    percent: bool = False,
    include: Sequence[float] = (),
) -> Plot:
    series = [s for i, run in enumerate(runs) for s in _curve(run.updates, metric, run_style(i))]
    key = metric.replace("/", "-").replace("_", "-")
    return Plot(title, how, _update_svg(runs, series, key, title, percent=percent, include=include))


def _update_svg(
    runs: Sequence[RunData],
    series: list[Series],
    key: str,
    title: str,
    *,
    percent: bool = False,
    include: Sequence[float] = (),
) -> Markup | None:
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
    )


def _curve(updates: Sequence[Update], metric: str, style: Style) -> list[Series]:
    """One metric over updates, broken between iterations: the reference changes there."""
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
    smooth = Series(style=style, x=x, y=mean, markers=len(present) < 24)
    return [smooth] if raw == mean else [Series(style, x, raw, markers=False, faint=True), smooth]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over up to `width` values; NaN values are left out.

    The window stays symmetric and so narrows to one value at both ends: the curve keeps the first
    value, which theory knows (log 2 for the preference term), and the last.
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
    """The values in words, for those who do not see the plot."""
    texts = []
    for place, one in enumerate(series, 1):
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
        if not points:
            continue
        shown = [points[0], points[-1]] if ends and len(points) > 2 else points
        values = ", ".join(f"{number(y)} at {number(round(x, 1))}" for x, y in shown)
        texts.append(f"Line {place}: {values}." if len(series) > 1 else f"{values}.")
    return " ".join(texts)
