"""`selm sweep FILE`: one experiment in many settings and with many seeds, and one page about all.

A sweep file names a base experiment and a grid of changes to it:

    output: runs/alpha
    base: experiments/quickstart.yaml
    seeds: [1, 2, 3]
    set: {iterations: 2}                      # in every run
    grid:
      method:                                 # an axis: its levels, and what each changes
        dpo: {objective: {loss: dpo, beta: 0.1}}
        selm: {}
      training.global_batch: [8, 16]          # the same in short, where a level is a value
    baseline: {method: dpo}                   # what the other levels of this axis are compared with

Every cell of the grid is run with every seed, in a run folder like any other; the first seed's
cells come first. A stage whose inputs and settings equal those of another run's is not done again:
the first iteration's answers serve every objective, the start model's held-out answers all of them.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from selm_jax.iterate import iterate
from selm_jax.parallel import multihost
from selm_jax.report import sweep_page
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell.lock import only_one
from selm_jax.shell.memory import release
from selm_jax.shell.progress import terminal
from selm_jax.shell.store import Store
from selm_jax.sweep.plan import Sweep
from selm_jax.sweep.table import as_csv, shared, table

PAGE = "report.html"


class SweepError(RuntimeError):
    """Some runs of a sweep could not be finished. The message names them."""


def sweep(plan: Sweep, console: Console | None = None) -> None:
    """Runs what is left of a sweep, then writes its table and its page.

    The page is written after every run, about those that are finished. Of several processes all
    run, and the first writes.

    Raises:
      SweepError: runs that could not be finished; the others are.
    """
    console = console or terminal(quiet=not multihost.is_first())
    store = Store(plan.folder / "store")
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        multihost.on_first(lambda: stack.enter_context(only_one(plan.folder)))
        for i, member in enumerate(plan.members, 1):
            name = f"{member.cell.name}, seed {member.seed}"
            console.rule(f"{i} of {len(plan.members)}: {name}")
            try:
                iterate(Run(member.experiment, console, store=store))
            except Exception as e:
                if multihost.others_are_gone(e) or not type(e).__module__.startswith("selm_jax."):
                    raise  # not about this run alone: a defect, a full disk
                multihost.all_failed(f"sweep/{i}")
                failed[name] = str(e)
                console.print(f"{name}: {e}", style="red")
            release()
            multihost.on_first(lambda: str(write(plan, failed)))
    console.print(f"page: {plan.folder / PAGE}", soft_wrap=True)
    if failed:
        listed = "\n  ".join(f"{name}: {why}" for name, why in failed.items())
        raise SweepError(f"{len(failed)} of {len(plan.members)} runs failed:\n  {listed}")


def write(plan: Sweep, failed: Mapping[str, str] | None = None) -> Path:
    """Writes table.csv and report.html about the runs that are finished; returns the page."""
    rows = table(plan)
    with artifacts.whole(plan.folder / "table.csv") as partial, partial.open("w", newline="") as f:
        lines = list(as_csv(rows))
        writer = csv.DictWriter(f, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    page = plan.folder / PAGE
    sweep_page.write(
        page,
        rows,
        title=plan.title,
        about=plan.about,
        command=plan.command,
        axes=list(plan.members[0].cell.levels),
        axis=plan.axis,
        against=plan.baseline,
        failed=failed or {},
        shared=shared(plan),
    )
    return page
