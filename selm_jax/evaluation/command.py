"""`selm eval ...`: what a checkpoint is worth, from the command line.

Options that several verbs share are defined once, here. Every verb has `--dry-run`, which counts
what would be drawn, read and asked, and does none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from selm_jax.shell.paths import folder_to_write
from selm_jax.shell.ranges import MOST, Range

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
Seed = Annotated[int, typer.Option(help="Of sampled answers and of intervals.", min=0, max=MOST)]


def within(numbers: Range) -> Callable[[float], float]:
    """What refuses the numbers of an option that a range does not hold; NaN is one of them."""

    def checked(value: float) -> float:
        if (expected := numbers.problem(value)) is not None:
            raise typer.BadParameter(f"{value}; expected {expected}")
        return value

    return checked


_TEMPERATURE = Range(1e-3, advice="--samples 0 asks for the likeliest answer instead")
TopP = Annotated[
    float,
    typer.Option(
        help="Of drawn answers.",
        callback=within(Range(0, 1, above=True, advice="1 keeps all tokens")),
    ),
]
Limit = Annotated[int | None, typer.Option(help="The first so many prompts alone.", min=1)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Count tokens and judge calls; compute nothing.")
]


Prompts = Annotated[
    str | None,
    typer.Option(help="File or Hub data set; default: data.heldout of the first run given."),
]
Split = Annotated[str | None, typer.Option(help="Of --prompts.")]
RankerName = Annotated[
    str | None,
    typer.Option("--ranker", help="Who judges, by name; default: the ranker of the first run."),
]
RankerSettings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the ranker: key=value (YAML).")
]
Keep = Annotated[
    Path,
    typer.Option(
        help="Folder of kept answers; what is there is not drawn again.", parser=folder_to_write
    ),
]
AllowMalformed = Annotated[
    int,
    typer.Option(
        help="So many answers of a judge may be unreadable; they count as ties (heldout: as the "
        "mean of their prompts' readable ratings).",
        min=0,
    ),
]
Results = Annotated[
    Path, typer.Option("--out", "-o", help="Folder of results.", parser=folder_to_write)
]
KEEP = Path("evaluations")


@app.command()
def heldout(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL[,MODEL...]...",
            help="Model or run folders, ids, GGUF files; after a comma: further seeds of one method.",
        ),
    ],
    prompts: Prompts = None,
    split: Split = None,
    limit: Limit = None,
    ranker: RankerName = None,
    settings: RankerSettings = None,
    allow_malformed: AllowMalformed = 0,
    reference: Annotated[
        str | None,
        typer.Option(help="For KL and implicit rewards; default: the first run's start."),
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Of implicit rewards; default: the first run's, or 0.1.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Drawn answers per prompt.", min=1)] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Default: the first run's, or 512.", min=1)
    ] = None,
    iteration: Iteration = None,
    revision: Revision = None,
    out: Results = KEEP / "heldout",
    keep: Keep = KEEP,
    dtype: Dtype = "auto",
    tensor: Tensor = 1,
    slots: Slots = 16,
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> None:
    """Reward, KL, entropy, implicit rewards, length and variety on held-out prompts and pairs.

    Costs one greedy answer and --samples drawn ones per prompt and model, and two readings of them,
    by the model and by the reference. A judge as ranker is asked once per answer.
    """

    from selm_jax.evaluation import EvaluationError
    from selm_jax.evaluation import heldout as work
    from selm_jax.evaluation.answers import Asked, prompts_of
    from selm_jax.evaluation.contestants import build_ranker, contestants
    from selm_jax.evaluation.model import find
    from selm_jax.shell.progress import terminal

    found = contestants(sources, iteration=iteration, revision=revision, files=False)
    models = [m for c in found for m in c.models]
    run = next((m for m in models if m.experiment), None)
    if reference is None and (run is None or run.run is None):
        raise EvaluationError(
            "--reference names the model that KL and implicit rewards are measured against; "
            "without it a run's start model serves, and no run was given"
        )
    e = run.experiment if run else None
    against = find(reference) if reference is not None else find(str(run and run.run), iteration=0)
    work.run(
        found, prompts_of(models, prompts, split, limit), build_ranker(ranker, settings or [], models),
        open_model=_opener(e, dtype=dtype, tensor=tensor, slots=slots),
        reference=against,
        asked=Asked(1, samples, max_new_tokens or (e.rollout.max_new_tokens if e else 512), seed=seed),
        beta=beta if beta is not None else e.objective.get("beta", 0.1) if e else 0.1,
        out=out, keep=keep, seed=seed, allow_malformed=allow_malformed, dry_run=dry_run,
        console=terminal(),
    )  # fmt: skip


@app.command()
def winrate(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL|ANSWERS.jsonl...",
            help="Two or more models, or files of answers (see docs/evaluate.md).",
        ),
    ],
    prompts: Prompts = None,
    split: Split = None,
    limit: Limit = None,
    ranker: RankerName = None,
    settings: RankerSettings = None,
    allow_malformed: AllowMalformed = 0,
    samples: Annotated[
        int, typer.Option(help="Drawn answers per prompt; 0: the greedy answer.", min=0)
    ] = 0,
    temperature: Annotated[
        float, typer.Option(help="Of drawn answers.", callback=within(_TEMPERATURE))
    ] = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Default: the first run's, or 512.", min=1)
    ] = None,
    iteration: Iteration = None,
    revision: Revision = None,
    out: Results = KEEP / "winrate",
    keep: Keep = KEEP,
    dtype: Dtype = "auto",
    tensor: Tensor = 1,
    slots: Slots = 16,
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> None:
    """Who beats whom: every two contestants compared prompt by prompt, raw and at equal length.

    Costs one answer per prompt and model, unless it is kept. A judge is asked twice per pair and
    prompt, once in each order; a judge that rates, once per answer.
    """
    from functools import partial

    from selm_jax.evaluation import winrate as work
    from selm_jax.evaluation.answers import Asked, prompts_of
    from selm_jax.evaluation.contestants import build_ranker, contestants
    from selm_jax.shell.progress import terminal

    found = contestants(sources, iteration=iteration, revision=revision, files=True)
    models = [m for c in found for m in c.models]
    e = next((m.experiment for m in models if m.experiment), None)
    length = max_new_tokens or (e.rollout.max_new_tokens if e else 512)
    work.run(
        found, partial(prompts_of, models, prompts, split, limit),
        build_ranker(ranker, settings or [], models),
        open_model=_opener(e, dtype=dtype, tensor=tensor, slots=slots),
        asked=Asked(int(not samples), samples, length, temperature, top_p, seed),
        out=out, keep=keep, allow_malformed=allow_malformed, dry_run=dry_run, console=terminal(),
    )  # fmt: skip


def _opener(experiment: Any, **how: Any) -> Any:
    """Makes models ready: those of a run by its text settings, others by those of the first run."""
    from selm_jax.evaluation.model import open_found

    def open_one(found):
        text = None if found.experiment or not experiment else experiment.text
        return open_found(found, text=text, **how)

    return open_one


def default_out(model: str, verb: str) -> Path:
    """Where a verb leaves what it found about a model, unless it is told."""
    return Path("evaluations") / model.replace("/", "--") / verb
