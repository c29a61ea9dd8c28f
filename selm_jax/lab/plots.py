"""Draws the figures of `selm lab` as SVG, PDF and PNG, with the command that made them.

The last lines of every figure give the command, the seeds and the function that made its numbers.
Equal records give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selm_jax.shell import artifacts

Record = dict[str, Any]

_RC = {
    "svg.hashsalt": "selm_jax.lab",  # without it, ids would differ every time
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial"],  # every label repeats this list
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
}
_COLOURS = matplotlib.colors.LinearSegmentedColormap.from_list(
    "regret", ["#0b62a4", "#9cc5e4", "#ffffff", "#f0b590", "#b3541e"]
)
_FULL = 0.3  # relative difference that gets the full colour
_UNSURE = "#5b626d"  # colour of a number without a clear difference; contrast 6:1 on white
# Two rows of panels: algorithms that keep the first reference and all data, and those that do not.
_FIXED = {
    "selm_fixed": ("#b3541e", "-"), "selm_theory": ("#b3541e", ":"), "xpo": ("#7a4fa0", "-"),
    "dpo_online": ("#0b62a4", "-"), "dpo_on_policy": ("#0b62a4", "--"),
    "dpo_passive": ("#0b62a4", ":"), "greedy": ("#2a8c5a", "-"), "best_of_4": ("#2a8c5a", "--"),
    "uniform": ("#888888", "-"),
}  # fmt: skip
_MOVING = {
    "selm_moving": ("#b3541e", "-"), "dpo_moving": ("#0b62a4", "-"),
    "selm_practice": ("#b3541e", "--"), "dpo_practice": ("#0b62a4", "--"),
    "selm_code": ("#b3541e", ":"), "dpo_code": ("#0b62a4", ":"),
}  # fmt: skip


def regret(records: Sequence[Record], file: Path, made_by: str) -> None:
    """Plots cumulative regret against rounds, one column per landscape, with 95 % bands.

    The oracle is left out: its regret is hundreds of times smaller and would determine the scale.
    """
    landscapes = list(dict.fromkeys(r["landscape"] for r in records))
    by_name = {(r["algorithm"], r["landscape"]): r for r in records}
    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=(3.1 * len(landscapes), 8.2))
        panels = figure.subplots(2, len(landscapes), squeeze=False, sharex=True, sharey="col")
        for row, lines in zip(panels, (_FIXED, _MOVING), strict=True):
            for axes, landscape in zip(row, landscapes, strict=True):
                for name, (colour, dashes) in lines.items():
                    if r := by_name.get((name, landscape)):
                        t = r["rounds"]
                        axes.plot(t, r["mean"], dashes, color=colour, lw=1.3, label=name)
                        band = (np.array(r[end], np.float64) for end in ("low", "high"))
                        axes.fill_between(t, *band, color=colour, alpha=0.12, lw=0)
                axes.set(title=landscape, xscale="log", yscale="log")
            row[0].set_ylabel("cumulative regret")
            row[1].legend(
                *row[0].get_legend_handles_labels(), loc="upper center",
                ncols=6 if len(lines) <= 6 else 5, frameon=False,
                bbox_to_anchor=(1.1, -0.14),
            )  # fmt: skip
        for axes in panels[-1]:
            axes.set_xlabel("rounds")
        figure.subplots_adjust(
            left=0.055, right=0.995, top=0.965, bottom=0.145, wspace=0.2, hspace=0.4
        )
        _save(figure, file, made_by + "; bands: 95 %")


def heat_maps(records: Sequence[Record], file: Path, made_by: str) -> None:
    """Draws heat maps of alpha against noise, one column per coverage and one row per dimension.

    A cell shows the relative difference of cumulative regret in percent. It is coloured only if p,
    Holm-corrected over all records, is below 0.05; blue means less regret.
    """
    rows = list(dict.fromkeys(r["dimension"] for r in records))
    columns = list(dict.fromkeys(r["coverage"] for r in records))
    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=(3.0 * len(columns) + 0.6, 1.75 * len(rows) + 1.45))
        panels = figure.subplots(len(rows), len(columns), squeeze=False)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                here = [r for r in records if (r["dimension"], r["coverage"]) == (row, column)]
                _table(panels[i, j], here, "alpha", "temperature")
                panels[i, j].set_title(f"dimension {row}, coverage {column:g}")
                panels[i, j].set_xlabel("alpha" if i == len(rows) - 1 else "")
                panels[i, j].set_ylabel("noise" if j == 0 else "")
        height = figure.get_figheight()
        against = ", ".join(f"{name} DPO" for name in dict.fromkeys(r["against"] for r in records))
        figure.suptitle(
            f"Cumulative regret of SELM minus that of {against}, in % of it",
            x=0.05, y=1 - 0.05 / height, ha="left", va="top", fontsize=10,
        )  # fmt: skip
        figure.subplots_adjust(
            left=0.05,
            right=0.995,
            top=1 - 0.55 / height,
            bottom=0.95 / height,
            hspace=0.5,
            wspace=0.16,
        )
        _save(figure, file, made_by + ". " + _KEY)


def table(
    records: Sequence[Record], x: str, y: str, file: Path, made_by: str, against: str
) -> None:
    """Draws one heat map of differences in regret, with cells like those of `heat_maps`.

    Args:
      x, y: the fields of the records on the two axes.
      against: the name of the algorithm that the regret is compared with.
    """
    rows, columns = (len({r[k] for r in records}) for k in (y, x))
    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=(max(2.6 + 0.62 * columns, 7.5), 0.24 * rows + 1.75))
        axes = figure.subplots()
        _table(axes, records, x, y)
        axes.set_xlabel(x)
        axes.set_title(f"Cumulative regret minus that of {against}, in % of it", loc="left")
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.32, right=0.98, top=1 - 0.35 / height, bottom=1.2 / height)
        _save(figure, file, made_by + ". " + _KEY)


_KEY = (
    "Cells: difference of mean cumulative regret in %, the same seeds in both; "
    "coloured only if p < 0.05 after Holm's correction over the figure (blue: less regret)"
)


def _table(axes: Axes, records: Sequence[Record], x: str, y: str) -> None:
    xs, ys = (list(dict.fromkeys(r[k] for r in records)) for k in (x, y))
    shown = np.zeros((len(ys), len(xs)))
    for r in records:
        i, j = ys.index(r[y]), xs.index(r[x])
        sure = r["p_holm"] < 0.05
        shown[i, j] = r["relative"] if sure else 0
        percent = f"{100 * r['relative']:+.0f}".replace("-", "−")
        colour = _readable_on(_cell_colour(shown[i, j])) if sure else _UNSURE
        axes.text(j, i, percent, ha="center", va="center", fontsize=7.5, color=colour)
    axes.imshow(shown, cmap=_COLOURS, vmin=-_FULL, vmax=_FULL, aspect="auto")
    label = [[f"{v:g}" if isinstance(v, float) else str(v) for v in values] for values in (xs, ys)]
    axes.set_xticks(range(len(xs)), label[0])
    axes.set_yticks(range(len(ys)), label[1])
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, file: Path, made_by: str) -> None:
    words, lines = made_by.split(), [""]
    width = int(figure.get_figwidth() * 15.5)
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    figure.text(
        0.01, 0.06 / figure.get_figheight(), "\n".join(lines), fontsize=7.5, color="#555555"
    )
    nothing = {"svg": ("Date",), "pdf": ("CreationDate", "Producer"), "png": ("Software",)}
    for kind, keys in nothing.items():
        with artifacts.whole(file.with_suffix(f".{kind}")) as partial:
            figure.savefig(
                partial, format=kind, facecolor="white", dpi=200, metadata=dict.fromkeys(keys)
            )


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
