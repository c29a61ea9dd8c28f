"""Draws the figures of `selm lab`: for its page, and as SVG, PDF and PNG with their command.

The last lines of a file give the command, the seeds and the function that made its numbers; on the
page, they are in the header. Equal records give equal bytes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selm_jax.report.curves import Plot
from selm_jax.report.drawn import COLOUR, Drawing, in_light_colours, inline
from selm_jax.report.files import csv_text
from selm_jax.shell import artifacts

Record = dict[str, Any]

_INK, _MUTED = COLOUR["ink"], COLOUR["muted"]
_RC = {
    "svg.hashsalt": "selm_jax.lab",  # without it, ids would differ every time
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial"],  # every label repeats this list
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _INK,
}
_COLOURS = matplotlib.colors.LinearSegmentedColormap.from_list(
    "regret", ["#0b62a4", "#9cc5e4", "#ffffff", "#f0b590", "#b3541e"]
)
_FULL = 0.3  # relative difference that gets the full colour
# Two rows of panels: algorithms that keep the first reference and all data, and those that do not.
_FIXED = {
    "selm_fixed": ("c1", "-"), "selm_theory": ("c1", ":"), "xpo": ("c3", "-"),
    "dpo_online": ("c0", "-"), "dpo_on_policy": ("c0", "--"), "dpo_passive": ("c0", ":"),
    "greedy": ("c2", "-"), "best_of_4": ("c2", "--"), "uniform": ("c5", "-"),
}  # fmt: skip
_MOVING = {
    "selm_moving": ("c1", "-"), "dpo_moving": ("c0", "-"),
    "selm_practice": ("c1", "--"), "dpo_practice": ("c0", "--"),
    "selm_code": ("c1", ":"), "dpo_code": ("c0", ":"),
}  # fmt: skip


def regret(records: Sequence[Record], file: Path, made_by: str) -> Plot:
    """Plots cumulative regret against rounds, one column per landscape, with 95 % bands.

    The oracle is left out: its regret is hundreds of times smaller and would determine the scale.
    """
    landscapes = list(dict.fromkeys(r["landscape"] for r in records))
    by_name = {(r["algorithm"], r["landscape"]): r for r in records}
    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=(3.1 * len(landscapes), 8.2), layout="constrained")
        above: list[Axes] = []
        parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
        for part, lines in zip(parts, (_FIXED, _MOVING), strict=True):
            row = list(part.subplots(1, len(landscapes), squeeze=False)[0])
            for axes, landscape in zip(row, landscapes, strict=True):
                for name, style in lines.items():
                    if r := by_name.get((name, landscape)):
                        _curve(axes, r, name, *style)
                axes.set(title=landscape, xscale="log", yscale="log", xlabel="rounds")
            for axes, other in zip(row, above, strict=False):
                axes.sharey(other)
                axes.autoscale(axis="y")
            above = row
            row[0].set_ylabel("cumulative regret")
            handles, names = row[0].get_legend_handles_labels()
            if names:
                part.legend(
                    handles, names, loc="outside lower center", ncols=len(names), frameon=False
                )
        curves = [
            {"algorithm": r["algorithm"], "landscape": r["landscape"], "round": t,
             "regret": mean, "low": low, "high": high}
            for r in records
            for t, mean, low, high in zip(
                r["rounds"], r["mean"], r["low"], r["high"], strict=True
            )
        ]  # fmt: skip
        return _plot(
            figure, file, "Cumulative regret by round", made_by, curves,
            "Both axes are logarithmic; lower is better. Above: algorithms that keep the first "
            "reference and all data; below: those that do not. Bands: 95 % intervals over seeds.",
        )  # fmt: skip


def _curve(axes: Axes, r: Record, name: str, colour: str, dashes: str) -> None:
    axes.plot(r["rounds"], r["mean"], dashes, color=COLOUR[colour], lw=1.3, label=name)
    low, high = (np.array(r[end], np.float64) for end in ("low", "high"))
    axes.fill_between(r["rounds"], low, high, color=COLOUR[colour], alpha=0.12, lw=0)


def heat_maps(records: Sequence[Record], file: Path, made_by: str) -> Plot:
    """Draws heat maps of alpha against noise, one column per coverage and one row per dimension.

    A cell shows the relative difference of cumulative regret in percent. It is coloured only if p,
    Holm-corrected over all records, is below 0.05; blue means less regret.
    """
    rows = list(dict.fromkeys(r["dimension"] for r in records))
    columns = list(dict.fromkeys(r["coverage"] for r in records))
    with matplotlib.style.context(["default", _RC]):
        size = (3.0 * len(columns) + 0.6, 1.75 * len(rows) + 1.2)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(rows), len(columns), squeeze=False)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                here = [r for r in records if (r["dimension"], r["coverage"]) == (row, column)]
                _table(panels[i, j], here, "alpha", "temperature")
                panels[i, j].set_title(f"dimension {row}, coverage {column:g}")
                panels[i, j].set_xlabel("alpha" if i == len(rows) - 1 else "")
                panels[i, j].set_ylabel("noise" if j == 0 else "")
        against = ", ".join(f"{name} DPO" for name in dict.fromkeys(r["against"] for r in records))
        title = f"Cumulative regret of SELM minus that of {against}, in % of it"
        return _plot(figure, file, title, made_by, records, _KEY)


def table(
    records: Sequence[Record], x: str, y: str, file: Path, made_by: str, against: str
) -> Plot:
    """Draws one heat map of differences in regret, with cells like those of `heat_maps`.

    Args:
      x, y: the fields of the records on the two axes.
      against: the name of the algorithm that the regret is compared with.
    """
    rows, columns = (len({r[k] for r in records}) for k in (y, x))
    with matplotlib.style.context(["default", _RC]):
        size = (max(2.6 + 0.62 * columns, 7.5), 0.24 * rows + 1.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        _table(axes, records, x, y)
        axes.set_xlabel(x)
        title = f"Cumulative regret minus that of {against}, in % of it"
        return _plot(figure, file, title, made_by, records, _KEY)


def panels(
    records: Sequence[Record], x: str, y: str, panel: str, file: Path, made_by: str, against: str
) -> Plot:
    """Draws a heat map as `table` does for each value of the field `panel`, three in a row."""
    names = list(dict.fromkeys(r[panel] for r in records))
    rows, columns = (len({r[k] for r in records}) for k in (y, x))
    across = min(3, len(names))
    down = -(-len(names) // across)
    with matplotlib.style.context(["default", _RC]):
        size = (1.9 + across * (0.44 * columns + 0.3), down * (0.21 * rows + 1.5) + 0.8)
        figure = Figure(figsize=size, layout="constrained")
        drawn = figure.subplots(down, across, squeeze=False, sharey=True).flat
        for axes, name in zip(drawn, names, strict=False):
            _table(axes, [r for r in records if r[panel] == name], x, y)
            axes.set_title(name)
            axes.tick_params(axis="x", rotation=40)
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
        for axes in list(drawn):
            axes.set_visible(False)
        title = f"Cumulative regret minus that of {against}, in % of it"
        return _plot(figure, file, title, made_by, records, _KEY)


_KEY = (
    "Cells: difference of mean cumulative regret in %, the same seeds in both; "
    "coloured only if p < 0.05 after Holm's correction over the figure (blue: less regret)."
)


def _table(axes: Axes, records: Sequence[Record], x: str, y: str) -> None:
    xs, ys = (list(dict.fromkeys(r[k] for r in records)) for k in (x, y))
    shown = np.ma.array(np.zeros((len(ys), len(xs))), mask=True)
    for r in records:
        i, j = ys.index(r[y]), xs.index(r[x])
        ink = _MUTED  # of a number without a clear difference
        if r["p_holm"] < 0.05:
            shown[i, j] = r["relative"]
            ink = _readable_on(_cell_colour(r["relative"]))
        percent = f"{100 * r['relative']:+.0f}".replace("-", "−")
        axes.text(j, i, percent, ha="center", va="center", fontsize=7.5, color=ink)
    edges = (np.arange(len(values) + 1) - 0.5 for values in (xs, ys))
    axes.pcolormesh(*edges, shown, cmap=_COLOURS, vmin=-_FULL, vmax=_FULL)
    axes.set_ylim(len(ys) - 0.5, -0.5)
    label = [[f"{v:g}" if isinstance(v, float) else str(v) for v in values] for values in (xs, ys)]
    axes.set_xticks(range(len(xs)), label[0])
    axes.set_yticks(range(len(ys)), label[1])
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _plot(
    figure: Figure, file: Path, title: str, made_by: str, records: Sequence[Record], how: str
) -> Plot:
    """The plot for the page. Also writes the figure's files, with title, key and `made_by`."""
    alt = f"{title}. The page's tables have all of its numbers."
    width = f'style="width: {figure.get_figwidth():.1f}in"'  # so that its text has a readable size
    svg = Markup(str(inline(figure, file.stem, alt)).replace("<svg ", f"<svg {width} ", 1))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.supxlabel(
        _wrapped(f"{made_by}. {how}", int(figure.get_figwidth() * 15.5)),
        x=0.01, ha="left", fontsize=7.5, color=_MUTED,
    )  # fmt: skip
    in_light_colours(figure)
    nothing = {"svg": ("Date",), "pdf": ("CreationDate", "Producer"), "png": ("Software",)}
    for kind, keys in nothing.items():
        with artifacts.whole(file.with_suffix(f".{kind}")) as partial:
            figure.savefig(
                partial, format=kind, facecolor="white", dpi=200, metadata=dict.fromkeys(keys)
            )
    columns = list(dict.fromkeys(name for r in records for name in r))
    data = csv_text(columns, [[r.get(name) for name in columns] for r in records])
    return Plot(title, how, Drawing(svg, file.with_suffix(".pdf").read_bytes(), data))


def _wrapped(text: str, width: int) -> str:
    """Wraps the text to lines of at most `width` characters, but never splits a word."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _cell_colour(relative: float) -> tuple[float, float, float]:
    red, green, blue, _ = _COLOURS((relative / _FULL + 1) / 2)
    return red, green, blue


def _readable_on(colour: tuple[float, float, float]) -> str:
    """Returns black or white, whichever has more contrast on a colour (at least 4.5:1)."""
    return "white" if contrast(colour, (1, 1, 1)) > contrast(colour, (0, 0, 0)) else "black"


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """The contrast ratio of two sRGB colours, from 1 to 21 (WCAG 2.2)."""

    def luminance(colour: Sequence[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
