"""Draws quickstart.svg from a finished run: python docs/images/quickstart.py runs/quickstart"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.rcParams |= {"svg.hashsalt": "selm", "font.size": 9, "axes.spines.top": False}
mpl.rcParams |= {"axes.spines.right": False, "svg.fonttype": "none"}

lines = [json.loads(x) for x in (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()]
points = [x for x in lines if x["stage"] == "evaluate"]
reward = [x["heldout/reward_greedy"] for x in points]
error = [
    [x["heldout/reward_greedy"] - x["heldout/reward_greedy_low"] for x in points],
    [x["heldout/reward_greedy_high"] - x["heldout/reward_greedy"] for x in points],
]
kl = [x["heldout/kl"] for x in points]
kl_error = [
    [x["heldout/kl"] - x.get("heldout/kl_low", x["heldout/kl"]) for x in points],
    [x.get("heldout/kl_high", x["heldout/kl"]) - x["heldout/kl"] for x in points],
]

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True)
left.errorbar([x["iteration"] for x in points], reward, error, marker="o", color="#0b62a4")
left.set(
    xlabel="iteration (0: the start model)", ylabel="held-out reward", xticks=range(len(points))
)
right.errorbar(kl, reward, error, kl_error, marker="o", color="#b3541e")
right.set(xlabel="KL from the start, nats per answer")
for i, (x, y) in enumerate(zip(kl, reward, strict=True)):
    right.annotate(str(i), (x, y), textcoords="offset points", xytext=(5, -11))
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
