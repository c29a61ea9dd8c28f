"""The inputs of stages, and their digests, by which a run notices that an input has changed.

A stage depends only on its arguments, so every kind of argument defines what its digest covers: the
bytes of a table or a model folder, the prompts, the tokenizer and template, or the bytes of the
models that rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from selm_jax.evaluation import EvaluationError
from selm_jax.feedback.ranker import Ranker, folders_of
from selm_jax.parallel import multihost
from selm_jax.run.log import logged
from selm_jax.shell import artifacts
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.shared_stages import key_of
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Prompt, prompts_digest
from selm_jax.training.checkpoint import Checkpoints


@runtime_checkable
class Input(Protocol):
    """A stage's argument that provides its own digests.

    `digests` returns digests by their names in `stage.json`; `name` is the parameter's name.
    """

    def digests(self, name: str, /) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class StoredTable:
    """A table, or a folder of tables, that a stage has written to its iteration's folder."""

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def digests(self, _name: str) -> Mapping[str, str]:
        return {self.name: artifacts.Stages(self.folder).digest(self.name)}


@dataclass(frozen=True)
class Model:
    """A model folder: the start model, or the policy that an iteration has exported.

    Attributes:
      iteration: the folder of that iteration; the exported files must not have changed.
      origin: where the start model came from (`sources.ModelFolder.origin`).
    """

    path: Path
    iteration: Path | None = None
    origin: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def digest(self) -> str:
        if self.iteration is None:
            return artifacts.digest(self.path)
        return artifacts.Stages(self.iteration).digest(self.path.name)

    @property
    def called(self) -> tuple[str, str | None]:
        """The model's name, and its commit if it came from the Hub.

        Neither a Hub model nor one of a run in a bucket is named by its path in this machine's
        cache.
        """
        if "source" in self.origin:
            return self.origin["source"], self.origin.get("commit")
        return mirrors.named(self.path), None

    def digests(self, name: str) -> Mapping[str, str]:
        return {name: self.digest}


@dataclass(frozen=True)
class Sampled:
    """The policy's answers, if the sampler has kept the log-probabilities of their tokens.

    Attributes:
      policy: the policy that answered; None if it is the reference, which is scored anyway.
    """

    responses: StoredTable
    policy: Model | None

    def digests(self, _name: str) -> Mapping[str, str]:
        policy = {} if self.policy is None else self.policy.digests("policy")
        return {**self.responses.digests("responses"), **policy}


@dataclass(frozen=True)
class HeldoutSets:
    """The named held-out sets, which are evaluated besides the main one.

    Attributes:
      prompts: the prompts of each set.
      first: the folder of the start model's answers; None if the start model answers.
    """

    prompts: Mapping[str, list[Prompt]]
    first: Path | None

    def digests(self, name: str) -> Mapping[str, str]:
        found = {f"heldout {n}": prompts_digest(mine) for n, mine in self.prompts.items()}
        for n in self.prompts:
            found |= {} if (answers := self.answers(n)) is None else answers.digests(name)
        return found

    def answers(self, name: str) -> StoredTable | None:
        """The start model's answers to a set; None if the start model is being evaluated."""
        if self.first is None:
            return None
        return StoredTable(self.first, of_set("heldout.parquet", name))


def of_set(file: str, name: str | None) -> str:
    """The name of a held-out set's own table: `heldout-NAME.parquet` for `heldout.parquet`."""
    stem, _, ending = file.partition(".")
    return file if name is None else f"{stem}-{name}.{ending}"


@dataclass(frozen=True)
class Training:
    """The result of training, in its iteration's folder.

    The export deletes the checkpoints, so its digest covers what the training was done with.
    """

    folder: Path

    def digests(self, name: str) -> Mapping[str, str]:
        done = artifacts.Stages(self.folder).read().get("train", {})
        return {name: key_of(**{k: done.get(k) for k in ("inputs", "settings")})}

    def checkpoints(self, policy: Model, keep: int = 1) -> Checkpoints:
        """The checkpoints of this training, which are tied to the model that it starts from."""
        start = multihost.on_first(lambda: policy.digest)
        folder = self.folder / "checkpoints"
        return Checkpoints(folder, start=start, keep=keep, logged=self._logged)

    def _logged(self, step: int) -> str:
        """A digest of the metrics up to `step`; a checkpoint of that step stores it."""
        file, t = self.folder.parent / "metrics.jsonl", int(self.folder.name.rpartition("_")[2])
        lines = logged(file, "train", t)
        if lines:
            artifacts.keep(file)
        return key_of(lines=[line for line in lines if line["step"] <= step])


@dataclass(frozen=True)
class LazyRanker:
    """The ranker, built on first use and in one process only, because it may be a large model."""

    build: Callable[[], Ranker] = field(compare=False)

    @cached_property
    def ranker(self) -> Ranker:
        return self.build()

    def digests(self, name: str) -> Mapping[str, str]:
        folders = folders_of(self.ranker)
        return {f"{name} {n}": artifacts.digest(folder) for n, folder in enumerate(folders, 1)}


@dataclass(frozen=True)
class LazyTasks:
    """The lm-eval tasks of the capability guard, which are loaded with their data on first use.

    Attributes:
      load: returns the loaded tasks (`evaluation.benchmarks.lm_eval.guard.Tasks`).
      folder: the user's own task files, if there are any.
      first: the start model's scores; None if the start model is measured.
    """

    load: Callable[[], Any] = field(compare=False)
    folder: Path | None
    first: StoredTable | None

    def digests(self, name: str) -> Mapping[str, str]:
        found = {} if self.first is None else dict(self.first.digests(name))
        if self.folder is None:
            return found
        if not self.folder.is_dir():
            raise EvaluationError(
                f"evaluation.task_folder {self.folder}: this folder does not exist. Correct the "
                "path"
            )
        # Python leaves compiled copies of the code that task files name.
        files = artifacts.digests(self.folder)
        own = {file: sha for file, sha in files.items() if "__pycache__" not in file}
        return found | {"evaluation.task_folder": key_of(**own)}


@dataclass(frozen=True)
class Words:
    """A text, such as a model card, that is written next to a result but is not an input of it."""

    write: Callable[[], str] = field(compare=False)

    def digests(self, _name: str) -> Mapping[str, str]:
        return {}


def digests_of(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The digests of a stage's arguments, by their names in `stage.json`.

    An argument that is None has no digest: a stage without a ranker does not depend on one.

    Raises:
      TypeError: an argument has no digest. A stage could otherwise depend on it unnoticed.
    """
    found: dict[str, str] = {}
    for name, value in arguments.items():
        found |= _digests(name, value)
    return found


def _digests(name: str, value: Any) -> Mapping[str, str]:
    if value is None:
        return {}
    if isinstance(value, Input):
        return value.digests(name)
    if isinstance(value, Chat):
        return {name: value.digest}
    if isinstance(value, list) and all(isinstance(each, Prompt) for each in value):
        return {name: prompts_digest(value)}
    raise TypeError(
        f"a stage's argument {name} is a {type(value).__name__}, which has no digest. Pass None, "
        "prompts, a Chat, or an object with `digests(name)`"
    )
