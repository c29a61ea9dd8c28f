"""The decorator `@stage`, with which a function runs once and its stored outputs are then reused.

    @stage(leaves=("examples.parquet",), settings=("text", "training.row_length"))
    def score(step: Step, prompts: list[Prompt], reference: Model) -> Counts: ...

`score(run, t, prompts, reference)` digests every argument and the named settings, and looks the
stage up in the iteration's `stage.json`. If it is done with the same digests, it is skipped; if it
is done with others, that is an error. If it is not done, its outputs are copied from another run of
the sweep that has done it, or else its body runs. A stage depends on its arguments and nothing
else, so there is no second list of inputs that could be wrong. The body gets a `Step`, which gives
access to nothing that the stage does not declare.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selm_jax.config import Experiment
from selm_jax.parallel import multihost
from selm_jax.run.folder import StageLog
from selm_jax.run.inputs import Model, StoredTable, Training, digests_of
from selm_jax.run.memory import advice, out_of_memory
from selm_jax.run.task import Task
from selm_jax.shell import artifacts, compiling, jsonl
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.memory import release, until_it_fits
from selm_jax.shell.pace import here
from selm_jax.shell.shared_stages import key_of
from selm_jax.shell.words import redo
from selm_jax.stages.declared import recorded, sources
from selm_jax.stages.step import Step

if TYPE_CHECKING:
    from selm_jax.run.run import Run

Counts = dict[str, Any]
Left = StoredTable | Model | Training | None


def stage(
    *,
    settings: tuple[str, ...] | Callable[[Experiment, Task], tuple[str, ...]],
    leaves: tuple[str, ...] | Callable[..., tuple[str, ...]] = (),
    gives: Callable[[Path], Left] | None = None,
    name: str | None = None,
    shared: Callable[[Experiment], bool] | bool = True,
    judges: Callable[[Step, Counts], None] = lambda step, counts: None,
    goes_on_from: tuple[str, ...] = (),
    scratch: tuple[str, ...] = (),
    ends: tuple[str, ...] = (),
) -> Callable[[Callable[..., Counts]], Stage]:
    """Turns a function `(step, ...) -> counts` into a stage of an iteration.

    Args:
      settings: dotted keys of the settings that the body may read; a group includes all its
        settings. A function if they depend on the experiment.
      leaves: files and folders in the iteration's folder that the body writes and that must not
        change later; or a function of the body's arguments that returns them.
      gives: returns the result of the call, given the iteration's folder; by default the table that
        the stage leaves.
      name: the stage's name in `stage.json`, if it differs from the function's.
      shared: whether runs with equal inputs and settings get equal outputs, so that only one run of
        a sweep has to do the work.
      judges: is called with the step and the counts that are taken from another run's stage. It may
        warn or raise by settings that these do not depend on.
      goes_on_from: folders that a stopped stage resumes from; they are deleted if it starts afresh.
      scratch: folders of this stage that are not needed once its outputs are written.
      ends: folders of earlier stages that are not needed once this stage is recorded as done.
    """

    def decorate(body: Callable[..., Counts]) -> Stage:
        return Stage(
            body,
            name or body.__name__,
            settings,
            leaves,
            gives,
            shared,
            judges,
            goes_on_from,
            scratch,
            ends,
        )

    return decorate


@dataclass(frozen=True)
class Stage:
    """A function decorated with `@stage`; the docstring of `stage` explains the fields."""

    body: Callable[..., Counts]
    name: str
    settings: tuple[str, ...] | Callable[[Experiment, Task], tuple[str, ...]]
    leaves: tuple[str, ...] | Callable[..., tuple[str, ...]]
    gives: Callable[[Path], Left] | None
    shared: Callable[[Experiment], bool] | bool
    judges: Callable[[Step, Counts], None]
    goes_on_from: tuple[str, ...]
    scratch: tuple[str, ...]
    ends: tuple[str, ...]

    def __call__(self, run: Run, t: int, *arguments: Any, **named: Any) -> Any:
        """Runs the stage unless it is done, and returns its result.

        A stage that gets no prompts has nothing to do. If only one stage is wanted (`run.wanted`),
        the stages before it are only checked and those after it are skipped.

        Raises:
          ArtifactError: the stage was done with other inputs or settings, or its outputs have
            changed since.
        """
        given = inspect.signature(self.body).bind(None, *arguments, **named).arguments
        call = _Call(self, run, t, {k: v for k, v in list(given.items())[1:]})  # all but the step
        if not any(isinstance(value, list) and not value for value in given.values()):
            match run.wanted.says(self.name, t):
                case "do":
                    run.wanted.note(self.name, t, call.do())
                case "check":
                    multihost.on_first(call.check)
        if self.gives is not None:
            return self.gives(call.folder)
        return StoredTable(call.folder, self.leaves[0]) if isinstance(self.leaves, tuple) else None

    def recorded(self, run: Run, t: int) -> dict[str, Any]:
        """The settings of iteration t that `stage.json` records for the stage."""
        return recorded(run.experiment, run.task, self.keys(run), t)

    def keys(self, run: Run) -> frozenset[str]:
        """The settings that the stage declares in this run."""
        declared = self.settings
        return frozenset(
            declared if isinstance(declared, tuple) else declared(run.experiment, run.task)
        )


@dataclass(frozen=True)
class _Call:
    """One call of a stage: its run, its iteration and its arguments."""

    stage: Stage
    run: Run
    t: int
    given: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def folder(self) -> Path:
        return self.run.folder.iteration(self.t)

    @property
    def record(self) -> artifacts.Stages:
        return artifacts.Stages(self.folder)

    def settings(self) -> dict[str, Any]:
        return self.stage.recorded(self.run, self.t)

    def inputs(self) -> dict[str, str]:
        """The digests of the stage's arguments, computed by the first process only."""
        return digests_of(self.given) | sources(self.run.experiment, self.stage.keys(self.run))

    def check(self) -> None:
        """Raises ArtifactError if the inputs or settings have changed since the stage began."""
        if not self._is_fresh():
            self.record.is_done(self.name, self.inputs(), self.settings())

    def do(self) -> bool:
        """Runs the stage unless it is done, and returns whether it ran.

        All processes do the work; the first one checks whether it is done, and records it.
        """
        here.enter(f"iteration {self.t}, {self.name}")
        multihost.stop_if_told()
        step = Step.of(self.run, self.name, self.t, self.stage.keys(self.run))
        names = self.stage.leaves
        names = names if isinstance(names, tuple) else names(step, **self.given)
        outputs = {name: self.folder / name for name in names}
        settings = self.settings()
        inputs = multihost.on_first(lambda: self._begin(settings))
        if inputs is None:
            gone = multihost.on_first(lambda: sorted(self.record.gone()))
            artifacts.wait_for(path for name, path in outputs.items() if name not in gone)
            self._clear(self.stage.ends)
            return False
        self._follow(self.stage.goes_on_from)
        began, built = time.perf_counter(), compiling.spent()
        share = self.stage.shared
        store = self.run.store if share is True or (share and share(step.settings)) else None
        # Sizes that are `auto` only round the results, so runs with other sizes share them, too.
        key = key_of(stage=self.name, iteration=self.t, inputs=inputs, settings=settings)
        found = None
        if store is not None:
            found = multihost.on_first(lambda: store.take(key, self.folder))
        counts = self._work() if found is None else self._taken(step, found)
        multihost.barrier()
        artifacts.wait_for(outputs.values())
        seconds, built = time.perf_counter() - began, compiling.spent() - built

        def finish() -> None:
            here = None if store is None else store.name_of(self.run.folder.path)
            logged = step.log.lines()
            if store is not None and found is None:
                store.put(key, outputs, {"run": here, "counts": counts, "logged": logged})
            # If the process is killed here, the deleted files are made again.
            for name in self.stage.scratch:
                artifacts.remove(self.folder / name)
            # If a run was killed after `put`, it has now taken back its own work.
            taken = key if found and found["run"] != here else None
            self.run.folder.keep_metrics()
            self.record.finish(
                self.name,
                inputs,
                settings,
                outputs,
                counts,
                seconds,
                taken,
                jsonl.values_digest(logged),
            )

        multihost.on_first(finish)
        self._follow(self.stage.scratch)
        self._clear(self.stage.ends)
        release()  # or this stage's memory would add to the next stage's peak
        notes = [f"{built:.0f} s spent on compiling"] if built >= 1 else []
        notes += [] if found is None else [f"as {found['run']}"]
        self.run.say(self.name, self.t, counts, seconds, ", ".join(notes))
        return True

    def _work(self) -> Counts:
        """Runs the body; with smaller sizes once more, if memory runs out and sizes are `auto`.

        Several processes cannot go on: one that has memory left waits for the others in a
        collective operation, and does not learn of other sizes. So the run only notes them.
        """

        def work() -> Counts:
            step = Step.of(self.run, self.name, self.t, self.stage.keys(self.run))
            try:
                return self.stage.body(step, **self.given)
            finally:
                if step.ranker_batches:
                    self.run.sizes = self.run.sizes.with_ranker(self.name, step.ranker_batches)
                    self.run.write_manifest()

        def lower(error: Exception) -> None:
            found = self.run.sizes.smaller(self.name)
            if found is None:
                told = advice(self.name, self.run.sizes.sizes)
                raise out_of_memory(error, self.name, self.folder, told) from error
            self.run.sizes = found
            self.run.write_manifest()
            if multihost.count() > 1:
                told = _of_several(found.lowered[-1])
                raise out_of_memory(error, self.name, self.folder, told) from error
            self.run.console.print(found.lowered[-1], style="yellow", soft_wrap=True, markup=False)

        return until_it_fits(work, lower)

    def _begin(self, settings: Mapping[str, Any]) -> dict[str, str] | None:
        """Records the inputs before the work begins and returns them; None if the stage is done."""
        inputs, record = self.inputs(), self.record
        if self._is_fresh():
            for name in self.stage.goes_on_from:
                artifacts.remove(self.folder / name)
        elif record.is_done(self.name, inputs, settings):
            self._check_log()
            return None
        self._check_models()
        _ = self.run.folder.writers  # a tracker that cannot be opened must fail before the work
        record.begin(self.name, inputs, settings)
        return inputs

    def _check_models(self) -> None:
        """Raises ArtifactError if `keep_models: last` has deleted a model that the stage needs."""
        for model in self.given.values():
            if not isinstance(model, Model) or model.iteration is None:
                continue
            if model.path.name in artifacts.Stages(model.iteration).gone():
                raise artifacts.ArtifactError(
                    f"{model.path}: stage {self.name!r} of iteration {self.t} needs this model, "
                    "which keep_models: last has deleted. To make it again: "
                    f"{redo(self.run.folder.iteration(1), 'generate')}"
                )

    def _is_fresh(self) -> bool:
        """Returns whether the stage has no work to continue, so that its settings may still change.

        This is so if the stage never began, was removed from `stage.json`, or was stopped before
        its first part was finished.
        """
        entry = self.record.read().get(self.name)
        if entry is None or entry["done"]:
            return entry is None
        return not any(mirrors.has_files(self.folder / n) for n in self.stage.goes_on_from)

    def _clear(self, names: tuple[str, ...]) -> None:
        if names:
            multihost.on_first(lambda: [artifacts.remove(self.folder / name) for name in names])
            self._follow(names)

    def _follow(self, names: tuple[str, ...]) -> None:
        """Frees the room of folders that the first process has removed, in the other processes."""
        if not multihost.is_first():
            for name in names:
                artifacts.follow_removal(self.folder / name)

    def _check_log(self) -> None:
        """Raises ArtifactError if the stage's lines in metrics.jsonl have changed."""
        before = self.record.read()[self.name].get("logged")  # earlier versions kept none
        log = StageLog(self.run.folder, self.name, self.t)
        if before not in (None, jsonl.values_digest(log.lines())):
            raise artifacts.ArtifactError(
                f"{log.file}: the lines of stage {self.name!r}, iteration {self.t}, have changed "
                "since the stage wrote them. Restore the file from a copy, or run the stage again: "
                f"{redo(self.folder, self.name)}"
            )

    def _taken(self, step: Step, found: Mapping[str, Any]) -> Counts:
        """Copies the metrics lines of another run's stage to this run, and returns its counts."""
        step.log.forget()
        for line in found["logged"]:
            step.log({k: v for k, v in line.items() if k not in ("stage", "iteration")})
        self.stage.judges(step, found["counts"])
        return found["counts"]


def _of_several(given_up: str) -> str:
    """Says what to do after one of several processes has run out of memory."""
    if multihost.is_first():
        return (
            "Another process may still be computing with these sizes, so the run ends here, and "
            f"notes for its next start: {given_up}. The same command continues"
        )
    return (
        "The first process notes smaller sizes if it has run out of memory, too: then the same "
        "command continues. Otherwise set smaller sizes in the experiment"
    )
