"""Arguments and options that several commands of `selm` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selm_jax.shell.mirror import entered
from selm_jax.shell.paths import file_to_write

Experiment = Annotated[
    Path,
    typer.Argument(
        help="Experiment file (YAML), or a run folder, which contains one.",
        metavar="EXPERIMENT",
        parser=entered,
    ),
]
Run = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", parser=entered)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings to change; `selm settings` lists them.", metavar="[KEY.PATH=VALUE]..."
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        help="Also write the result to this JSON file.",
        metavar="FILE",
        parser=file_to_write,
        show_default="no file",
    ),
]
Iteration = Annotated[int, typer.Option("--iteration", "-t", help="Iteration of the run.")]
Tiny = Annotated[
    bool,
    typer.Option(
        "--tiny",
        help="Rehearse with a tiny random model and 64 made-up rows; the output folder's name then "
        "ends in -tiny.",
    ),
]
