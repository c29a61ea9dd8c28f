"""Defines the command `selm eval lm_eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from selm_jax.evaluation.command import app
from selm_jax.evaluation.options import DryRun, Loading, OwnResults, Seed, default_out
from selm_jax.shell.paths import place
from selm_jax.shell.verbs import verb


@dataclass(frozen=True, kw_only=True)
class Options:
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model folder, Hub id, GGUF file, or run folder (its last model)."
        ),
    ]
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of lm-eval as NAME[:SHOTS],...; `paper` stands for the paper's six tasks."
        ),
    ]
    out: OwnResults = None
    include: Annotated[
        Path | None,
        typer.Option(
            help="Folder of your own task files (YAML).",
            metavar="FOLDER",
            parser=place,
            show_default="only lm-eval's",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            help="Use only this many rows of each task, from its start.", min=1, show_default="all"
        ),
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the model's chat template.")
    ] = True
    system: Annotated[
        str | None, typer.Option(help="System message for every conversation.", show_default="none")
    ] = None
    seed: Seed = 0
    loading: Loading
    dry_run: DryRun = False


@verb(
    app,
    needs="a model and lm-eval (`pip install 'selm_jax[lm-eval]'`)",
    writes="the harness's results into the folder of --out",
    example="selm eval lm_eval runs/selm --tasks arc_easy:0 --limit 100",
)
def lm_eval(options: Options) -> None:
    """Run academic benchmarks.

    The language model evaluation harness runs them. No judge is called. --dry-run counts the
    tokens that the tasks take.
    """
    from selm_jax.evaluation.benchmarks.lm_eval import run as harness
    from selm_jax.shell.progress import terminal

    o = options
    model = o.loading.open(o.source)
    harness.run(
        model, o.tasks, out=o.out or default_out(model.name, "lm_eval"), include=o.include,
        limit=o.limit, chat=o.chat, system=o.system, seed=o.seed, dry_run=o.dry_run,
        console=terminal(),
    )  # fmt: skip
