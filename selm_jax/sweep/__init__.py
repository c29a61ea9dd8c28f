"""`selm sweep FILE`: runs one experiment with many settings and seeds, and writes one page.

A sweep file names a base experiment, found from the file's own folder, and a grid of changes to it:

    output: runs/alpha
    base: quickstart.yaml
    seeds: [1, 2, 3]
    set: {iterations: 2}                      # in every run
    grid:
      method:                                 # an axis: its levels, and what each changes
        dpo: {objective: {loss: dpo, beta: 0.1}}
        selm: {}
      training.global_batch: [8, 16]          # the same in short, where a level is a value
    baseline: {method: dpo}                   # what the other levels of this axis are compared with

Every cell of the grid runs with every seed, each in its own run folder, and the first seed's cells
come first. Before any of them trains, every cell's objective, ranker and data are built. A stage is
not repeated if another run of the sweep did it with the same inputs and settings: the first
iteration's answers serve every objective, and the start model's held-out answers serve all runs.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from selm_jax.iterate import iterate
from selm_jax.parallel import multihost
from selm_jax.report import sweep_page
from selm_jax.run.check import check
from selm_jax.run.programs import SharedPrograms
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.memory import release
from selm_jax.shell.one_process import only_one
from selm_jax.shell.progress import talks, terminal
from selm_jax.shell.shared_stages import SharedStages
from selm_jax.shell.storage_backend import StorageError
from selm_jax.sweep.grid import Sweep
from selm_jax.sweep.table import as_csv, shared, shown, table

PAGE = "report.html"


class SweepError(RuntimeError):
    """Some runs of a sweep could not start or did not finish. The message names them."""


def sweep(grid: Sweep, console: Console | None = None) -> None:
    """Runs a sweep's unfinished runs, then prints its table and writes its table and page.

    The page is written at the end, and after runs before that (`_Page`), from the runs that are
    finished. If there are several processes, all of them run and the first one writes.

    Raises:
      SweepError: a cell cannot be built, so nothing was trained; or some runs failed, and the
        others are finished.
    """
    results = console or terminal(quiet=not multihost.is_first())
    console = terminal(quiet=True) if talks().quiet else results
    store, compiled = SharedStages(grid.folder / "store"), SharedPrograms()
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        multihost.on_first(lambda: stack.enter_context(only_one(grid.folder)))
        multihost.on_first(lambda: _look(grid))
        _check_every_cell(grid, console)
        page = _Page(grid, failed)
        for i, member in enumerate(grid.members, 1):
            name = f"{member.cell.name}, seed {member.seed}"
            console.rule(f"{i} of {len(grid.members)}: {name}")
            try:
                iterate(Run(member.experiment, console, store=store, compiled=compiled))
            except Exception as e:
                if not _concerns_one_run(e):
                    raise
                multihost.all_failed(f"sweep/{i}")
                failed[name] = mirrors.in_words(str(e))
                console.print(f"{name}: {failed[name]}", style="red")
            release()
            gc.freeze()  # what is left is kept for the next runs, and need not be looked at again
            multihost.on_first(page.keep_up)
        multihost.on_first(page.write)
    multihost.on_first(lambda: results.print(shown(table(grid), grid)))
    results.print(f"page: {mirrors.named(grid.folder / PAGE)}", soft_wrap=True)
    if failed:
        raise SweepError(f"{len(failed)} of {len(grid.members)} runs failed:{_listed(failed)}")


class _Page:
    """Writes a sweep's page while its runs work, in a small part of their time.

    It reads all finished runs, so writing it after every run would take longer and longer.
    """

    _SHARE = 0.05  # of the time that may go into pages

    def __init__(self, grid: Sweep, failed: Mapping[str, str]):
        self._grid, self._failed = grid, failed
        self._due = time.monotonic()

    def keep_up(self) -> None:
        """Writes the page if the last one is old enough."""
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        start = time.monotonic()
        write(self._grid, self._failed)
        end = time.monotonic()
        self._due = end + (end - start) / self._SHARE


def _look(grid: Sweep) -> None:
    """Reads from the bucket what earlier processes have finished, for the page of all runs."""
    for member in grid.members:
        mirrors.look(member.folder)


def _check_every_cell(grid: Sweep, console: Console) -> None:
    """Checks every combination of settings by building its objective, ranker, data and programs.

    Raises:
      SweepError: some of them cannot be built; all of those are named.
    """
    console.print(f"checking {len(grid.cells)} settings before any of them trains")
    quiet, failed, seen = terminal(quiet=True), dict[str, str](), set[str]()
    for i, member in enumerate(grid.members, 1):
        if member.cell.name in seen:
            continue
        seen.add(member.cell.name)
        try:
            check(Run(member.experiment, quiet))
        except Exception as e:
            if not _concerns_one_run(e):
                raise
            multihost.all_failed(f"sweep/check/{i}")
            failed[member.cell.name] = mirrors.in_words(str(e))
    if failed:
        raise SweepError(
            f"{len(failed)} of {len(grid.cells)} settings cannot run, so nothing was trained:"
            f"{_listed(failed)}"
        )


def _concerns_one_run(error: Exception) -> bool:
    """Returns whether an error leaves other runs unaffected.

    A bug, a full disk, a dead process and a bucket that cannot be used concern all of them.
    """
    if isinstance(error, StorageError) or multihost.others_are_gone(error):
        return False
    return type(error).__module__.startswith("selm_jax.")


def _listed(failed: Mapping[str, str]) -> str:
    return "".join(f"\n  {name}: {why}" for name, why in failed.items())


def write(grid: Sweep, failed: Mapping[str, str] | None = None) -> Path:
    """Writes table.csv and report.html for the finished runs; returns the path of report.html."""
    rows = table(grid)
    with artifacts.whole(grid.folder / "table.csv") as partial, partial.open("w", newline="") as f:
        lines = list(as_csv(rows))
        writer = csv.DictWriter(f, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    page = grid.folder / PAGE
    sweep_page.write(
        page,
        rows,
        title=grid.title,
        about=grid.about,
        command=grid.command,
        axes=list(grid.members[0].cell.levels),
        axis=grid.axis,
        against=grid.baseline,
        failed=failed or {},
        shared=shared(grid),
    )
    return page
