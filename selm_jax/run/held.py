"""A run at work: its folder is its own, and everything that could fail early has been looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from selm_jax.parallel import multihost
from selm_jax.report import page
from selm_jax.run.check import check
from selm_jax.run.run import Run
from selm_jax.shell.lock import only_one


@contextlib.contextmanager
def held(run: Run) -> Iterator[None]:
    """Holds the run's folder for this run alone, which the first process does for all of them.

    Raises:
      Stopped: the run was told to stop.
    """
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
    """Writes report.html into the run's folder."""
    if multihost.is_first():
        file = run.folder.path / "report.html"
        page.write([run.folder.path], file)
        run.console.print(f"report: {file}", soft_wrap=True)
