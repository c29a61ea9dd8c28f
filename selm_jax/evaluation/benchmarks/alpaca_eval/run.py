"""Runs `selm eval alpaca_eval`: generates, annotates and scores answers, skipping finished ones."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.alpaca_eval import annotate, evaluate, score
from selm_jax.evaluation.benchmarks.alpaca_eval import instructions as files
from selm_jax.evaluation.benchmarks.alpaca_eval.options import Options
from selm_jax.evaluation.benchmarks.options import exactly_one, open_bar, show_costs
from selm_jax.evaluation.options import default_out
from selm_jax.feedback.judge.client import Client
from selm_jax.shell.lock import only_one


def run(options: Options) -> None:
    """Generates answers, annotates and scores as the options request, and prints the scores.

    Raises:
      EvaluationError: options contradict each other, or a step fails.
    """
    o, judge = options, options.judging.judge
    exactly_one(MODEL=o.model, outputs=o.outputs, annotations=o.annotations)
    if judge and o.annotator:
        raise EvaluationError(
            "--judge (a server) and --annotator (the package) cannot be combined: give one of them"
        )
    if o.control.gamed and o.control.published:
        raise EvaluationError("--gamed and --published cannot be combined: give one of them")
    if o.annotations is not None:
        _score_only(options, o.annotations)
        return

    texts = files.read_set(o.instructions)
    if judge or o.annotator:
        annotate.check_ready(texts, o.annotator)
    evaluate.check_length_control(**dataclasses.asdict(o.control))
    question = annotate.read_prompt(o.prompt) if judge or (o.annotator and o.dry_run) else None
    extra = o.judging.fields()
    decoding = evaluate.Decoding(o.max_new_tokens, o.temperature, o.top_p, o.seed)
    model = None if o.model is None else o.loading.open(o.model)
    answers = None if o.outputs is None else files.read_outputs(o.outputs)
    name = o.name or (model.name if model else answers[0]["generator"] if answers else "")
    folder = o.out or default_out(name, "alpaca_eval")
    if o.dry_run:
        costs = []
        if model is not None:
            costs.append(evaluate.cost_of_answers(model, texts, folder, decoding))
        if question is not None:
            who = judge or f"{o.annotator} (package)"
            costs.append(evaluate.cost_of_judging(who, texts, question, answers, o.max_new_tokens))
        show_costs(costs)
        return

    client = o.judging.client(folder)  # before anything is generated: its key may be missing
    with only_one(folder):
        outputs = o.outputs
        if model is not None:
            with open_bar(f"{name}  answers", len(texts.rows), "answers") as advance:
                outputs = evaluate.answer(model, texts, folder, decoding, name, advance)
            answers = files.read_outputs(outputs)
        assert answers is not None and outputs is not None
        typer.echo(f"{outputs}: {len(answers)} answers, checked against the instructions")
        rows = _annotations(options, texts, answers, client, question, extra, folder)
        if rows is None:
            return
        rows = files.check_annotations(
            rows, "the judge's annotations", allow_missing=o.allow_missing
        )
        made = {"model_outputs": outputs, "annotations": evaluate.write_annotations(folder, rows)}
        found = evaluate.numbers(rows, **dataclasses.asdict(o.control))
        record = evaluate.write_numbers(folder, rows, found, made)
    typer.echo(score.table(rows[0]["generator_2"], found))
    typer.echo(str(record))


def _score_only(options: Options, annotations: Path) -> None:
    rows = files.read_annotations(annotations, allow_missing=options.allow_missing)
    found = evaluate.numbers(rows, **dataclasses.asdict(options.control))
    if options.out is not None:
        with only_one(options.out):
            evaluate.write_numbers(options.out, rows, found, {"annotations": annotations})
    typer.echo(score.table(rows[0]["generator_2"], found))


def _annotations(
    options: Options,
    texts: files.EvalSet,
    answers: Sequence[Mapping[str, str]],
    client: Client | None,
    question: annotate.AnnotatorPrompt | None,
    extra: Mapping[str, Any],
    folder: Path,
) -> list[dict[str, Any]] | None:
    """Annotates answers with the judge or the package; None if the options name neither."""
    if client is not None and question is not None:
        with open_bar(f"{client.model}  annotates", len(answers), "calls") as advance:
            return asyncio.run(
                annotate.ask(
                    texts, answers, client, question, advance, options.allow_missing,
                    extra=extra,
                )
            )  # fmt: skip
    if options.annotator is not None:
        cache = folder / "package_cache.json"
        return annotate.ask_package(texts, answers, options.annotator, cache)
    return None
