"""Options that several commands of `selm eval` share. Each is defined here once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selm_jax.shell.paths import folder_to_write, place
from selm_jax.shell.ranges import MOST, Range

if TYPE_CHECKING:  # these load JAX, which `selm eval --help` does without
    from selm_jax.config import Experiment
    from selm_jax.evaluation.model import Found, Model

KEEP = Path("evaluations")

MaxNewTokens = Annotated[int, typer.Option(help="Maximum tokens per answer.", min=1)]
RunsMaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Maximum tokens per answer.", min=1, show_default="the first run's setting, or 512"
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampled answers.", min=0, max=MOST)]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only count the tokens and the requests to judges, and compute nothing."
    ),
]
Results = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Folder for the results.", metavar="FOLDER", parser=folder_to_write
    ),
]
OwnResults = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Folder for the results.",
        metavar="FOLDER",
        parser=folder_to_write,
        show_default="evaluations/MODEL/VERB",
    ),
]
Keep = Annotated[
    Path,
    typer.Option(
        help="Folder that keeps generated answers, so that later calls reuse them.",
        metavar="FOLDER",
        parser=folder_to_write,
    ),
]


Dtype = Annotated[
    str,
    typer.Option(
        help="Number format: float32, bfloat16, or auto (float32 on a CPU, else bfloat16)."
    ),
]


def file_to_read(help: str, default: str | bool = True, name: str | None = None) -> Any:
    """Makes a command-line option for a file to read.

    `default` is shown in the help if the option has no default.
    """
    names = () if name is None else (name,)
    return typer.Option(*names, help=help, metavar="FILE", parser=place, show_default=default)


def within(numbers: Range) -> Callable[[float], float]:
    """Makes an option's callback that refuses NaN and numbers outside a range."""

    def checked(value: float) -> float:
        if (expected := numbers.problem(value)) is not None:
            raise typer.BadParameter(f"{value}; expected {expected}")
        return value

    return checked


TopP = Annotated[
    float,
    typer.Option(
        help="Sample only from the most likely tokens, whose probabilities add up to this (top-p).",
        callback=within(Range(0, 1, above=True, advice="1 keeps all tokens")),
    ),
]


@dataclass(frozen=True)
class Loading:
    """Options that select a model of a run or Hub id, and set how the model is loaded."""

    iteration: Annotated[
        int | None,
        typer.Option(
            "--iteration",
            "-t",
            help="Iteration of the run whose model is used; 0 is the start model.",
            show_default="the last one",
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hub id.", show_default="the main branch"),
    ] = None
    dtype: Dtype = "auto"
    tensor: Annotated[
        int, typer.Option(help="Number of devices over which each weight matrix is split.", min=1)
    ] = 1
    slots: Annotated[
        int | None,
        typer.Option(
            help="Number of answers that are generated together.",
            min=1,
            show_default="chosen from the memory",
        ),
    ] = None

    def open(self, source: str) -> Model:
        """Loads the model of a folder, Hub id, GGUF file or run."""
        from selm_jax.evaluation.model import find

        return self.opener(None)(find(source, revision=self.revision, iteration=self.iteration))

    def opener(
        self, experiment: Experiment | None, as_in_run: bool = False
    ) -> Callable[[Found], Model]:
        """Makes a function that opens models, with `experiment`'s text settings if not from a run.

        With `as_in_run` all of them score in the packed rows of `experiment`.
        """
        from selm_jax.evaluation.model import open_found

        def open_one(found: Found) -> Model:
            text = None if found.experiment or not experiment else experiment.text
            return open_found(
                found, text=text, dtype=self.dtype, tensor=self.tensor, slots=self.slots,
                as_in=experiment if as_in_run else None,
            )  # fmt: skip

        return open_one


@dataclass(frozen=True)
class Asking:
    """Options for the prompts that models answer, and for the ranker that scores the answers."""

    prompts: Annotated[
        str | None,
        typer.Option(
            help="File or Hub data set of prompts.",
            show_default="data.heldout of the first run",
        ),
    ] = None
    split: Annotated[
        str | None,
        typer.Option(help="Split of the data set in --prompts.", show_default="the only one"),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            help="Use only this many prompts, from the start of the file.",
            min=1,
            show_default="all",
        ),
    ] = None
    ranker: Annotated[
        str | None,
        typer.Option(
            "--ranker",
            help="Name of the ranker that scores the answers.",
            show_default="the first run's",
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the ranker as key=value (YAML). May be given several times.",
            show_default="the first run's",
        ),
    ] = None
    allow_malformed: Annotated[
        int,
        typer.Option(
            help="How many of a judge's answers may be unreadable. These count as ties or, in "
            "`heldout`, as the mean of the prompt's readable ratings.",
            min=0,
        ),
    ] = 0


def default_out(model: str, verb: str) -> Path:
    """The default folder for the results of an evaluation of a model."""
    return KEEP / model.replace("/", "--") / verb
