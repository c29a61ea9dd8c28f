"""Makes the model card of an exported policy: its origin, method, data and results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from selm_jax.config import Experiment, dump, plain_yaml

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Of no interest to a reader, or different in every run of the same experiment.
_LEFT_OUT = {"stage", "iteration", "step", "tokens", "padded", "examples", "learning_rate"}


def model_card(
    experiment: Experiment,
    name: str,
    iteration: int,
    origin: Mapping[str, str],
    metrics: Iterable[Mapping[str, Any]],
    pipeline: str,
    method: str,
) -> str:
    """Returns the text of the model card (README.md) for the policy after an iteration.

    Equal runs have equal cards, however often they were killed: times are left out. The held-out
    evaluation of this policy is in the card once it is finished; until then the card says so.

    Args:
      name: of the run.
      origin: where the start model came from (`sources.ModelFolder.origin`).
      metrics: lines of metrics.jsonl.
      pipeline: the kind of model by the name that the Hub has for it.
      method: what the policy was trained on, in words.
    """
    e = experiment
    lines = list(metrics)
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline}
    if origin["kind"] in ("hub", "wheel"):
        header |= {"base_model": e.model.source, "base_model_relation": "finetune"}
    if _HUB_ID.fullmatch(e.data.train) and not Path(e.data.train).exists():
        header["datasets"] = [e.data.train]
    loss = str(e.objective["loss"])
    header["tags"] = list(dict.fromkeys(["selm_jax", loss, "preference-optimization", "alignment"]))
    pinned = next((origin[k] for k in ("commit", "sha256") if k in origin), "")
    settings = ", ".join(f"{k} {v}" for k, v in e.objective.items() if k != "loss")
    objective = f"`{loss}`{f' ({settings})' if settings else ''}"
    data = (
        f"- start model: `{e.model.source}` ({origin['kind']}{pinned and f', {pinned}'})\n"
        f"- prompts: `{e.data.train}`, part {e.data.first_portion - 1 + iteration} of {e.portions}"
    )
    parts = [
        f"---\n{plain_yaml.dump(header)}---",
        f"# {name}, iteration {iteration} of {e.iterations}",
        f"Trained from `{e.model.source}` with selm_jax.",
        f"## Method\n\n{objective} on {method}",
        f"## Data\n\n{data}",
        *_metrics(lines, iteration, evaluated=e.data.heldout is not None),
        f"## Settings\n\n```yaml\n{dump(e)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _metrics(lines: list[Mapping[str, Any]], iteration: int, evaluated: bool) -> list[str]:
    parts = []
    trained = [m for m in lines if m["stage"] == "train" and m["iteration"] == iteration]
    if trained:
        last = trained[-1]
        parts += [f"## Metrics\n\nThe last update ({last['step']}):", _table(last)]
    own = _evaluation(lines, iteration, "This policy")
    if not own and evaluated:
        own = ["This policy has no held-out evaluation yet."]
    parts += own
    before = "The start model" if iteration == 1 else f"The policy after iteration {iteration - 1}"
    return parts + _evaluation(lines, iteration - 1, f"{before}, from which this one was trained")


def _evaluation(lines: list[Mapping[str, Any]], iteration: int, who: str) -> list[str]:
    found = [m for m in lines if m["stage"] == "evaluate" and m["iteration"] == iteration]
    return [f"{who}, on held-out prompts:", _table(found[-1])] if found else []


def _table(metrics: Mapping[str, Any]) -> str:
    rows = [
        f"| {key} | {value:.5g} |"
        for key, value in metrics.items()
        if key not in _LEFT_OUT and not key.startswith(("time/", "memory/"))
    ]
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])
