"""Draws published numbers, hollow, dotted and grey, so that they do not look measured here."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from selm_jax.report.drawing import LABEL, PUBLISHED, PaperFigure, drawings, matrix
from selm_jax.report.published import NAMES, Published, load


def figures() -> list[PaperFigure]:
    """Draws the paper's tables 1 and 2, model cards and figure 2, labelled as published."""
    made = []
    for name, column, unit in (
        ("table1", "lc_win_rate", "length-controlled win rate, AlpacaEval 2.0, %"),
        ("table1", "mt_bench", "MT-Bench"),
        ("table2", "mean", "mean of six academic benchmarks"),
        ("model_cards", "lc_win_rate", "length-controlled win rate, AlpacaEval 2.0, %"),
        ("model_cards", "mt_bench", "MT-Bench"),
    ):
        made.append(_published_by_iteration(load(name), column, unit))
    return made + [_win_rates(n) for n in NAMES if n.startswith("figure2")]


def _published_by_iteration(data: Published, column: str, unit: str) -> PaperFigure:
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
                        *zip(*line, strict=True), marker=marker, markerfacecolor="white",
                        color=PUBLISHED,
                        linestyle=":", linewidth=1.3, label=f"{method}, {LABEL}",
                    )  # fmt: skip
            axes.set_title(base, style="italic")
            axes.set_xlabel("iteration; 0: the start")
            axes.set_xticks(range(4))
            axes.legend(fontsize=7)
        grid[0].set_ylabel(unit)

    name = f"published_{data.name}_{column}"
    return PaperFigure(name, rows, drawings((3.5 * len(bases) + 0.4, 3.4), draw, data.source))


def _win_rates(name: str) -> PaperFigure:
    data = load(name)
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
    return PaperFigure(f"published_{name}", rows, matrix(rows, title, data.source))
