"""`selm eval ...`: what a checkpoint is worth, from the command line.

Options that several verbs share are defined once, here. Every verb has `--dry-run`, which counts
what would be drawn, read and asked, and does none of it.
"""

from __future__ import annotations

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
