"""Locks a run's folder while the run works, and first checks everything that can fail early."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from selm_jax.config import Experiment
from selm_jax.config.heldout import bad_metric
from selm_jax.feedback.ranker import judged_by_policy
from selm_jax.parallel import multihost
from selm_jax.report import page
from selm_jax.run.best import best_so_far
from selm_jax.run.check import check
from selm_jax.run.remaining import entries_of, time_left
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.memory import keep_freed
from selm_jax.shell.one_process import as_another_of_its_run, only_one
from selm_jax.shell.words import duration


@contextlib.contextmanager
def held(run: Run) -> Iterator[None]:
    """Locks the run's folder, checks the run and opens it, for the duration of a `with` block.

    The first process takes the lock for all processes; the others write only while it has it.

    Raises:
      Stopped: the run was told to stop.
    """
    with contextlib.ExitStack() as stack:
        folder = run.folder.path
        lease = multihost.on_first(lambda: stack.enter_context(only_one(folder)))
        if not multihost.is_first():
            stack.enter_context(as_another_of_its_run(folder, lease))
        artifacts.wait_for([run.folder.path])
        check(run)
        run.open()
        keep_freed(run.sizes.has_plenty)
        stack.callback(keep_freed, False)
        multihost.listen()
        try:
            yield
        except multihost.Stopped:
            where = mirrors.named(run.folder.path)
            run.console.print(f"{where}: the run was told to stop; the same command continues it")
            raise


def drop_models(run: Run, t: int) -> None:
    """Deletes models that no iteration after t needs, if the experiment keeps only the last one.

    The next iteration starts from the model of iteration t, and may need the model before that
    (`_reads_before`). The best model so far by `keep_best` stays. The start model is not in the
    run folder and is never deleted.

    Raises:
      RunError: the evaluation of iteration t has no metric `keep_best`.
    """
    check_best(run, t)
    if run.experiment.keep_models == "all":
        return
    first = t  # the first one to keep
    if t < run.experiment.iterations and _reads_before(run.experiment):
        first -= run.before(t + 1) == run.policy(t - 1)

    def kept() -> int | None:
        best = best_so_far(run.experiment, run.folder, t)
        return None if best is None else best.iteration

    best = multihost.on_first(kept)
    old = [run.folder.iteration(u) for u in range(1, first) if u != best]

    def drop() -> None:
        for folder in old:
            artifacts.Stages(folder).let_go("export", "model")

    multihost.on_first(drop)
    for folder in () if multihost.is_first() else old:
        artifacts.follow_removal(folder / "model")


def check_best(run: Run, t: int) -> None:
    """Checks that the evaluation of iteration t, if there is one, has the metric `keep_best`.

    Iteration 0 is checked before anything is trained. Two metrics compare with the start model and
    are missing there: `gain`, which needs `reward_greedy`, and `capability`, which needs nothing.

    Raises:
      RunError: the metric is missing.
    """
    metric = run.experiment.keep_best
    if metric is None or (t == 0 and metric.endswith("/capability")):
        return
    wanted = re.sub("/gain$", "/reward_greedy", metric) if t == 0 else metric

    def look() -> None:
        line = run.folder.logged("evaluate", t)
        if not line or wanted in line[-1]:
            return
        measured = ", ".join(key for key in line[-1] if not bad_metric(key, run.data.heldout_sets))
        raise RunError(
            f"keep_best: {metric}; iteration {t} has no metric {wanted}. Choose one that this run "
            f"measures ({measured}), or set keep_best: null, and continue the run"
        )

    multihost.on_first(look)


def _reads_before(e: Experiment) -> bool:
    """Says whether an iteration reads its policy's reference (`Run.before`) as well."""
    f = e.feedback
    of_ranker = judged_by_policy(f.ranker, f.settings)
    return f.acquisition == "reward_gap" or e.rollout.mixture is not None or of_ranker


def tell_time_left(run: Run, t: int) -> None:
    """Prints the run's remaining time after iteration t, if any iterations remain."""
    left = time_left(entries_of(run.folder.path), run.experiment.iterations)
    if left and run.wanted.worked:
        run.console.print(
            f"iteration {t} of {run.experiment.iterations} is done; the rest takes about "
            f"{duration(left)}",
            highlight=False,
        )


def write_report(run: Run) -> None:
    """Writes report.html into the run's folder, unless the experiment wants none."""
    if multihost.is_first() and run.experiment.log.report:
        file = run.folder.path / "report.html"
        page.write([run.folder.path], file)
        run.console.print(f"report: {mirrors.named(file)}", soft_wrap=True)
