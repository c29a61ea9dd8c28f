"""Draws stand-alone figures on white, with fixed colours, and keeps their data."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from selm_jax.report.files import no_formula

Rows = list[dict[str, Any]]

COLOURS = ("#1c6fc4", "#942c10", "#00594a", "#743080", "#8a6800", "#68737c")  # page.css, light
MARKERS = "os^Dv*"
LABEL = "published, not measured here"
INK, MUTED, _GRID, PUBLISHED = "#1d2127", "#5b626d", "#e4e4de", "#8b8f96"
_RC = {
    "svg.hashsalt": "selm_jax.paper", "svg.fonttype": "none", "font.size": 9,
    "pdf.fonttype": 42,  # TrueType, which publishers require
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED,
    "xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": _GRID, "legend.frameon": False, "axes.titlesize": 10,
    "axes.titlelocation": "left", "font.family": "sans-serif", "legend.fontsize": 8,
}  # fmt: skip


@dataclass(frozen=True)
class PaperFigure:
    """A drawn figure and its data.

    `name` is the name of its files; `drawings` has their bytes by suffix.
    """

    name: str
    rows: Rows
    drawings: Mapping[str, bytes]

    @property
    def svg(self) -> bytes:
        return self.drawings["svg"]

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: no_formula(v) if isinstance(v, str) else v for k, v in row.items()})
        return out.getvalue()


def drawings(
    size: tuple[float, float], draw: Callable[[Figure], None], source: str | None = None
) -> dict[str, bytes]:
    """Draws a figure as SVG, PDF and PNG; the same numbers give the same bytes.

    If there is a source, the figure says that its numbers were published elsewhere.
    """
    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        if source is not None:
            figure.text(0.99, 0.995, LABEL, ha="right", va="top", fontsize=8, color="#a33c00")
        nothing = {
            "svg": ("Date", "Creator"),
            "pdf": ("CreationDate", "Creator", "Producer"),
            "png": ("Software",),
        }
        found = {}
        for kind, keys in nothing.items():
            out = io.BytesIO()
            figure.savefig(
                out, format=kind, facecolor="white", dpi=300, metadata=dict.fromkeys(keys)
            )
            found[kind] = out.getvalue()
        return found


def matrix(rows: Rows, title: str, source: str | None = None) -> dict[str, bytes]:
    names = list(dict.fromkeys(row["row"] for row in rows))
    values = np.array([row["win_rate"] for row in rows]).reshape(len(names), -1)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(False)
        axes.imshow(
            values,
            cmap="Greys" if source else "RdBu",
            vmin=20,
            vmax=120 if source else 80,
        )
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                dark = abs(value - 50) > 18
                axes.text(
                    j, i, f"{value:.1f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else INK, style="italic" if source else "normal",
                )  # fmt: skip
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.set_title(title)
        for spine in axes.spines.values():
            spine.set_visible(False)

    size = 2.4 + 0.52 * len(names)
    return drawings((size + 0.6, size), draw, source)


def dashes(i: int) -> Any:
    return ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))[i % 4]
