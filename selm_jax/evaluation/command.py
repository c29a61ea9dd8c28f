"""`selm eval ...`: evaluates checkpoints from the command line.

Every command has `--dry-run`, which counts tokens and judge calls and does no work.
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
    help="Measure how good checkpoints are. docs/evaluate.md describes every measure.",
    no_args_is_help=True,
)


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Options of `selm eval heldout`."""

    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL[,MODEL...]...",
            help="Model or run folders, Hub ids, GGUF files. "
            "Runs joined by commas are seeds of one method.",
        ),
    ]
    asking: Asking
    reference: Annotated[
        str | None,
        typer.Option(
            help="Reference model for KL and implicit rewards.",
            show_default="the first run's start model",
        ),
    ] = None
    beta: Annotated[
        float | None,
        typer.Option(
            help="Beta of the implicit rewards, beta * log(pi / pi_ref).",
            show_default="the first run's, or 0.1",
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(
            help="Number of sampled answers per prompt.",
            min=1,
            show_default="the first run's, or 1",
        ),
    ] = None
    max_new_tokens: RunsMaxNewTokens = None
    loading: Loading
    out: Results = KEEP / "heldout"
    keep: Keep = KEEP
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the sampled answers.",
            min=0,
            max=MOST,
            show_default="the first run's, or 0",
        ),
    ] = None
    as_in_run: Annotated[
        bool,
        typer.Option(
            help="Score in the packed rows of the first run, so that log-probabilities equal "
            "the run's exactly. Scoring then takes as much memory as the run."
        ),
    ] = False
    dry_run: DryRun = False


@verb(
    app,
    needs="models, held-out prompts, a ranker, and a reference model",
    writes="tables and a summary into the folder of --out",
    example="selm eval heldout runs/selm --limit 64",
)
def heldout(options: Heldout) -> None:
    """Measure reward and KL of held-out answers.

    Entropy, length, variety and implicit rewards of pairs are measured too. For each
    prompt, a model gives one greedy answer and --samples sampled ones. The model and the reference
    score them. A judge is asked once per answer.
    """
    from selm_jax.evaluation import EvaluationError
    from selm_jax.evaluation import heldout as work
    from selm_jax.evaluation.answers import Asked, prompts_of
    from selm_jax.evaluation.contestants import contestants, ranker_for
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
            "there is no reference model for KL and implicit rewards: without --reference it is "
            "the start model of a run, and no run was given. Name a model with --reference"
        )
    e = run.experiment if run else None
    asked = Asked.of_run(e) if e else Asked()
    given = {"samples": o.samples, "limit": o.max_new_tokens, "seed": o.seed}
    asked = dataclasses.replace(asked, **{k: v for k, v in given.items() if v is not None})
    work.run(
        found, prompts_of(models, asking.prompts, asking.split, asking.limit),
        ranker_for(asking.ranker, asking.settings or [], models),
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
            help="Two or more models or files of answers (docs/evaluate.md).",
        ),
    ]
    asking: Asking
    samples: Annotated[
        int,
        typer.Option(help="Number of sampled answers per prompt; 0 uses the greedy answer.", min=0),
    ] = 0
    temperature: Annotated[
        float,
        typer.Option(
            help="Temperature of the sampled answers.",
            callback=within(Range(1e-3, advice="--samples 0 uses the greedy answer instead")),
        ),
    ] = 1.0
    top_p: TopP = 1.0
    max_new_tokens: RunsMaxNewTokens = None
    loading: Loading
    out: Results = KEEP / "winrate"
    keep: Keep = KEEP
    seed: Seed = 0
    dry_run: DryRun = False


@verb(
    app,
    needs="two or more models or files of answers, prompts, and a ranker",
    writes="tables and a summary into the folder of --out",
    example="selm eval winrate runs/dpo runs/selm --limit 64",
)
def winrate(options: Winrate) -> None:
    """Compare models prompt by prompt.

    Every two models are compared, both as they are and at equal length. Each model answers each
    prompt once, unless the answer is already stored. A judge is asked twice per pair and prompt,
    once in each order; a judge that rates is asked once per answer.
    """
    from selm_jax.evaluation import winrate as work
    from selm_jax.evaluation.answers import Asked, prompts_of
    from selm_jax.evaluation.contestants import contestants, ranker_for
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
        ranker_for(asking.ranker, asking.settings or [], models),
        open_model=loading.opener(e),
        asked=Asked(int(not o.samples), o.samples, length, o.temperature, o.top_p, o.seed),
        out=o.out, keep=o.keep, allow_malformed=asking.allow_malformed, dry_run=o.dry_run,
        console=terminal(),
    )  # fmt: skip
