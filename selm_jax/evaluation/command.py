"""`selm eval ...`: what a checkpoint is worth, from the command line.

Options that several verbs share are defined once, here. Every verb has `--dry-run`, which counts
what would be drawn, read and asked, and does none of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="What checkpoints are worth: rewards, win rates, benchmarks. See docs/evaluate.md.",
    no_args_is_help=True,
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Model folder, Hub id, GGUF file, or run folder (its last model)."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Of a Hub id: branch, tag or commit.")]
Iteration = Annotated[
    int | None, typer.Option("--iteration", "-t", help="Of a run; 0 is its start; default: last.")
]
Dtype = Annotated[str, typer.Option(help="auto (float32 on CPU, else bfloat16), or its name.")]
Tensor = Annotated[int, typer.Option(help="Devices that share each matrix.", min=1)]
Slots = Annotated[int, typer.Option(help="Answers drawn together.", min=1)]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)]
Seed = Annotated[int, typer.Option(help="Of sampled answers and of intervals.", min=0)]
Limit = Annotated[int | None, typer.Option(help="The first so many prompts alone.", min=1)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Count tokens and judge calls; compute nothing.")
]


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
        Path | None, typer.Option("--out", "-o", help="Folder; default: evaluations/MODEL/lm_eval.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of further task files.")] = None,
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
    """Academic benchmarks by the language model evaluation harness (needs selm_jax[lm_eval]).

    Log-likelihoods cost each context once and each continuation; generations up to the task's own
    limit. No judge is called. --dry-run counts it all.
    """
    from rich.console import Console

    from selm_jax.evaluation import lm_eval as harness
    from selm_jax.evaluation.model import open_model

    model = open_model(
        source, revision=revision, iteration=iteration, dtype=dtype, tensor=tensor, slots=slots
    )
    harness.run(
        model, tasks, out=out or default_out(model.name, "lm_eval"), include=include, limit=limit,
        chat=chat, system=system, seed=seed, dry_run=dry_run, console=Console(),
    )  # fmt: skip


def default_out(model: str, verb: str) -> Path:
    """Where a verb leaves what it found about a model, unless it is told."""
    return Path("evaluations") / model.replace("/", "--") / verb
