"""Options that several verbs of `selm eval` share, each defined once."""

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

MaxNewTokens = Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)]
RunsMaxNewTokens = Annotated[
    int | None, typer.Option(help="Default: the first run's, or 512.", min=1)
]
Seed = Annotated[int, typer.Option(help="Seed of the sampled answers.", min=0, max=MOST)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Count tokens and judge calls; compute nothing.")
]
Results = Annotated[
    Path, typer.Option("--out", "-o", help="Folder of results.", parser=folder_to_write)
]
OwnResults = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Folder; default: evaluations/MODEL/VERB.", parser=folder_to_write
    ),
]
Keep = Annotated[
    Path,
    typer.Option(
        help="Folder of kept answers; what is there is not drawn again.", parser=folder_to_write
    ),
]


def file_to_read(help: str) -> Any:
    """The option of a file that is read."""
    return typer.Option(help=help, metavar="FILE", parser=place)


def within(numbers: Range) -> Callable[[float], float]:
    """What refuses the numbers of an option that a range does not hold; NaN is one of them."""

    def checked(value: float) -> float:
        if (expected := numbers.problem(value)) is not None:
            raise typer.BadParameter(f"{value}; expected {expected}")
        return value

    return checked


TopP = Annotated[
    float,
    typer.Option(
        help="Nucleus threshold of sampled answers.",
        callback=within(Range(0, 1, above=True, advice="1 keeps all tokens")),
    ),
]


@dataclass(frozen=True)
class Loading:
    """Which of a source's models is meant, and how it is made ready."""

    iteration: Annotated[
        int | None,
        typer.Option("--iteration", "-t", help="Of a run; 0 is its start; default: last."),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Of a Hub id: branch, tag or commit.")] = None
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on CPU, else bfloat16), or its name.")
    ] = "auto"
    tensor: Annotated[int, typer.Option(help="Devices that share each matrix.", min=1)] = 1
    slots: Annotated[int, typer.Option(help="Answers drawn together.", min=1)] = 16

    def open(self, source: str) -> Model:
        """The model of a folder, Hub id, GGUF file or run."""
        from selm_jax.evaluation.model import find

        return self.opener(None)(find(source, revision=self.revision, iteration=self.iteration))

    def opener(
        self, experiment: Experiment | None, as_in_run: bool = False
    ) -> Callable[[Found], Model]:
        """Makes models ready: those of a run by its text settings, others by those of `experiment`;
        with `as_in_run` all of them score in the rows of `experiment`."""
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
    """The prompts that models answer, and who judges the answers."""

    prompts: Annotated[
        str | None,
        typer.Option(help="File or Hub data set; default: data.heldout of the first run given."),
    ] = None
    split: Annotated[str | None, typer.Option(help="Of --prompts.")] = None
    limit: Annotated[int | None, typer.Option(help="The first so many prompts alone.", min=1)] = (
        None
    )
    ranker: Annotated[
        str | None,
        typer.Option("--ranker", help="Who judges, by name; default: the ranker of the first run."),
    ] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the ranker: key=value (YAML).")
    ] = None
    allow_malformed: Annotated[
        int,
        typer.Option(
            help="So many answers of a judge may be unreadable; they count as ties (heldout: as "
            "the mean of their prompts' readable ratings).",
            min=0,
        ),
    ] = 0


def default_out(model: str, verb: str) -> Path:
    """Where a verb leaves what it found about a model, unless it is told."""
    return KEEP / model.replace("/", "--") / verb
