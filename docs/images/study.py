"""Draws study.svg from the tables of docs/study.md: python docs/images/study.py"""

import re
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from selm_jax.report.drawing import COLOURS, MARKERS, MUTED, drawings

ROWS = (
    ("minus DPO, greedy", "greedy answers", 0.1),
    ("minus DPO, sampled", "sampled answers", -0.1),
)


def tables(page: str) -> dict[str, pd.DataFrame]:
    """Reads the page's tables; the key is the heading above each, without its brackets."""
    found = {}
    for section in re.split(r"^### ", page, flags=re.MULTILINE)[1:]:
        head, _, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines()
            if line.startswith("|")
        )
        found[section.splitlines()[0].partition(" (")[0]] = pd.DataFrame(rows, columns=head)
    return found


def interval(cell: str) -> list[float]:
    """Reads `mean (low to high)`."""
    return [float(number) for number in re.findall(r"[-+]?[\d.]+", cell)]


def draw(figure: Figure, results: dict[str, pd.DataFrame]) -> None:
    axes = figure.subplots(1, len(results), sharey=True)
    for axis, (rule, table) in zip(axes, results.items(), strict=True):
        methods = table[table.method != "dpo"].iloc[::-1].reset_index(drop=True)
        for (column, label, shift), colour, marker in zip(ROWS, COLOURS, MARKERS, strict=False):
            for at, cell in methods[column].items():
                mean, low, high = interval(cell)
                axis.errorbar(
                    mean, at + shift, xerr=[[mean - low], [high - mean]], fmt=marker, color=colour,
                    markersize=4, label=label if at == 0 else None,
                )  # fmt: skip
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.set(title=rule, xlabel="held-out reward minus DPO's", ylim=(-0.4, len(methods) - 0.6))
        axis.set_yticks(range(len(methods)), methods.method)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


here = Path(__file__)
results = tables((here.parents[1] / "study.md").read_text(encoding="utf-8"))
drawn = drawings((7.2, 2.6), lambda figure: draw(figure, results))
here.with_suffix(".svg").write_bytes(drawn["svg"])
