"""`selm eval lm_eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selm_jax.evaluation.command import (
    DryRun,
    Dtype,
    Iteration,
    Revision,
    Seed,
    Slots,
    Source,
    Tensor,
    app,
    default_out,
)
from selm_jax.shell.paths import folder_to_write, place


@app.command("lm_eval")
def lm_eval(
    source: Source,
    tasks: Annotated[
        str,
        typer.Option(help="NAME[:SHOTS],... of lm-eval; `paper` stands for the paper's six."),
    ],
    revision: Revision = None,
    iteration: Iteration = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder; default: evaluations/MODEL/lm_eval.",
            parser=folder_to_write,
        ),
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(help="Folder of further task files.", metavar="FOLDER", parser=place),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first rows of each task.", min=1)] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Through the model's chat template or not.")
    ] = True,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    dtype: Dtype = "auto",
    tensor: Tensor = 1,
    slots: Slots = 16,
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> None:
    """Academic benchmarks by the language model evaluation harness (needs lm-eval).

    Log-likelihoods cost each context once and each continuation; generations up to the task's own
    limit. No judge is called. --dry-run counts it all.
    """

    from selm_jax.evaluation.benchmarks.lm_eval import adapter as harness
    from selm_jax.evaluation.model import open_model
    from selm_jax.shell.progress import terminal

    model = open_model(
        source, revision=revision, iteration=iteration, dtype=dtype, tensor=tensor, slots=slots
    )
    harness.run(
        model, tasks, out=out or default_out(model.name, "lm_eval"), include=include, limit=limit,
        chat=chat, system=system, seed=seed, dry_run=dry_run, console=terminal(),
    )  # fmt: skip
