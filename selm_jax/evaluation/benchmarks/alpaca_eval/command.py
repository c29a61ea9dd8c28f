"""`selm eval alpaca_eval`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.options import (
    BaseUrl,
    Cache,
    Concurrency,
    Judge,
    KeyEnv,
    MaxCost,
    Name,
    OptionalSource,
    Out,
    PriceCompletion,
    PricePrompt,
    exactly_one,
    open_bar,
    open_client,
    show_costs,
)
from selm_jax.evaluation.command import (
    DryRun,
    Dtype,
    Iteration,
    Revision,
    Seed,
    Slots,
    Tensor,
    TopP,
    app,
    default_out,
    within,
)
from selm_jax.shell.paths import place
from selm_jax.shell.ranges import Range


@app.command(name="alpaca_eval")
def alpaca_eval(
    model: OptionalSource = None,
    instructions: Annotated[
        str | None,
        typer.Option(
            help="alpaca_eval_gpt4_baseline.json or any published annotations.json, for the 805 "
            "instructions and the baseline's answers; 'hub' fetches it."
        ),
    ] = None,
    outputs: Annotated[
        Path | None,
        typer.Option(
            help="In place of MODEL: its model_outputs.json.", metavar="FILE", parser=place
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="In place of MODEL: score these annotations; asks nobody.",
            metavar="FILE",
            parser=place,
        ),
    ] = None,
    out: Out = None,
    name: Name = None,
    judge: Judge = None,
    base_url: BaseUrl = None,
    key_env: KeyEnv = None,
    prompt: Annotated[
        Path | None,
        typer.Option(
            help="The judge's prompt, alpaca_eval_clf.txt; default: the package's.",
            metavar="FILE",
            parser=place,
        ),
    ] = None,
    annotator: Annotated[
        str | None,
        typer.Option(
            help="Annotate through the alpaca_eval package instead: the name of its configuration, "
            "such as weighted_alpaca_eval_gpt4_turbo, or a path."
        ),
    ] = None,
    gamed: Annotated[
        str | None,
        typer.Option(help="df_gamed.csv, for the length-controlled rate; 'hub' fetches it."),
    ] = None,
    gamed_sha256: Annotated[
        str | None, typer.Option(help="Of --gamed, if it is not the published file.")
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(
            help="In place of --gamed: a clone of AlpacaEval's repository, or a folder with the five "
            "files of it that docs/evaluate.md names.",
            metavar="FOLDER",
            parser=place,
        ),
    ] = None,
    allow_missing: Annotated[
        int, typer.Option(help="So many instructions may lack a readable preference.", min=0)
    ] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer, at most.", min=1)
    ] = 2048,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy.", callback=within(Range(0)))
    ] = 0.7,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    revision: Revision = None,
    iteration: Iteration = None,
    dtype: Dtype = "auto",
    tensor: Tensor = 1,
    slots: Slots = 16,
    concurrency: Concurrency = 16,
    cache: Cache = None,
    max_cost: MaxCost = None,
    price_prompt: PricePrompt = None,
    price_completion: PriceCompletion = None,
    dry_run: DryRun = False,
) -> None:
    """AlpacaEval 2.0: answer, annotate, score.

    Costs 805 answers of at most --max-new-tokens tokens and, with --judge or --annotator, 805 judge
    calls of one token, which read about 1,000 tokens each. Without a judge it stops at
    model_outputs.json. Started again, it goes on from what is there.
    """
    from selm_jax.evaluation.benchmarks.alpaca_eval import annotate, score
    from selm_jax.evaluation.benchmarks.alpaca_eval import evaluate as alpaca
    from selm_jax.evaluation.benchmarks.alpaca_eval import instructions as files
    from selm_jax.evaluation.model import open_model
    from selm_jax.shell.lock import only_one

    exactly_one(MODEL=model, outputs=outputs, annotations=annotations)
    if judge and annotator:
        raise EvaluationError("--judge asks a server, --annotator the package: give one of them")
    if gamed and published:
        raise EvaluationError("--gamed and --published both serve the same fit: give one of them")
    if annotations is not None:
        rows = files.read_annotations(annotations, allow_missing=allow_missing)
        found = alpaca.numbers(rows, gamed, gamed_sha256, published)
        if out is not None:
            with only_one(out):
                alpaca.write_numbers(out, rows, found, {"annotations": annotations})
        typer.echo(score.table(rows[0]["generator_2"], found))
        return

    texts = files.read_set(instructions)
    if judge or annotator:
        annotate.check_ready(texts, annotator)
    alpaca.check_length_control(gamed, gamed_sha256, published)
    question = annotate.read_prompt(prompt) if judge or (annotator and dry_run) else None
    decoding = alpaca.Decoding(max_new_tokens, temperature, top_p, seed)
    answering = None
    if model is not None:
        answering = open_model(
            model, revision=revision, iteration=iteration, dtype=dtype, tensor=tensor, slots=slots
        )
        name = name or answering.name
    answers = files.read_outputs(outputs) if outputs else None
    folder = out or default_out(name or (answers[0]["generator"] if answers else ""), "alpaca_eval")
    if dry_run:
        costs = []
        if answering is not None:
            costs.append(alpaca.cost_of_answers(answering, texts, folder, decoding))
        if question is not None:
            who = judge or f"{annotator} (package)"
            cost = alpaca.cost_of_judging(who, texts, question, answers, max_new_tokens)
            costs.append(cost)
        show_costs(costs)
        return

    client = None
    if judge is not None:  # before anything is drawn: its key may be missing
        client = open_client(judge, cache or folder / "judge.sqlite", base_url, key_env, concurrency,
                         max_cost, price_prompt, price_completion)  # fmt: skip
    with only_one(folder):
        if answering is not None:
            with open_bar(f"{name}  answers", len(texts.rows), "answers") as advance:
                outputs = alpaca.answer(answering, texts, folder, decoding, name, advance)
            answers = files.read_outputs(outputs)
        assert answers is not None and outputs is not None
        typer.echo(f"{outputs}: {len(answers)} answers, each to its instruction")
        if client is not None and question is not None:
            with open_bar(f"{judge}  annotates", len(answers), "calls") as advance:
                rows = asyncio.run(
                    annotate.ask(texts, answers, client, question, advance, allow_missing)
                )
        elif annotator is not None:
            rows = annotate.ask_package(texts, answers, annotator, folder / "package_cache.json")
        else:
            return
        rows = files.check_annotations(rows, "the judge's annotations", allow_missing=allow_missing)
        made = {"model_outputs": outputs, "annotations": alpaca.write_annotations(folder, rows)}
        found = alpaca.numbers(rows, gamed, gamed_sha256, published)
        record = alpaca.write_numbers(folder, rows, found, made)
    typer.echo(score.table(rows[0]["generator_2"], found))
    typer.echo(str(record))
