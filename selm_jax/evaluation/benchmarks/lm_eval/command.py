"""`selm eval lm_eval`."""

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
        typer.Option(help="NAME[:SHOTS],... of lm-eval; `paper` stands for the paper's six."),
    ]
    out: OwnResults = None
    include: Annotated[
        Path | None,
        typer.Option(help="Folder of further task files.", metavar="FOLDER", parser=place),
    ] = None
    limit: Annotated[int | None, typer.Option(help="The first rows of each task.", min=1)] = None
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Through the model's chat template or not.")
    ] = True
    system: Annotated[str | None, typer.Option(help="System message.")] = None
    seed: Seed = 0
    loading: Loading
    dry_run: DryRun = False


@verb(app)
def lm_eval(options: Options) -> None:
    """Academic benchmarks by the language model evaluation harness (needs lm-eval).

    Log-likelihoods cost each context once and each continuation; generations up to the task's own
    limit. No judge is called. --dry-run counts it all.
    """
    from selm_jax.evaluation.benchmarks.lm_eval import adapter as harness
    from selm_jax.shell.progress import terminal

    o = options
    model = o.loading.open(o.source)
    harness.run(
        model, o.tasks, out=o.out or default_out(model.name, "lm_eval"), include=o.include,
        limit=o.limit, chat=o.chat, system=o.system, seed=o.seed, dry_run=o.dry_run,
        console=terminal(),
    )  # fmt: skip
