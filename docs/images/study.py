"""Draws study.svg from a finished sweep: python docs/images/study.py runs/study/table.csv"""

import csv
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.rcParams |= {"svg.hashsalt": "selm", "font.size": 9, "axes.spines.top": False}
mpl.rcParams |= {"axes.spines.right": False, "svg.fonttype": "none"}

with Path(sys.argv[1]).open() as f:
    rows = [row for row in csv.DictReader(f) if row["difference_mean"]]
rules = list(dict.fromkeys(row["cell"].split(", ")[0] for row in rows))

figure, axes = plt.subplots(1, len(rules), figsize=(7.2, 2.2), sharey=True)
for axis, rule in zip(axes, rules, strict=True):
    mine = [row for row in rows if row["cell"].startswith(f"{rule}, ")]
    for kind, colour, shift in (("", "#0b62a4", 0.1), ("_sample", "#b3541e", -0.1)):
        mean, low, high = (
            [float(row[f"difference{kind}_{end}"]) for row in mine]
            for end in ("mean", "low", "high")
        )
        at = [y + shift for y in reversed(range(len(mine)))]
        error = [
            [m - bound for m, bound in zip(mean, low, strict=True)],
            [bound - m for m, bound in zip(mean, high, strict=True)],
        ]
        label = "sampled answers" if kind else "greedy answers"
        axis.errorbar(mean, at, xerr=error, fmt="o", color=colour, markersize=4, label=label)
    axis.axvline(0, color="#888888", linewidth=0.8, zorder=0)
    axis.set(title=rule, xlabel="held-out reward minus DPO's")
    axis.set_yticks(range(len(mine)), [row["cell"].split(", ")[1] for row in reversed(mine)])
axes[0].legend(fontsize=7, frameon=False)
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
