"""The Typer app of the program `selm`, to which other modules add commands (verbs)."""

from __future__ import annotations

from typing import Annotated

import typer

from selm_jax import __version__
from selm_jax.shell.progress import Talk, talk

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is shown literally: rich would drop what stands in brackets
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"selm_jax {__version__}")
        raise typer.Exit()


@app.callback()
def selm(
    version: Annotated[  # noqa: ARG001 (its callback answers)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Align language models by exploring (SELM, arXiv 2405.19332), in JAX.

    \b
    selm preview EXPERIMENT    see the rows that a run will train on
    selm run EXPERIMENT        run or continue the experiment
    selm show RUN              see a run's progress
    selm report RUN [RUN ...]  write a report, or compare several runs

    `selm VERB -h` explains a verb. After `selm --install-completion`, Tab completes verbs and
    options.
    """
    talk(Talk())


def set_up_jax() -> None:
    """Configures JAX; command groups such as `selm eval` call this before their commands run."""
    from selm_jax.commands.runs import set_up_jax

    set_up_jax()
