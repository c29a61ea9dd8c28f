"""What a stage is given, and the digests by which `stage.json` knows it again.

A stage depends on its arguments and on nothing else, so every kind of argument says here what of it
counts: the bytes of a table or of a model folder, the prompts, the tokenizer and template, the bytes
of the models that rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from selm_jax.feedback.ranker import Ranker, folders_of
from selm_jax.parallel import multihost
from selm_jax.run.log import logged
from selm_jax.shell import artifacts
from selm_jax.shell.shared_stages import key_of
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Prompt, prompts_digest
from selm_jax.training.checkpoint import Checkpoints


@runtime_checkable
class Input(Protocol):
    """An argument of a stage that says itself what a stage's outcome depends on.

    `digests` are by the name that `stage.json` has for them; `name` is that of the parameter.
    """

    def digests(self, name: str, /) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class StoredTable:
    """A table or a folder of tables that a stage has left in the folder of its iteration."""

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def digests(self, _name: str) -> Mapping[str, str]:
        return {self.name: artifacts.Stages(self.folder).digest(self.name)}


@dataclass(frozen=True)
class Model:
    """A model folder: the start model, or the policy that an iteration has left.

    Attributes:
      iteration: the folder of that iteration; what its export has left must not have changed.
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
        """What it is called where it is used, and its commit if it came from the Hub: never by the
        place where this machine keeps it."""
        if "source" in self.origin:
            return self.origin["source"], self.origin.get("commit")
        return str(self.path), None

    def digests(self, name: str) -> Mapping[str, str]:
        return {name: self.digest}


@dataclass(frozen=True)
class Training:
    """A training in the folder of its iteration. Its checkpoints are gone once they are exported.

    What counts for the export is what the training was done with.
    """

    folder: Path

    def digests(self, name: str) -> Mapping[str, str]:
        done = artifacts.Stages(self.folder).read().get("train", {})
        return {name: key_of(**{k: done.get(k) for k in ("inputs", "settings")})}

    def checkpoints(self, policy: Model, keep: int = 1) -> Checkpoints:
        """Its checkpoints, which mean nothing without the model that it starts from."""
        start = multihost.on_first(lambda: policy.digest)
        folder = self.folder / "checkpoints"
        return Checkpoints(folder, start=start, keep=keep, logged=self._logged)

    def _logged(self, step: int) -> str:
        """Names the metrics of the updates up to a checkpoint, which is not to outlive them."""
        file, t = self.folder.parent / "metrics.jsonl", int(self.folder.name.rpartition("_")[2])
        lines = logged(file, "train", t)
        if lines:
            artifacts.flush(file)
        return key_of(lines=[line for line in lines if line["step"] <= step])


@dataclass(frozen=True)
class LazyRanker:
    """The ranker, which one process alone builds and asks: it may be a large model, or a server."""

    build: Callable[[], Ranker] = field(compare=False)

    @cached_property
    def ranker(self) -> Ranker:
        return self.build()

    def digests(self, name: str) -> Mapping[str, str]:
        folders = folders_of(self.ranker)
        return {f"{name} {n}": artifacts.digest(folder) for n, folder in enumerate(folders, 1)}


@dataclass(frozen=True)
class Words:
    """A text that is written beside a result, such as a model card, and changes nothing about it."""

    write: Callable[[], str] = field(compare=False)

    def digests(self, _name: str) -> Mapping[str, str]:
        return {}


def digests_of(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The digests of a stage's arguments, by the names under which `stage.json` keeps them.

    None is no input: a stage that is given no ranker does not depend on one.

    Raises:
      TypeError: an argument of a kind that has no digest. A stage cannot depend on it unnoticed.
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
        f"a stage was given {name}, a {type(value).__name__}, which has no digest; expected None, "
        "prompts, a Chat, or something with `digests(name)`"
    )
