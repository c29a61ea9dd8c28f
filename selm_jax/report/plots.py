"""Draws single plots: lines, stacked bars, and estimates next to a line at zero.

Each function returns a `Drawing`: the SVG for the page, a PDF for a paper, and the data as CSV. The
SVG contains no text written by a run's author: run names are in the page's legends, which escape
them. The same input gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from selm_jax.report.drawn import COLOUR, RC, Drawing, drawn

_SIZE = (4.7, 2.75)  # inches; drawn at the width of its column
_DASHES = ("", "5 2", "1.6 1.8", "7 2 1.6 2")
_MARKERS = "os^Dv"


@dataclass(frozen=True)
class Style:
    """The style of a line: colour (a CSS variable's name), dashes (in SVG units) and marker."""

    colour: str
    dashes: str = ""
    marker: str = "o"
    hollow: bool = False
    thin: bool = False


@dataclass(frozen=True)
class Series:
    """The points of one line in a plot; NaN leaves a gap.

    Intervals are (low, high) bounds, not lengths; NaN means that a point has none. `label` is the
    name of the line in the PDF and in the data.
    """

    style: Style
    x: Sequence[float]
    y: Sequence[float]
    y_interval: Sequence[tuple[float, float]] | None = None
    x_interval: Sequence[tuple[float, float]] | None = None
    tags: Sequence[str] | None = None
    markers: bool = True
    faint: bool = False
    label: str = ""


@dataclass(frozen=True)
class Part:
    """One segment of stacked bars: its value in each bar, the texts inside, and its name."""

    colour: str
    values: Sequence[float]
    texts: Sequence[str]
    label: str = ""


@dataclass(frozen=True)
class Estimated:
    """A mean, its 95 % interval if known, and the individual values of which it is the mean."""

    colour: str
    value: float
    low: float | None
    high: float | None
    singles: Sequence[float] = ()


def run_style(index: int) -> Style:
    """The line style of the index-th run, distinguishable from other runs' even without colour."""
    return Style(
        colour=f"c{index % 6}",
        dashes=_DASHES[(index + index // 6) % len(_DASHES)],
        marker=_MARKERS[(index + index // 6) % len(_MARKERS)],
    )


def lines(
    series: Sequence[Series],
    *,
    key: str,
    alt: str,
    xlabel: str,
    whole_x: bool = False,
    rules: Sequence[float] = (),
    zero: bool = False,
    percent: bool = False,
    include: Sequence[float] = (),
    title: str = "",
) -> Drawing:
    """Draws lines with optional interval bars.

    Args:
      rules: x values of vertical separators.
      zero: whether to mark y = 0.
      percent: whether to write y as a percentage of 1.
      include: values that the y axis must include.
      title: title of the PDF.
    """
    with matplotlib.style.context(["default", RC]):
        figure, axes = _axes(xlabel)
        for x in rules:
            axes.axvline(x, color=COLOUR["grid"], linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.5)
        if zero:
            axes.axhline(0, color=COLOUR["muted"], linewidth=0.8, zorder=1)
            axes.spines["bottom"].set_visible(False)
        for one in series:
            _draw(axes, one)
        if whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=7))
            axes.margins(x=0.08)
        low, high = axes.get_ylim()
        middle, least = (low + high) / 2, 0.01 * max(abs(low), abs(high))
        if high - low < least:  # in a constant curve, rounding must not look like a change
            axes.set_ylim(middle - least / 2, middle + least / 2)
        if include:
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, *include, 1.02 * min(include)), max(high, *include))
            if low >= min(include) - 0.1 * (high - low):  # no values below, so no empty margin
                axes.set_ylim(bottom=min(include))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g}\u00a0%"))
        else:
            _scale(axes)
        return drawn(figure, key, alt, _points(series, xlabel, whole_x), title)


def _points(series: Sequence[Series], xlabel: str, whole: bool) -> list[dict[str, object]]:
    """Returns the plotted points as rows of data; a running mean gets a second column.

    With `whole`, x is rounded to a count: lines are shifted a little so that they do not hide each
    other, and this shift is not data.
    """
    rows: dict[tuple[str, float], dict[str, object]] = {}
    smoothed = any(one.faint for one in series)
    for one in series:
        name = ("every update" if one.faint else "running mean") if smoothed else "value"
        for i, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
            if math.isfinite(y):
                x = round(x) if whole else x
                row = rows.setdefault((one.label, x), {"line": one.label, xlabel: x})
                row[name] = y
                for of, ends in ((name, one.y_interval), ("x", one.x_interval)):
                    if ends is not None:
                        row |= {f"{of}_low": ends[i][0], f"{of}_high": ends[i][1]}
    return list(rows.values())


def columns(
    labels: Sequence[str], parts: Sequence[Part], *, key: str, alt: str, title: str = ""
) -> Drawing:
    """Draws vertical stacked bars of shares from 0 to 1, one bar per label."""
    with matplotlib.style.context(["default", RC]):
        figure, axes = _axes("iteration")
        below = [0.0] * len(labels)
        for part in parts:
            axes.bar(
                range(len(labels)),
                part.values,
                bottom=below,
                width=0.62,
                color=COLOUR[part.colour],
                label=part.label,
                edgecolor=COLOUR["surface"],
                linewidth=1.2,
            )
            for place, (value, text) in enumerate(zip(part.values, part.texts, strict=True)):
                if value >= 0.08:  # a smaller part has no room for its text
                    _inside(axes, place, below[place] + value / 2, text)
            below = [b + v for b, v in zip(below, part.values, strict=True)]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylim(0, 1)
        middle, half = (len(labels) - 1) / 2, max(len(labels), 3) / 2 + 0.1
        axes.set_xlim(middle - half, middle + half)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}\u00a0%"))
        return drawn(figure, key, alt, _shares(labels, parts, "iteration"), title)


def strips(
    labels: Sequence[str],
    parts: Sequence[Part],
    *,
    key: str,
    alt: str,
    xlabel: str,
    longest: float,
    title: str = "",
) -> Drawing:
    """Draws horizontal stacked bars, one per label, with the first label on top.

    `longest` sets the length of the axis, so that several of these plots can be compared.
    """
    with matplotlib.style.context(["default", RC]):
        figure, axes = _axes(xlabel, height=0.75 + 0.34 * max(len(labels), 2))
        before = [0.0] * len(labels)
        for part in parts:
            axes.barh(
                range(len(labels)),
                part.values,
                left=before,
                height=0.6,
                color=COLOUR[part.colour],
                label=part.label,
                edgecolor=COLOUR["surface"],
                linewidth=1.2,
            )
            for place, (value, text) in enumerate(zip(part.values, part.texts, strict=True)):
                if value / longest >= 0.022 * (len(text) + 1):
                    _inside(axes, before[place] + value / 2, place, text)
            before = [b + v for b, v in zip(before, part.values, strict=True)]
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.03 * longest)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=COLOUR["grid"], linewidth=0.8)
        return drawn(figure, key, alt, _shares(labels, parts, xlabel), title)


def _shares(labels: Sequence[str], parts: Sequence[Part], what: str) -> list[dict[str, object]]:
    return [
        {"bar": label, "part": part.label, what: part.values[i]}
        for i, label in enumerate(labels)
        for part in parts
    ]


def estimates(
    labels: Sequence[str], rows: Sequence[Estimated], *, key: str, alt: str, title: str = ""
) -> Drawing:
    """Draws values with intervals next to a line at 0, one row per label, the first on top.

    The drawing contains the labels, so they must be names of settings and not text that a run's
    author wrote.
    """
    with matplotlib.style.context(["default", RC]):
        figure, axes = _axes("", height=0.7 + 0.34 * max(len(labels), 2))
        axes.axvline(0, color=COLOUR["muted"], linewidth=0.9, zorder=1)
        for y, one in enumerate(rows):
            colour = COLOUR[one.colour]
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [y, y], color=colour, linewidth=1.9, zorder=2)
            axes.plot(one.value, y, "o", color=colour, markersize=6.5, zorder=3)
            below = [y + 0.27] * len(one.singles)
            axes.plot(one.singles, below, "o", color=colour, markersize=2.8, alpha=0.7, zorder=2)
        axes.set_yticks(range(len(labels)), [_escaped(label) for label in labels])
        axes.set_ylim(max(len(labels), 2) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=COLOUR["grid"], linewidth=0.8)
        axes.margins(x=0.08)
        data: list[dict[str, object]] = [
            {"line": label, "value": one.value, "value_low": one.low, "value_high": one.high}
            for label, one in zip(labels, rows, strict=True)
        ]
        return drawn(figure, key, alt, data, title)


def _escaped(text: str) -> str:
    """Escapes a label for Matplotlib, in which a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def swatch(style: Style, block: bool = False) -> Markup:
    """A small SVG for a legend: a sample of a line, or of a bar's colour."""
    colour = f"var(--{style.colour})"
    if block:
        view = "0 0 12 12"
        inner = f'<rect y="1" width="12" height="10" rx="2" style="fill:{colour}"/>'
    else:
        view = "0 0 32 12"
        shapes = {
            "o": '<circle cx="16" cy="6" r="3.4"',
            "s": '<rect x="13" y="3" width="6" height="6"',
            "^": '<path d="M16 2 20 9H12Z"',
            "D": '<path d="M16 2 20 6 16 10 12 6Z"',
            "v": '<path d="M16 10 20 3H12Z"',
            "": "<path",
        }
        fill = "var(--surface)" if style.hollow else colour
        width = 1.1 if style.thin else 2
        inner = (
            f'<path d="M1 6H31" style="stroke:{colour};stroke-width:{width};fill:none;'
            f'stroke-dasharray:{style.dashes or "none"}"/>'
            f'{shapes[style.marker]} style="fill:{fill};stroke:{colour};stroke-width:1.2"/>'
        )
    return Markup(f'<svg class="swatch" viewBox="{view}" aria-hidden="true">{inner}</svg>')


def _axes(xlabel: str, height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOUR["muted"])
    axes.tick_params(length=0, labelcolor=COLOUR["muted"], pad=5)
    axes.grid(True, axis="y", color=COLOUR["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=COLOUR["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
    return figure, axes


def _draw(axes: Axes, one: Series) -> None:
    style, colour = one.style, COLOUR[one.style.colour]
    for x, (low, high) in zip(one.x, one.y_interval or (), strict=False):
        axes.plot([x, x], [low, high], color=colour, linewidth=1.2, alpha=0.75)
    for y, (low, high) in zip(one.y, one.x_interval or (), strict=False):
        axes.plot([low, high], [y, y], color=colour, linewidth=1.2, alpha=0.75)
    (line,) = axes.plot(
        one.x,
        one.y,
        color=colour,
        linewidth=0.7 if one.faint else 1.1 if style.thin else 1.9,
        alpha=0.3 if one.faint else 1.0,
        marker=style.marker if one.markers else "",
        markersize=5,
        markerfacecolor=COLOUR["surface"] if style.hollow else colour,
        markeredgecolor=colour,
        solid_joinstyle="round",
        clip_on=False,  # draw markers on the axis completely
        label="" if one.faint else one.label,
    )
    if style.dashes and not one.faint:
        # The page's dashes are in SVG units, those of Matplotlib in line widths.
        width = line.get_linewidth()
        line.set_dashes([float(length) / width for length in style.dashes.split()])
    for x, y, tag in zip(one.x, one.y, one.tags or (), strict=False):
        if math.isfinite(x) and math.isfinite(y):
            axes.annotate(
                tag,
                (x, y),
                xytext=(5, 5),
                textcoords="offset points",
                color=COLOUR["ink"],
                annotation_clip=False,
            )


def _inside(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center_baseline", color=COLOUR["surface"], fontsize=8.5)


def _scale(axes: Axes) -> None:
    """Factors a power of ten out of very small y values and writes the power above the axis."""
    largest = max(abs(limit) for limit in axes.get_ylim())
    if not 0 < largest < 0.01:
        return
    power = math.floor(math.log10(largest))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v / 10**power)))
    digits = str(-power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    axes.annotate(
        f"× 10⁻{digits}",
        (0, 1),
        xycoords="axes fraction",
        xytext=(2, 3),
        textcoords="offset points",
        color=COLOUR["muted"],
        fontsize=8.5,
    )


def _tick(value: float) -> str:
    text = f"{value:.6g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return text.replace("-", "−")
