"""The outer loop: which stages are done, which is next.

for t = 1, 2, ...:                                  paper, Algorithm 1
    generate   y ~ the current policy, which is this iteration's reference
    rank       best and worst become a pair
    score      the reference's log-probabilities
    train      L_DPO + optimism
    export     the policy, which is the next iteration's reference
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

from selm_jax.parallel import multihost
from selm_jax.report import page
from selm_jax.run.check import check
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell.lock import only_one
from selm_jax.stages import EVALUATE, STAGES
from selm_jax.training.checkpoint import Checkpoints


def iterate(run: Run) -> None:
    """Runs what is left of the experiment, then writes the report."""
    with _held(run):
        done = [_evaluate(run, 0)]
        run.write_manifest()
        for t in run.iterations:
            done += [stage.run(run, t) for stage in STAGES]
            Checkpoints(run.folder.iteration(t) / "checkpoints").delete()  # the export is complete
            done.append(_evaluate(run, t))
            run.write_manifest()
        if not any(done):
            run.console.print(f"{run.folder.path}: every stage is done already")
        write_report(run)


def run_stage(run: Run, name: str, t: int) -> None:
    """Runs one stage of iteration t, whose inputs must be there."""
    stage = next(s for s in (*STAGES, EVALUATE) if s.name == name)
    with _held(run):
        try:
            for before in itertools.takewhile(lambda s: s.name != name, STAGES if t else ()):
                multihost.on_first(lambda before=before: before.check(run, t))  # or two data mix
            if not stage.run(run, t):
                run.console.print(f"iteration {t}  {name}: done already")
            run.write_manifest()
        except FileNotFoundError as e:
            raise artifacts.ArtifactError(
                f"iteration {t}, stage {name!r}: {e.filename or e} is missing; "
                "run the stages before it first"
            ) from e


@contextlib.contextmanager
def _held(run: Run) -> Iterator[None]:
    """The run folder is this run's alone; the first process holds it for all of them."""
    with contextlib.ExitStack() as stack:
        multihost.on_first(lambda: stack.enter_context(only_one(run.folder.path)))
        check(run)
        run.open()
        multihost.listen()
        try:
            yield
        except multihost.Stopped:
            run.console.print(
                f"{run.folder.path}: told to stop; the same command goes on from here"
            )
            raise


def write_report(run: Run) -> None:
    if not multihost.is_first():
        return
    file = run.folder.path / "report.html"
    page.write([run.folder.path], file)
    run.console.print(f"report: {file}", soft_wrap=True)


def _evaluate(run: Run, t: int) -> bool:
    return bool(run.heldout) and EVALUATE.run(run, t)
