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
    """The data from which the length-controlled win rate is fitted."""

    gamed: Annotated[
        str | None,
        typer.Option(
            help="df_gamed.csv, for the length-controlled rate; 'hub' fetches it.",
            show_default="no length-controlled rate",
        ),
    ] = None
    gamed_sha256: Annotated[
        str | None,
        typer.Option(help="Expected SHA-256 of --gamed.", show_default="the published file's"),
    ] = None
    published: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --gamed: a clone of AlpacaEval's repository, or a folder with the "
            "five of its files that docs/evaluate.md names.",
            metavar="FOLDER",
            parser=place,
            show_default="--gamed",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Options:
    model: OptionalSource = None
    instructions: Annotated[
        str | None,
        typer.Option(
            help="File with the 805 instructions and the baseline's answers: "
            "alpaca_eval_gpt4_baseline.json or a published annotations.json; 'hub' fetches it.",
            show_default="needed to answer and to annotate",
        ),
    ] = None
    outputs: Annotated[
        Path | None,
        file_to_read("Instead of MODEL: its model_outputs.json.", "MODEL answers"),
    ] = None
    annotations: Annotated[
        Path | None,
        file_to_read(
            "Instead of MODEL: annotations to score. No judge is asked.", "a judge is asked"
        ),
    ] = None
    out: OwnResults = None
    name: Name = None
    judging: Judging
    prompt: Annotated[
        Path | None,
        file_to_read(
            "File of the judge's prompt, alpaca_eval_clf.txt.", "that of the alpaca_eval package"
        ),
    ] = None
    annotator: Annotated[
        str | None,
        typer.Option(
            help="Annotate with the alpaca_eval package instead: its configuration's name or path, "
            "such as weighted_alpaca_eval_gpt4_turbo.",
            show_default="--judge",
        ),
    ] = None
    control: LengthControl
    allow_missing: Annotated[
        int, typer.Option(help="How many preferences may be missing or unreadable.", min=0)
    ] = 0
    max_new_tokens: MaxNewTokens = 2048
    temperature: Annotated[
        float, typer.Option(help="Temperature of answers; 0 is greedy.", callback=within(Range(0)))
    ] = 0.7
    top_p: TopP = 1.0
    seed: Seed = 0
    loading: Loading
    dry_run: DryRun = False
