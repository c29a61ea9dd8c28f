"""Metrics to TensorBoard and wandb. `metrics.jsonl` is the record; these are for watching."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selm_jax.config import Experiment, as_dict


class LogError(RuntimeError):
    """A tracker that was asked for and is not there."""


def check_trackers(experiment: Experiment) -> None:
    """Raises LogError if a tracker that the experiment wants is not installed."""
    if experiment.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise LogError(
            "log.wandb is set, but wandb is not installed: pip install 'selm_jax[wandb]'"
        )


class Writers:
    """Writes each line of metrics under `iteration_T/`, by its step."""

    def __init__(self, folder: Path, experiment: Experiment):
        self.tensorboard = self.wandb = None
        if experiment.log.tensorboard:
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if experiment.log.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self.wandb = wandb.init(
                project=experiment.log.wandb, name=folder.name, config=as_dict(experiment)
            )

    def write(self, line: Mapping[str, Any]) -> None:
        stage, t = line["stage"], line["iteration"]
        step = line.get("step", t)
        prefix = f"iteration_{t}/" if "step" in line else ""
        values = {
            f"{stage}/{prefix}{key}": value
            for key, value in line.items()
            if isinstance(value, int | float) and key not in ("iteration", "step")
        }
        if self.tensorboard is not None:
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(values | {"iteration": t})
