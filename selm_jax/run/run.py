"""A run: an experiment and the folder that it writes to.

A run is composed of parts, each built on first use. A stage that is run alone builds the same parts
again.

    part       contents                            built from the settings and
    folder     paths, metrics, manifest            -
    task       the kind of model to train          -
    devices    meshes                              chips
    model      the start model's facts and chat    task
    data       prompts and their lengths           task, model
    sizes      the sizes of batches                devices, model's facts, data's lengths
    programs   parameters, update, engine          as sizes, task, sizes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from rich.console import Console

from selm_jax.config import Experiment
from selm_jax.feedback import ranker as rankers
from selm_jax.parallel import multihost
from selm_jax.policy.sizes import BatchSizes, with_sizes
from selm_jax.preferences.acquisition import READ_MODEL
from selm_jax.run import sizes
from selm_jax.run.best import best_so_far
from selm_jax.run.data import Data
from selm_jax.run.devices import Devices
from selm_jax.run.folder import Folder
from selm_jax.run.inputs import LazyRanker, Model, Sampled, StoredTable, Words
from selm_jax.run.model import StartModel
from selm_jax.run.programs import Programs, SharedPrograms
from selm_jax.run.sizes import Choice
from selm_jax.run.task import Task, refuse_user_code, task_of
from selm_jax.run.wanted import Wanted
from selm_jax.shell.progress import bar, terminal
from selm_jax.shell.shared_stages import SharedStages
from selm_jax.tables import responses as answers
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Prompt


class Run:
    """An experiment and the folder that it writes to.

    Args:
      devices: the devices to use; None uses all of them.
      store: finished stages that the runs of a sweep share.
      compiled: compiled programs that the runs of a sweep share; None: the run's own.
      imports: whether functions of the user that the experiment names may be imported; a command
        that only reads the folder sets it to False.
    """

    def __init__(
        self,
        experiment: Experiment,
        console: Console | None = None,
        devices: Sequence[Any] | None = None,
        store: SharedStages | None = None,
        imports: bool = True,
        compiled: SharedPrograms | None = None,
    ):
        self._compiled = compiled or SharedPrograms()
        self._given, self.store, self.imports = experiment, store, imports
        self.wanted = Wanted()  # which stages to run
        # Only the first process prints.
        self.console = console or terminal(quiet=not multihost.is_first())
        self.folder = Folder(experiment)
        self.devices = Devices(experiment.compute, devices)

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment, with the sizes that its run folder began with as numbers, if it did."""
        begun = multihost.on_first(lambda: sizes.begun_with(self._given, self.folder.path))
        return with_sizes(self._given, begun)

    @cached_property
    def task(self) -> Task:
        return task_of(self.experiment.objective, None if self.imports else self.folder.path)

    @cached_property
    def model(self) -> StartModel:
        return StartModel(self.experiment, self.task, self.console)

    @cached_property
    def data(self) -> Data:
        return Data(self.experiment, self.task, self.model)

    @cached_property
    def sizes(self) -> Choice:
        """The sizes of batches: those that the run began with, or else a choice for these devices.

        All processes get the same.
        """
        chip = self.devices.mesh.local_devices[0]
        draft = _programs(self, None)
        prompts = [len(self.prompts(t)) for t in self.iterations]
        room = sizes.room_in(self.store, chip)
        found = sizes.choose(draft, prompts, len(self.heldout), room)
        return found.kept(multihost.on_first(lambda: sizes.manifest_of(self.folder.path)))

    @property
    def programs(self) -> Programs:
        """The jitted functions of the experiment, for its data's lengths and the present sizes."""
        return self._compiled.of(_programs(self, self.sizes.sizes))

    # What Algorithm 1 reads

    @property
    def iterations(self) -> range:
        return range(1, self.experiment.iterations + 1)

    @property
    def start(self) -> Model:
        """The start model."""
        return Model(self.model.folder.path, origin=self.model.folder.origin)

    @property
    def fixed_reference(self) -> bool:
        """Says whether every iteration's reference is the start model, not the preceding policy."""
        return self.experiment.training.reference_policy == "start"

    def prompts(self, t: int) -> list[Prompt]:
        return self.data.prompts(t)

    @property
    def heldout(self) -> list[Prompt]:
        return self.data.heldout

    @property
    def chat(self) -> Chat:
        return self.model.chat

    @cached_property
    def ranker(self) -> LazyRanker:
        f = self.experiment.feedback
        if not self.imports:
            refuse_user_code(self.folder.path, "feedback.ranker", f.ranker)
        folder = self.folder.path
        return LazyRanker(
            lambda: sizes.remembered(rankers.build_ranker(f.ranker, **f.settings), folder)
        )

    def ranker_of(self, t: int, policy: Model) -> LazyRanker:
        """The ranker of iteration t, whose policy it may read."""
        before = self.before(t)
        reference = None if before is None else before.path
        return LazyRanker(lambda: rankers.for_policy(self.ranker.ranker, policy.path, reference))

    def policy(self, t: int) -> Model:
        """The policy after iteration t; for t = 0 the start model."""
        return self.start if t == 0 else Model(self.folder.model(t), self.folder.iteration(t))

    def looked_at(self, t: int, policy: Model) -> tuple[Model | None, Model | None]:
        """The models that the acquisition function evaluates: (the policy, its reference).

        They are the policy that answered in iteration t and the reference that it was trained
        against. Each is None if the acquisition does not use it.
        """
        acquisition = self.experiment.feedback.acquisition
        if acquisition not in READ_MODEL:
            return None, None
        return policy, self.before(t) if acquisition == "reward_gap" else None

    def before(self, t: int) -> Model | None:
        """The reference that the policy which answers in iteration t was trained against.

        It is None in iteration 1, where the policy is the start model and would be compared with
        itself.
        """
        if t == 1:
            return None
        return self.start if self.fixed_reference else self.policy(t - 2)

    def sampled(self, responses: StoredTable, policy: Model, reference: Model) -> Sampled | None:
        """A policy's answers, to compare the sampler's log-probabilities with the scorer's.

        It is None if the sampler has kept none, as in earlier versions, or if training reads other
        token ids than were sampled (`text.layout: paper`).
        """
        if self.experiment.text.layout == "paper":
            return None
        if not multihost.on_first(lambda: answers.has_logps(responses.path)):
            return None
        scored = policy == reference and not self.task.reference_free
        return Sampled(responses, None if scored else policy)

    def card(self, t: int) -> Words:
        """The README.md of the policy after iteration t."""
        origin, pipeline = self.model.folder.origin, self.task.pipeline
        method = self.task.method(self.experiment)
        return Words(lambda: self.folder.model_card(t, origin, pipeline, method))

    def complete_card(self, t: int) -> None:
        """Adds the evaluation of the policy after iteration t to its README.md."""
        if multihost.is_first():
            method = self.task.method(self.experiment)
            self.folder.complete_card(t, self.model.folder.origin, self.task.pipeline, method)

    # What it writes and prints

    def open(self) -> None:
        """Writes config.yaml and manifest.json, after a torn line of metrics.jsonl is cut off."""
        self.folder.mend_metrics()
        self.folder.write_config(self.experiment)
        self.write_manifest()

    def write_manifest(self) -> None:
        best = None
        if multihost.is_first():
            best = best_so_far(self.experiment, self.folder, self.experiment.iterations)
        self.folder.write_manifest(
            {
                "method": self.experiment.objective["loss"],
                "objective": self.experiment.objective,
                "rates": self.task.rates,
                "reference_free": self.task.reference_free,
                **({"start_share": share} if (share := self.task.start_share) else {}),
                **({"uses_shared": True} if self.task.uses_shared else {}),
                "layout": self.experiment.text.layout,
                "model": self.model.folder.origin,
                "parameters": self.programs.parameters,
                **self.sizes.described(),
                **self.devices.described(),
                **({} if best is None else {"best": best.entry(self.folder)}),
            }
        )

    def bar(self, title: str, total: int, unit: str):
        """A progress bar; see `shell.progress.bar`."""
        return bar(self.console, title, total, unit)

    def say(
        self, stage: str, t: int, counts: Mapping[str, Any], seconds: float, note: str = ""
    ) -> None:
        """Prints one line for a finished stage.

        Detailed counts, such as `drops/tie`, are only in stage.json.
        """
        shown = ", ".join(
            _in_words(
                key.removeprefix("heldout/"),
                value,
                counts.get(f"{key}_low"),
                counts.get(f"{key}_high"),
            )
            for key, value in counts.items()
            if ("/" not in key or key.startswith("heldout/"))
            and not key.endswith(("_low", "_high"))
            if value != 0 or f"{key}_low" in counts
        )
        shown = f"{shown}  ({note})" if note else shown
        # The line stays whole in a file and is wrapped between words in a terminal.
        line = f"iteration {t}  {stage:<9} {seconds:7.1f} s   {shown}"
        self.console.print(line, soft_wrap=not self.console.is_terminal)


def _in_words(name: str, value: Any, low: float | None = None, high: float | None = None) -> str:
    """Writes a count, or a mean with the ends of its interval if given, as readable text."""
    if value is None:  # the judge's answer could not be read
        return f"{name} not readable"
    interval = "" if low is None or high is None else f" [{low:,.3f}, {high:,.3f}]"
    return f"{name} {value:,.3f}{interval}" if isinstance(value, float) else f"{value:,} {name}"


def _programs(run: Run, sizes: BatchSizes | None) -> Programs:
    return Programs(
        run.experiment, run.task, run.model.facts, run.data.sizes, run.chat.stop_ids, run.devices,
        sizes,
    )  # fmt: skip
