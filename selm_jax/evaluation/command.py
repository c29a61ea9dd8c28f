"""`selm eval ...`: what a checkpoint is worth, from the command line.

Every verb has `--dry-run`, which counts what would be drawn, read and asked, and does none of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import typer

from selm_jax.evaluation.options import (
    KEEP,
    Asking,
    DryRun,
    Keep,
    Loading,
    Results,
    RunsMaxNewTokens,
    Seed,
    TopP,
    within,
)
from selm_jax.shell.ranges import MOST, Range
from selm_jax.shell.verbs import verb

app = typer.Typer(
    help="What checkpoints are worth: rewards, win rates, benchmarks. See docs/evaluate.md.",
    no_args_is_help=True,
)


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Options of `selm eval heldout`."""

    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL[,MODEL...]...",
            help="Model or run folders, ids, GGUF files; after a comma: further seeds of one method.",
        ),
    ]
    asking: Asking
    reference: Annotated[
        str | None,
        typer.Option(help="For KL and implicit rewards; default: the first run's start."),
    ] = None
    beta: Annotated[
        float | None, typer.Option(help="Of implicit rewards; default: the first run's, or 0.1.")
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(help="Drawn answers per prompt; default: the first run's, or 1.", min=1),
    ] = None
    max_new_tokens: RunsMaxNewTokens = None
    loading: Loading
    out: Results = KEEP / "heldout"
    keep: Keep = KEEP
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the sampled answers; default: that of the first run's own, or 0.",
            min=0,
            max=MOST,
        ),
    ] = None
    as_in_run: Annotated[
        bool,
        typer.Option(
            help="Score in the packed rows of the first run: log-probabilities are then its own to "
            "the last bit. Takes the memory that the run takes for it."
        ),
    ] = False
    dry_run: DryRun = False


@verb(app)
def heldout(options: Heldout) -> None:
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

    o, asking, loading = options, options.asking, options.loading
    found = contestants(
        o.sources, iteration=loading.iteration, revision=loading.revision, files=False
    )
    models = [m for c in found for m in c.models]
    run = next((m for m in models if m.experiment), None)
    if o.reference is not None:
        reference = find(o.reference)
    elif run is not None and run.run is not None:
        reference = find(str(run.run), iteration=0)
    else:
        raise EvaluationError(
            "--reference names the model that KL and implicit rewards are measured against; "
            "without it a run's start model serves, and no run was given"
        )
    e = run.experiment if run else None
    asked = Asked.of_run(e) if e else Asked()
    given = {"samples": o.samples, "limit": o.max_new_tokens, "seed": o.seed}
    asked = dataclasses.replace(asked, **{k: v for k, v in given.items() if v is not None})
    work.run(
        found, prompts_of(models, asking.prompts, asking.split, asking.limit),
        build_ranker(asking.ranker, asking.settings or [], models),
        open_model=loading.opener(e, as_in_run=o.as_in_run), reference=reference,
        asked=asked,
        beta=o.beta if o.beta is not None else e.objective.get("beta", 0.1) if e else 0.1,
        out=o.out, keep=o.keep, allow_malformed=asking.allow_malformed,
        dry_run=o.dry_run, console=terminal(),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Winrate:
    """Options of `selm eval winrate`."""

    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL|ANSWERS.jsonl...",
            help="Two or more models, or files of answers (see docs/evaluate.md).",
        ),
    ]
    asking: Asking
    samples: Annotated[
        int, typer.Option(help="Drawn answers per prompt; 0: the greedy answer.", min=0)
    ] = 0
    temperature: Annotated[
        float,
        typer.Option(
            help="Of drawn answers.",
            callback=within(
                Range(1e-3, advice="--samples 0 asks for the likeliest answer instead")
            ),
        ),
    ] = 1.0
    top_p: TopP = 1.0
    max_new_tokens: RunsMaxNewTokens = None
    loading: Loading
    out: Results = KEEP / "winrate"
    keep: Keep = KEEP
    seed: Seed = 0
    dry_run: DryRun = False


@verb(app)
def winrate(options: Winrate) -> None:
    """Who beats whom: every two contestants compared prompt by prompt, raw and at equal length.

    Costs one answer per prompt and model, unless it is kept. A judge is asked twice per pair and
    prompt, once in each order; a judge that rates, once per answer.
    """
    from selm_jax.evaluation import winrate as work
    from selm_jax.evaluation.answers import Asked, prompts_of
    from selm_jax.evaluation.contestants import build_ranker, contestants
    from selm_jax.shell.progress import terminal

    o, asking, loading = options, options.asking, options.loading
    found = contestants(
        o.sources, iteration=loading.iteration, revision=loading.revision, files=True
    )
    models = [m for c in found for m in c.models]
    e = next((m.experiment for m in models if m.experiment), None)
    length = o.max_new_tokens or (e.rollout.max_new_tokens if e else 512)
    work.run(
        found, partial(prompts_of, models, asking.prompts, asking.split, asking.limit),
        build_ranker(asking.ranker, asking.settings or [], models),
        open_model=loading.opener(e),
        asked=Asked(int(not o.samples), o.samples, length, o.temperature, o.top_p, o.seed),
        out=o.out, keep=o.keep, allow_malformed=asking.allow_malformed, dry_run=o.dry_run,
        console=terminal(),
    )  # fmt: skip
