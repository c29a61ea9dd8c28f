"""`selm show RUN`: prints a run's progress, last metrics, disk use and remaining time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selm_jax.commands.redo import ORDER
from selm_jax.commands.runs import settings_of
from selm_jax.config import Experiment
from selm_jax.run.remaining import Entries, entries_of, time_left
from selm_jax.shell import loglines
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.one_process import holder
from selm_jax.shell.words import duration

_SHOWN = (
    "loss", "rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate",
    "heldout/reward_greedy", "heldout/gain", "heldout/capability", "heldout/kl", "heldout/length",
    "heldout/accuracy",
)  # fmt: skip


def show(run: Path, console: Console) -> None:
    """Prints a run's progress, last metrics, disk use and remaining time.

    Raises:
      ConfigError: the folder is not a run folder.
      ArtifactError: its records were changed or are damaged.
    """
    experiment = settings_of(run)
    entries = entries_of(run)
    console.print(f"{mirrors.named(run)}: {_state(run, experiment, entries)}", highlight=False)
    console.print(
        f"{experiment.model.source}, {experiment.objective['loss']}, ranker "
        f"{experiment.feedback.ranker}, seed {experiment.seed}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if entries:
        console.print(_stages(entries))
    lines = loglines.read_lines(run / "metrics.jsonl")
    for stage in ("train", "evaluate"):
        if found := [line for line in lines if line["stage"] == stage]:
            console.print(_numbers(found[-1]), highlight=False)
    console.print(f"disk: {_size(_bytes(run))}", highlight=False)
    if (page := run / "report.html").exists():
        console.print(f"page: {mirrors.named(page)}", highlight=False, soft_wrap=True)


def _state(run: Path, experiment: Experiment, entries: Entries) -> str:
    last = entries.get(experiment.iterations, {})
    wanted = {name for stages in entries.values() for name in stages}
    done = bool(last) and all(last.get(name, {}).get("done") for name in wanted)
    begun = [(t, n) for t, stages in entries.items() for n, e in stages.items() if not e["done"]]
    t, stage = begun[-1] if begun else (0, "")
    where = f", in iteration {t} of {experiment.iterations}, {stage}" if begun else ""
    left = time_left(entries, experiment.iterations, stage, t)
    if done:
        return "finished"
    time = "; time left: not known before iteration 1 is done"
    if left is not None:
        more = f" and the rest of {stage}" if begun else ""
        time = f"; time left: about {duration(left)}{more}"
    if (by := holder(run)) is not None:
        return f"at work (process {by['process']} on {by['host']}){where}{time}"
    return f"stopped{where}{time}. `selm run` continues it"


def _stages(entries: Entries) -> Table:
    names = [stage.name for stage in ORDER]
    table = Table(box=None, pad_edge=False)
    table.add_column("iteration", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for t, stages in entries.items():
        table.add_row(str(t), *(_cell(stages.get(name)) for name in names))
    return table


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    if not entry["done"]:
        return "begun"
    return "shared" if "shared" in entry else duration(entry["seconds"])


def _numbers(line: Mapping[str, Any]) -> str:
    """Formats one line of metrics.jsonl in words, such as an update's loss."""
    step = f", update {line['step']}" if "step" in line else ""
    values = [
        f"{name.removeprefix('heldout/')} {line[name]:.4g}"
        for name in _SHOWN
        if isinstance(line.get(name), int | float)
    ]
    return f"iteration {line['iteration']}, {line['stage']}{step}: {', '.join(values)}"


def _bytes(folder: Path) -> int:
    """A folder's size in bytes. A file with several hard links in it counts once."""
    if (mirror := mirrors.of(folder)) is not None:
        return sum(entry.size for entry in mirror.there.values())
    seen: dict[tuple[int, int], int] = {}
    for where, _, files in os.walk(folder):
        for name in files:
            try:
                stat = os.lstat(os.path.join(where, name))
            except FileNotFoundError:  # a run at work replaces its files
                continue
            seen[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(seen.values())


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
