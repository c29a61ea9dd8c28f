"""`Step`: the settings, the folder and the log that a stage's function gets besides its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from selm_jax.config import Experiment
from selm_jax.parallel import multihost
from selm_jax.run.folder import StageLog
from selm_jax.run.programs import Programs
from selm_jax.run.remaining import entries_of, time_left
from selm_jax.run.task import Task
from selm_jax.shell.progress import bar
from selm_jax.stages.declared import Declared, DeclaredTask

if TYPE_CHECKING:
    from selm_jax.run.run import Run


@dataclass(frozen=True)
class Step:
    """The context of a running stage: its iteration, settings, folder, programs and log.

    A stage can read only the settings that it declares.

    Attributes:
      run: the name of the run, for messages.
      t: the number of the iteration.
      folder: the iteration's folder, where the stage writes its outputs.
      settings: the experiment, limited to the settings that the stage declares.
      task: the task, limited in the same way.
      programs: compiled functions and the mesh.
      log: the stage's lines of metrics.jsonl.
      iterations: the number of iterations, used only to estimate the remaining time.
      note_server: records in the manifest which version of a server answered; called by the first
        process only.
      ranker_batches: the batches of the ranker's models, if the stage had to make them smaller; the
        run remembers them when the stage ends.
      plenty: whether there is memory to spare (`Choice.has_plenty`).
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
    ranker_batches: list[int] = field(default_factory=list)
    plenty: bool = True

    @classmethod
    def of(cls, run: Run, stage: str, t: int, keys: frozenset[str]) -> Step:
        """Makes the context of a run's stage that declares the settings `keys`."""
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
            plenty=run.sizes.has_plenty,
        )

    def say(self, text: str) -> None:
        self.console.print(f"iteration {self.t}  {self.stage}: {text}", soft_wrap=True)

    def bar(self, total: int, unit: str) -> Any:
        """A progress bar.

        As a context it gives a function `(more, tokens)` to call with the units and tokens that are
        newly done.
        """
        after = time_left(entries_of(self.folder.parent), self.iterations, self.stage, self.t)
        return bar(self.console, f"iteration {self.t}  {self.stage}", total, unit, after)


def counting(advance: Callable[[int, int], None]) -> Callable[..., None]:
    """Wraps a bar's `advance` so that it also stops the stage if the run was told to stop."""

    def progress(more: int, tokens: int = 0) -> None:
        advance(more, tokens)
        multihost.stop_if_told()

    return progress
