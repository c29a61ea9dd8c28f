"""A run folder: the paths of its files, its metrics, its manifest and its model cards."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from selm_jax.config import Experiment, dump
from selm_jax.parallel import multihost
from selm_jax.run.log import Writers, logged
from selm_jax.shell import artifacts, loglines
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.commit import commit, versions
from selm_jax.shell.sealed import sha256
from selm_jax.weights.card import model_card


class Folder:
    """The folder that `output` names. Only the first of several processes writes to it.

    Attributes:
      path: the folder, or the local mirror of a folder in a bucket.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.path = mirrors.local(experiment.output)

    # Where things are

    @property
    def name(self) -> str:
        """The folder's own name, even if `output` is `.` or `..`."""
        path = Path(mirrors.named(self.path))
        return path.resolve().name if path.name in ("", "..") else path.name

    def iteration(self, t: int) -> Path:
        return self.path / f"iteration_{t}"

    def model(self, t: int) -> Path:
        """The folder of the policy that iteration t trains; t starts at 1."""
        return self.iteration(t) / "model"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def manifest_file(self) -> Path:
        return self.path / "manifest.json"

    # Metrics

    @cached_property
    def writers(self) -> Writers:
        """The connections to TensorBoard and wandb, opened on first use."""
        self.mend_metrics()
        return Writers(self.path, self.experiment, loglines.read_lines(self.metrics_file))

    def mend_metrics(self) -> None:
        """Cuts off a last line of metrics.jsonl that a kill has torn, in the first process."""
        if multihost.is_first():
            loglines.rewrite_lines(self.metrics_file)

    def logged(self, stage: str, t: int) -> list[dict[str, Any]]:
        """The lines that a stage of iteration t has written to metrics.jsonl."""
        return logged(self.metrics_file, stage, t)

    def log(self, stage: str, t: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line to metrics.jsonl, and the same numbers to TensorBoard and wandb."""
        if not multihost.is_first():
            return
        line = {"stage": stage, "iteration": t, **metrics}
        writers = self.writers  # opened before the line is in the record, or it would appear twice
        loglines.append_line(self.metrics_file, line)
        writers.write(line)

    def keep_metrics(self) -> None:
        """Makes the lines that were written until now safe, and in a bucket TensorBoard's files."""
        artifacts.keep(self.metrics_file)
        if mirrors.of(self.path) is not None:
            artifacts.keep(self.path / "tensorboard")

    def forget(self, which: Callable[[dict[str, Any]], bool]) -> None:
        """Removes the lines that `which` selects from metrics.jsonl, to be written again."""
        if multihost.is_first():
            writers = self.writers
            if loglines.rewrite_lines(self.metrics_file, lambda line: not which(line)):
                writers.start_over(loglines.read_lines(self.metrics_file))

    # The configuration and the manifest

    def write_config(self, experiment: Experiment) -> None:
        if multihost.is_first():
            artifacts.write_text(self.path / "config.yaml", dump(experiment))

    def write_manifest(self, facts: Mapping[str, Any]) -> None:
        """Writes manifest.json: model, objective, devices, versions and use of the ranker.

        Args:
          facts: the manifest's entries on the model, objective and devices.
        """
        if not multihost.is_first():
            return
        before = self._manifest()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        artifacts.write_sealed(
            self.manifest_file,
            {
                "name": self.name,
                "config_sha256": sha256(self.path / "config.yaml"),
                **facts,
                "versions": versions(),
                "commit": commit(),
                "python": platform.python_version(),
                "created": before.get("created", now),
                "feedback": dict(self._asked()),
                **({"servers": before["servers"]} if "servers" in before else {}),
            },
        )

    def note_server(self, t: int, version: str | None) -> None:
        """Records in the manifest which version of a server answered in iteration t."""
        found = self._manifest()
        servers = found.get("servers", {}) | {str(t): version}
        artifacts.write_sealed(self.manifest_file, found | {"servers": servers})

    def _manifest(self) -> dict[str, Any]:
        return artifacts.read_sealed(self.manifest_file) if self.manifest_file.exists() else {}

    def _asked(self) -> Iterator[tuple[str, dict[str, dict[str, int | float]]]]:
        """Yields (iteration, use of the ranker by stage), from the counts of finished stages.

        This is the number of prompts that were scored, and the cost of the ranker and of the
        acquisition.
        """
        for t in range(self.experiment.iterations + 1):
            stages = artifacts.Stages(self.iteration(t)).read()
            of_stage = {}
            for name, asked in (("rank", "scored"), ("evaluate", "prompts")):
                counts = stages.get(name, {}).get("counts", {})
                if asked in counts:
                    cost = ("ranker/", "acquisition/")
                    of_stage[name] = {"asked": counts[asked]} | {
                        key: value for key, value in counts.items() if key.startswith(cost)
                    }
            if of_stage:
                yield str(t), of_stage

    def model_card(self, t: int, origin: Mapping[str, Any], pipeline: str, method: str) -> str:
        """The README.md of the policy after iteration t; `origin` identifies the start model."""
        metrics = loglines.read_lines(self.metrics_file)
        return model_card(self.experiment, self.name, t, origin, metrics, pipeline, method)

    def complete_card(self, t: int, origin: Mapping[str, Any], pipeline: str, method: str) -> None:
        """Rewrites the model card of iteration t with the evaluation of its policy.

        A card that an earlier version sealed together with the model is not changed.
        """
        card, stages = self.model(t) / artifacts.CARD, artifacts.Stages(self.iteration(t))
        mirrors.need(card)
        if not card.exists() or not stages.may_complete("export", "model"):
            return
        self.mend_metrics()
        text = self.model_card(t, origin, pipeline, method)
        if text.encode() != card.read_bytes():
            # Written outside and renamed: after a kill, the model folder must have no extra file.
            partial = self.iteration(t) / artifacts.CARD
            partial.write_text(text, encoding="utf-8")
            artifacts.flush(partial)
            os.replace(partial, card)
            artifacts.keep(card)


class StageLog:
    """The lines that one stage of one iteration writes to metrics.jsonl."""

    def __init__(self, folder: Folder, stage: str, t: int):
        self._folder, self.stage, self.t = folder, stage, t
        self.file = folder.metrics_file

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Writes one line to metrics.jsonl, TensorBoard and wandb."""
        self._folder.log(self.stage, self.t, metrics)

    def lines(self) -> list[dict[str, Any]]:
        return self._folder.logged(self.stage, self.t)

    def forget(self) -> None:
        """Removes the stage's lines of this iteration, to be written again."""
        self._folder.forget(lambda m: (m["stage"], m["iteration"]) == (self.stage, self.t))

    def forget_after(self, step: int) -> None:
        """Removes lines that this stage wrote at later steps or in later iterations."""
        self._folder.forget(
            lambda m: m["stage"] == self.stage and (m["iteration"], m["step"]) > (self.t, step)
        )
