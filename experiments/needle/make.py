"""Hides the openings, and writes them into the data that the runs read.

    PYTHONPATH=. python -m experiments.needle.make

writes into runs/needle/inputs: train.jsonl and heldout.jsonl, the quickstart's prompts of four
classes with their openings; openings.json, how they were drawn; and the start model's
tokenizer.json, which the ranker reads. A run records a digest of its data, so it does not resume
with other openings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.needle import oracle
from selm_jax.evaluation.model import Model, open_model
from selm_jax.shell import artifacts
from selm_jax.text.chat import Message

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 0
DATA = Path(__file__).parents[1] / "data"
SYSTEM = "Be brief."  # shorter than the model's own system message, so that a run is cheaper
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """The quickstart's rows of the four classes, with whole conversations as prompts."""
    lines = (DATA / f"quickstart_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row | {"prompt": _asked(row["prompt"])} for row in rows if row["category"] in
            oracle.CLASSES]  # fmt: skip


def messages(row: Mapping[str, Any]) -> list[Message]:
    """A row's prompt as a conversation."""
    return [Message(turn["role"], turn["content"]) for turn in row["prompt"]]


def draw(model: Model, train: Sequence[Row], seed: int = SEED) -> dict[str, dict[str, float]]:
    """The openings of each class, with the start model's mean probability of each of them."""
    tokenizer = model.tokenizer.backend
    words = oracle.words_of(tokenizer)
    likely = oracle.first_tokens(model, [messages(row) for row in train])
    asked = np.array([row["category"] for row in train])
    found = {}
    rngs = np.random.default_rng(seed).spawn(len(oracle.CLASSES))
    for name, rng in zip(oracle.CLASSES, rngs, strict=True):
        mean = likely[asked == name].mean(0)
        found[name] = {tokenizer.decode([t]): float(mean[t]) for t in oracle.hide(mean, words, rng)}
    return found


def make(folder: Path, source: str = MODEL, seed: int = SEED) -> None:
    """Writes the inputs into a folder, which is replaced."""
    model = open_model(source)
    data = {name: read(name) for name in ("train", "heldout")}
    openings = draw(model, data["train"], seed)
    with artifacts.whole(folder, replaces_folder=True) as partial:
        partial.mkdir(parents=True)
        shutil.copy(model.folder.path / "tokenizer.json", partial)
        for name, rows in data.items():
            told = (row | {"openings": list(openings[row["category"]])} for row in rows)
            lines = "".join(json.dumps(row) + "\n" for row in told)
            (partial / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        facts = {"model": model.folder.origin, "seed": seed, "openings": openings}
        (partial / "openings.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _asked(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


if __name__ == "__main__":
    make(oracle.FOLDER)
    print((oracle.FOLDER / "openings.json").read_text(encoding="utf-8"))
