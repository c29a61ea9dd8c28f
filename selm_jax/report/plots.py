"""Single plots as inline SVG that follows the page's light or dark colours.

matplotlib draws with marker colours that stand for roles; `_inline` replaces each by a CSS
variable, so one drawing serves both colour schemes. No text of a run's author enters a drawing:
run names stand in the page's legends, where they are escaped. The bytes depend on the input alone.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

_ROLES = ("ink", "muted", "grid", "surface", "c0", "c1", "c2", "c3", "c4", "c5")
_COLOUR = {role: f"#fe00{index:02x}" for index, role in enumerate(_ROLES)}
_RC = {
    "svg.hashsalt": "selm_jax.report",  # otherwise ids differ from run to run
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "path.simplify_threshold": 0.4,  # of a point: long curves stay small, no change is visible
    "font.size": 9.5,
    "axes.unicode_minus": True,
    "text.usetex": False,
}
_SIZE = (4.7, 2.75)  # inches; drawn at the width of its column
_DASHES = ("", "5 2", "1.6 1.8", "7 2 1.6 2")
_MARKERS = "os^Dv"


@dataclass(frozen=True)
class Style:
    """How one line looks: its colour's role, its dashes (SVG units) and its marker."""

    colour: str
    dashes: str = ""
    marker: str = "o"
    hollow: bool = False
    thin: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one line; NaN leaves a gap. Intervals are (low, high) bounds, not lengths;
    NaN where a point has none."""

    style: Style
    x: Sequence[float]
    y: Sequence[float]
    y_interval: Sequence[tuple[float, float]] | None = None
    x_interval: Sequence[tuple[float, float]] | None = None
    tags: Sequence[str] | None = None
    markers: bool = True
    faint: bool = False


@dataclass(frozen=True)
class Part:
    """One part of every stacked bar: values per bar, and the text written inside each."""

    colour: str
    values: Sequence[float]
    texts: Sequence[str]


@dataclass(frozen=True)
class Estimated:
    """A value with its 95 % interval if it has one, and the single values that it is the mean of."""

    colour: str
    value: float
    low: float | None
    high: float | None
    singles: Sequence[float] = ()


def run_style(index: int) -> Style:
    """Colour, dashes and marker of the index-th run: told apart without seeing any colour."""
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
) -> Markup:
    """Lines with optional interval bars. `rules` are vertical separators, `zero` marks y = 0,
    `percent` writes y as per cent of 1, `include` names values that the y axis must reach."""
    with matplotlib.style.context(["default", _RC]):
        figure, axes = _axes(xlabel)
        for x in rules:
            axes.axvline(x, color=_COLOUR["grid"], linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.5)
        if zero:
            axes.axhline(0, color=_COLOUR["muted"], linewidth=0.8, zorder=1)
            axes.spines["bottom"].set_visible(False)
        for one in series:
            _draw(axes, one)
        if whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=7))
            axes.margins(x=0.08)
        low, high = axes.get_ylim()
        middle, least = (low + high) / 2, 0.01 * max(abs(low), abs(high))
        if high - low < least:  # a curve that stands still: rounding shall not look like movement
            axes.set_ylim(middle - least / 2, middle + least / 2)
        if include:
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, *include, 1.02 * min(include)), max(high, *include))
            if low >= min(include) - 0.1 * (high - low):  # nothing lies below: no empty margin
                axes.set_ylim(bottom=min(include))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g}\u00a0%"))
        else:
            _scale(axes)
        return _inline(figure, key, alt)


def columns(labels: Sequence[str], parts: Sequence[Part], *, key: str, alt: str) -> Markup:
    """Upright stacked bars of shares, 0..1, one per label."""
    with matplotlib.style.context(["default", _RC]):
        figure, axes = _axes("iteration")
        below = [0.0] * len(labels)
        for part in parts:
            axes.bar(
                range(len(labels)),
                part.values,
                bottom=below,
                width=0.62,
                color=_COLOUR[part.colour],
                edgecolor=_COLOUR["surface"],
                linewidth=1.2,
            )
            for place, (value, text) in enumerate(zip(part.values, part.texts, strict=True)):
                if value >= 0.08:  # a lower one has no room for its text
                    _inside(axes, place, below[place] + value / 2, text)
            below = [b + v for b, v in zip(below, part.values, strict=True)]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylim(0, 1)
        middle, half = (len(labels) - 1) / 2, max(len(labels), 3) / 2 + 0.1
        axes.set_xlim(middle - half, middle + half)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}\u00a0%"))
        return _inline(figure, key, alt)


def strips(
    labels: Sequence[str],
    parts: Sequence[Part],
    *,
    key: str,
    alt: str,
    xlabel: str,
    longest: float,
) -> Markup:
    """Lying stacked bars, one per label, first label on top. `longest` sets the axis, so that
    several of these plots can be compared."""
    with matplotlib.style.context(["default", _RC]):
        figure, axes = _axes(xlabel, height=0.75 + 0.34 * max(len(labels), 2))
        before = [0.0] * len(labels)
        for part in parts:
            axes.barh(
                range(len(labels)),
                part.values,
                left=before,
                height=0.6,
                color=_COLOUR[part.colour],
                edgecolor=_COLOUR["surface"],
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
        axes.grid(True, axis="x", color=_COLOUR["grid"], linewidth=0.8)
        return _inline(figure, key, alt)


def estimates(labels: Sequence[str], rows: Sequence[Estimated], *, key: str, alt: str) -> Markup:
    """Values with intervals beside a line at 0, one row for each label, the first on top.

    The labels are written into the drawing: they must not be text that a run's author wrote, but
    names of settings.
    """
    with matplotlib.style.context(["default", _RC]):
        figure, axes = _axes("", height=0.7 + 0.34 * max(len(labels), 2))
        axes.axvline(0, color=_COLOUR["muted"], linewidth=0.9, zorder=1)
        for y, one in enumerate(rows):
            colour = _COLOUR[one.colour]
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [y, y], color=colour, linewidth=1.9, zorder=2)
            axes.plot(one.value, y, "o", color=colour, markersize=6.5, zorder=3)
            below = [y + 0.27] * len(one.singles)
            axes.plot(one.singles, below, "o", color=colour, markersize=2.8, alpha=0.7, zorder=2)
        axes.set_yticks(range(len(labels)), [_escaped(label) for label in labels])
        axes.set_ylim(max(len(labels), 2) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=_COLOUR["grid"], linewidth=0.8)
        axes.margins(x=0.08)
        return _inline(figure, key, alt)


def _escaped(text: str) -> str:
    """A label that matplotlib takes literally: a dollar would begin a formula."""
    return text.replace("$", r"\$")


def swatch(style: Style, block: bool = False) -> Markup:
    """A legend's sample of a line, or of a bar's colour, drawn as the plots draw it."""
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
    axes.spines["bottom"].set_color(_COLOUR["muted"])
    axes.tick_params(length=0, labelcolor=_COLOUR["muted"], pad=5)
    axes.grid(True, axis="y", color=_COLOUR["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=_COLOUR["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
    return figure, axes


def _draw(axes: Axes, one: Series) -> None:
    style, colour = one.style, _COLOUR[one.style.colour]
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
        markerfacecolor=_COLOUR["surface"] if style.hollow else colour,
        markeredgecolor=colour,
        solid_joinstyle="round",
        clip_on=False,  # a marker on the axis stays whole
    )
    if style.dashes and not one.faint:
        # The page's dashes are in SVG units, matplotlib's in line widths.
        width = line.get_linewidth()
        line.set_dashes([float(length) / width for length in style.dashes.split()])
    for x, y, tag in zip(one.x, one.y, one.tags or (), strict=False):
        if math.isfinite(x) and math.isfinite(y):
            axes.annotate(
                tag,
                (x, y),
                xytext=(5, 5),
                textcoords="offset points",
                color=_COLOUR["ink"],
                annotation_clip=False,
            )


def _inside(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center_baseline", color=_COLOUR["surface"], fontsize=8.5)


def _scale(axes: Axes) -> None:
    """Takes a power of ten out of very small y values and writes it above the axis."""
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
        color=_COLOUR["muted"],
        fontsize=8.5,
    )


def _tick(value: float) -> str:
    text = f"{value:.6g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return text.replace("-", "−")


def _inline(figure: Figure, key: str, alt: str) -> Markup:
    """The figure as an `<svg>` for the middle of a page: no prolog, no ids but its own."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    view = re.search(r'viewBox="([^"]*)"', svg)
    body = re.search(r"<svg[^>]*>(.*)</svg>", svg, re.DOTALL)
    assert view and body, "matplotlib writes one svg element with a viewBox"
    inner = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body[1], flags=re.DOTALL)
    inner = re.sub(r"font-family: [^;\"]*;? ?", "", inner)
    inner = re.sub(r"#fe00([0-9a-f]{2})", lambda m: f"var(--{_ROLES[int(m[1], 16)]})", inner)
    inner = inner.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', inner))
    inner = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", inner)
    inner = re.sub(r'(href="#|url\(#)', lambda m: f"{m[1]}{key}-", inner)
    inner = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', _short_numbers, inner)
    inner = re.sub(r">\s+<", "><", inner).strip()
    return Markup(
        f'<svg class="plot" viewBox="{view[1]}" role="img" aria-label="{html.escape(alt)}">'
        f"{inner}</svg>"
    )


def _short_numbers(match: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point, which no screen shows."""
    text = re.sub(r"(\.\d\d)\d+", r"\1", match[0])
    return re.sub(r"\s*\n\s*", " ", text)
