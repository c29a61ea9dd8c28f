"""Sends metrics to TensorBoard and wandb; the permanent record is the file `metrics.jsonl`."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from selm_jax.config import Experiment, as_dict
from selm_jax.shell import artifacts, loglines
from selm_jax.shell import mirror as mirrors

WANDB_ID = "wandb_id"  # file in the run folder with the wandb id that a resumed run continues


class LogError(RuntimeError):
    """TensorBoard or wandb is not available, but the experiment asks for it."""


class Writers:
    """Sends each line of metrics.jsonl to TensorBoard and wandb, at the line's step.

    The trackers are opened before any work, so that a missing package or login is found at once. A
    resumed run continues in both: TensorBoard's files are rewritten from the record, and the wandb
    run is found by the id in the run folder.

    Args:
        logged: the lines that metrics.jsonl already has.

    Raises:
        LogError: a tracker is not installed or cannot be opened.
    """

    def __init__(
        self, folder: Path, experiment: Experiment, logged: Iterable[Mapping[str, Any]] = ()
    ):
        self.folder = folder / "tensorboard"
        self.tensorboard = self.wandb = None
        self.draws = experiment.log.tensorboard
        if self.draws:
            self.folder.mkdir(parents=True, exist_ok=True)
        if experiment.log.wandb is not None:
            self.wandb = _wandb_run(folder, experiment)
        self.logged, self.gone = list(logged), 0

    def start_over(self, logged: Iterable[Mapping[str, Any]]) -> None:
        """Makes TensorBoard show only the lines in `logged`, when lines of metrics.jsonl are gone.

        TensorBoard is redrawn; wandb keeps what it has. A wandb step is the number of a line, so a
        line that is written again is not logged twice. If lines were removed from the middle, the
        numbers still only grow, because wandb ignores steps that it has already seen.
        """
        before, self.logged = self.logged, list(logged)
        if self.logged != before[: len(self.logged)]:
            self.gone += len(before) - len(self.logged)
        if self.tensorboard is not None:
            self.tensorboard.close()
            self.tensorboard = None

    def write(self, line: Mapping[str, Any]) -> None:
        if self.draws:
            if self.tensorboard is None:
                self._open_tensorboard()
            self._draw(line)
        self.logged.append(line)
        if self.wandb is not None:
            step = len(self.logged) + self.gone
            self.wandb.log(_values(line) | {"iteration": line["iteration"]}, step=step)

    def _open_tensorboard(self) -> None:
        """Opens TensorBoard's writer, and rewrites its files from the lines of metrics.jsonl."""
        from tensorboardX import SummaryWriter

        for file in self.folder.glob("events.out.tfevents.*"):
            file.unlink()
        self.tensorboard = SummaryWriter(str(self.folder))
        for line in self.logged:
            self._draw(line)

    def _draw(self, line: Mapping[str, Any]) -> None:
        assert self.tensorboard is not None
        for key, value in _values(line).items():
            self.tensorboard.add_scalar(key, value, line.get("step", line["iteration"]))
        self.tensorboard.flush()


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics.jsonl, by the names that TensorBoard and wandb show."""
    prefix = f"iteration_{line['iteration']}/" if "step" in line else ""
    return {
        f"{line['stage']}/{prefix}{key}": value
        for key, value in line.items()
        if isinstance(value, int | float) and key not in ("iteration", "step")
    }


def _wandb_run(folder: Path, experiment: Experiment) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LogError(
            "log.wandb is set, but wandb is not installed: pip install 'selm_jax[wandb]'"
        ) from error
    file = folder / WANDB_ID
    if not file.exists():
        artifacts.write_text(file, secrets.token_hex(4))
    try:
        return wandb.init(
            project=experiment.log.wandb, name=Path(mirrors.named(folder)).name,
            config=as_dict(experiment), id=file.read_text(encoding="utf-8").strip(), resume="allow",
        )  # fmt: skip
    except Exception as error:  # wandb has many kinds of errors, and so has the network
        why = f"{type(error).__name__}: {error}".rstrip(".")
        raise LogError(
            f"log.wandb is {experiment.log.wandb!r}, but wandb cannot be opened: {why}. Log in "
            "(`wandb login`, or the variable WANDB_API_KEY), set WANDB_MODE=offline, or remove "
            "log.wandb"
        ) from error


def logged(metrics: Path, stage: str, t: int) -> list[dict[str, Any]]:
    """The lines that a stage of iteration t has written to a metrics.jsonl file."""
    found = loglines.read_lines(metrics)
    return [line for line in found if (line["stage"], line["iteration"]) == (stage, t)]
