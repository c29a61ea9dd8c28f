"""Options of `selm eval mt_bench`."""

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
    file_to_read,
    within,
)
from selm_jax.shell.ranges import Range


@dataclass(frozen=True, kw_only=True)
class Options:
    model: OptionalSource = None
    questions: Annotated[
        Path,
        file_to_read("FastChat's data/mt_bench/question.jsonl."),
    ] = Path("question.jsonl")
    answers: Annotated[
        Path | None,
        file_to_read("In place of MODEL: its answers, in FastChat's format."),
    ] = None
    judgments: Annotated[
        Path | None,
        file_to_read(
            "In place of MODEL: score these judgments of FastChat's format, of the model --name; "
            "asks nobody."
        ),
    ] = None
    out: OwnResults = None
    name: Name = None
    judging: Judging
    prompts: Annotated[
        Path,
        file_to_read("FastChat's data/judge_prompts.jsonl."),
    ] = Path("judge_prompts.jsonl")
    references: Annotated[
        Path,
        file_to_read("FastChat's data/mt_bench/reference_answer/gpt-4.jsonl."),
    ] = Path("reference_answer/gpt-4.jsonl")
    against: Annotated[
        Path | None,
        file_to_read("Compare in pairs with the model of these answers, in place of rating."),
    ] = None
    repeats: Annotated[int, typer.Option(help="Judgments of each turn.", min=1)] = 1
    judge_temperature: Annotated[
        float, typer.Option(help="0 asks for the likeliest judgment.", callback=within(Range(0)))
    ] = 0.0
    judge_tokens: Annotated[int, typer.Option(help="Tokens of a judgment, at most.", min=1)] = 2048
    allow_malformed: Annotated[
        int | None,
        typer.Option(
            help="So many verdicts may be unreadable; they are left out of the means. Default: 5 % "
            "of them: judges now and then miss the format that FastChat's prompts ask for, and 8 of "
            "160 left out that were two points lower move the mean by 0.1.",
            min=0,
        ),
    ] = None
    unpublished: Annotated[
        bool,
        typer.Option(
            help="Accept questions, prompts and reference answers that are not MT-Bench's."
        ),
    ] = False
    max_new_tokens: MaxNewTokens = 1024
    seed: Seed = 0
    loading: Loading
    dry_run: DryRun = False
