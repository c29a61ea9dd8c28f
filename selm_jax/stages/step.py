"""What the body of a stage is given besides its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from selm_jax.config import Experiment
from selm_jax.parallel import multihost
from selm_jax.run.folder import StageLog
from selm_jax.run.programs import Programs
from selm_jax.run.remaining import time_left
from selm_jax.run.task import Task
from selm_jax.shell.progress import bar
from selm_jax.stages.declared import Declared, DeclaredTask

if TYPE_CHECKING:
    from selm_jax.run.run import Run


@dataclass(frozen=True)
class Step:
    """One stage of one iteration at work. It leads to nothing that the stage was not given.

    Attributes:
      run: the name of the run, for people.
      t: the number of the iteration.
      folder: where the iteration's files are; a stage writes there what it says it leaves.
      settings: the experiment, as far as the stage declares it.
      task: what follows from the objective, as far as the stage declares it.
      programs: compiled functions and the mesh.
      log: the stage's lines of metrics.jsonl.
      iterations: how many the run has; only the time left is told by it.
      note_server: notes in the manifest which version of a server answered; for the first process.
    """

    run: str
    stage: str
    t: int
    folder: Path
    settings: Experiment
    task: Task
    programs: Programs
    log: StageLog
    note_server: Callable[[str | None], None]
    console: Console
    iterations: int

    @classmethod
    def of(cls, run: Run, stage: str, t: int, keys: frozenset[str]) -> Step:
        """The step of a run's stage that declares these settings."""
        return cls(
            run=run.folder.name,
            stage=stage,
            t=t,
            folder=run.folder.iteration(t),
            settings=cast(Experiment, Declared(stage, run.experiment, keys)),
            task=cast(Task, DeclaredTask(stage, run.task, keys)),
            programs=run.programs,
            log=StageLog(run.folder, stage, t),
            note_server=partial(run.folder.note_server, t),
            console=run.console,
            iterations=run.experiment.iterations,
        )

    def say(self, text: str) -> None:
        self.console.print(f"iteration {self.t}  {self.stage}: {text}", soft_wrap=True)

    def bar(self, total: int, unit: str) -> Any:
        """A progress bar. Its context gives a function that takes how many more are done, and of how
        many tokens."""
        after = time_left(self.folder.parent, self.iterations, self.stage, self.t)
        return bar(self.console, f"iteration {self.t}  {self.stage}", total, unit, after)


def counting(advance: Callable[[int, int], None]) -> Callable[..., None]:
    """A bar's function that also ends the stage where the run has been told to stop."""

    def progress(more: int, tokens: int = 0) -> None:
        advance(more, tokens)
        multihost.stop_if_told()

    return progress
