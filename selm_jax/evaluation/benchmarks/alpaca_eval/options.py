"""Options of `selm eval alpaca_eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from selm_jax.evaluation.benchmarks.options import Judging, Name, OptionalSource
from selm_jax.evaluation.options import (
    DryRun,
    Loading,
    MaxNewTokens,
    OwnResults,
    Seed,
    TopP,
    file_to_read,
    within,
)
from selm_jax.shell.paths import place
from selm_jax.shell.ranges import Range


@dataclass(frozen=True)
class LengthControl:
    """What the length-controlled win rate is fitted with."""

    gamed: Annotated[
        str | None,
        typer.Option(help="df_gamed.csv, for the length-controlled rate; 'hub' fetches it."),
    ] = None
    gamed_sha256: Annotated[
        str | None, typer.Option(help="SHA-256 of --gamed, if it is not the published file.")
    ] = None
    published: Annotated[
        Path | None,
        typer.Option(
            help="In place of --gamed: a clone of AlpacaEval's repository, or a folder with the five "
            "files of it that docs/evaluate.md names.",
            metavar="FOLDER",
            parser=place,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Options:
    model: OptionalSource = None
    instructions: Annotated[
        str | None,
        typer.Option(
            help="alpaca_eval_gpt4_baseline.json or any published annotations.json, for the 805 "
            "instructions and the baseline's answers; 'hub' fetches it."
        ),
    ] = None
    outputs: Annotated[
        Path | None,
        file_to_read("In place of MODEL: its model_outputs.json."),
    ] = None
    annotations: Annotated[
        Path | None,
        file_to_read("In place of MODEL: score these annotations; asks nobody."),
    ] = None
    out: OwnResults = None
    name: Name = None
    judging: Judging
    prompt: Annotated[
        Path | None,
        file_to_read("The judge's prompt, alpaca_eval_clf.txt; default: the package's."),
    ] = None
    annotator: Annotated[
        str | None,
        typer.Option(
            help="Annotate through the alpaca_eval package instead: the name of its configuration, "
            "such as weighted_alpaca_eval_gpt4_turbo, or a path."
        ),
    ] = None
    control: LengthControl
    allow_missing: Annotated[
        int, typer.Option(help="So many instructions may lack a readable preference.", min=0)
    ] = 0
    max_new_tokens: MaxNewTokens = 2048
    temperature: Annotated[float, typer.Option(help="0 is greedy.", callback=within(Range(0)))] = (
        0.7
    )
    top_p: TopP = 1.0
    seed: Seed = 0
    loading: Loading
    dry_run: DryRun = False
