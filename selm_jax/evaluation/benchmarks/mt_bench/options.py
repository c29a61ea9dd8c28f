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
        file_to_read("File of questions: FastChat's data/mt_bench/question.jsonl."),
    ] = Path("question.jsonl")
    answers: Annotated[
        Path | None,
        file_to_read("Instead of MODEL: its answers in FastChat's format.", "MODEL answers"),
    ] = None
    judgments: Annotated[
        Path | None,
        file_to_read(
            "Instead of MODEL: judgments in FastChat's format, of the model --name. No judge is "
            "asked.",
            "a judge is asked",
        ),
    ] = None
    out: OwnResults = None
    name: Name = None
    judging: Judging
    prompts: Annotated[
        Path,
        file_to_read("File of the judge's prompts: FastChat's data/judge_prompts.jsonl."),
    ] = Path("judge_prompts.jsonl")
    references: Annotated[
        Path,
        file_to_read(
            "File of reference answers: FastChat's data/mt_bench/reference_answer/gpt-4.jsonl."
        ),
    ] = Path("reference_answer/gpt-4.jsonl")
    against: Annotated[
        Path | None,
        file_to_read("Compare with the model of these answers instead of rating.", "rate answers"),
    ] = None
    repeats: Annotated[int, typer.Option(help="Number of judgments per turn.", min=1)] = 1
    judge_temperature: Annotated[
        float, typer.Option(help="Temperature of the judge.", callback=within(Range(0)))
    ] = 0.0
    judge_tokens: Annotated[int, typer.Option(help="Most tokens per judgment.", min=1)] = 2048
    allow_malformed: Annotated[
        int | None,
        typer.Option(
            help="How many verdicts may be unreadable. They are left out of the means. Judges "
            "sometimes miss the format that FastChat's prompts ask for; leaving out 8 of 160 that "
            "were two points lower moves the mean by 0.1.",
            min=0,
            show_default="5 % of them",
        ),
    ] = None
    unpublished: Annotated[
        bool,
        typer.Option(
            help="Accept questions, prompts and reference answers that are not MT-Bench's own."
        ),
    ] = False
    max_new_tokens: MaxNewTokens = 1024
    seed: Seed = 0
    loading: Loading
    dry_run: DryRun = False
