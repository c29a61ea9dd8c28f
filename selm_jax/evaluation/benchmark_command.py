"""`selm eval alpaca_eval` and `selm eval mt_bench`."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import selm_jax
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.command import (
    DryRun,
    Dtype,
    Iteration,
    Revision,
    Seed,
    Slots,
    Tensor,
    app,
    default_out,
)
from selm_jax.evaluation.cost import Cost, show
from selm_jax.paths import file_to_write, folder_to_write, place

console = Console(stderr=True)

OptionalSource = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="Model folder, Hub id, GGUF file, or run folder (its last model)."
    ),
]
Name = Annotated[str | None, typer.Option(help="What to call the model in the files.")]
Judge = Annotated[str | None, typer.Option(help="The judge, as its server knows it.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(help="The judge's server: http(s)://host[:port]/v1; default: $OPENAI_BASE_URL."),
]
KeyEnv = Annotated[str | None, typer.Option(help="The environment variable with the API key.")]
Concurrency = Annotated[int, typer.Option(help="Judge calls under way at once.", min=1)]
Cache = Annotated[
    Path | None, typer.Option(help="File of the judge's paid answers.", parser=file_to_write)
]
MaxCost = Annotated[float | None, typer.Option(help="Spend no more; needs both prices.")]
PricePrompt = Annotated[float | None, typer.Option(help="Per million tokens the judge reads.")]
PriceCompletion = Annotated[float | None, typer.Option(help="Per million tokens it writes.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Folder; default: evaluations/MODEL/VERB.", parser=folder_to_write
    ),
]


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
    allow_missing: Annotated[
        int, typer.Option(help="So many instructions may lack a readable preference.", min=0)
    ] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer, at most.", min=1)
    ] = 2048,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
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
    from selm_jax.evaluation import alpaca_eval as alpaca
    from selm_jax.evaluation import alpaca_eval_annotate as annotate
    from selm_jax.evaluation import alpaca_eval_score as score
    from selm_jax.evaluation import alpaca_eval_set as files
    from selm_jax.evaluation.model import open_model
    from selm_jax.lock import only_one

    _exactly_one(MODEL=model, outputs=outputs, annotations=annotations)
    if judge and annotator:
        raise EvaluationError("--judge asks a server, --annotator the package: give one of them")
    if annotations is not None:
        rows = files.read_annotations(annotations, allow_missing=allow_missing)
        found = alpaca.numbers(rows, gamed, gamed_sha256)
        if out is not None:
            with only_one(out):
                alpaca.write_numbers(out, rows, found, {"annotations": annotations})
        typer.echo(score.table(rows[0]["generator_2"], found))
        return

    texts = files.read_set(instructions)
    if judge or annotator:
        annotate.check_ready(texts, annotator)
    if gamed is not None:
        score.gamed_file(gamed, gamed_sha256)
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
        _show(costs)
        return

    client = None
    if judge is not None:  # before anything is drawn: its key may be missing
        client = _client(judge, cache or folder / "judge.sqlite", base_url, key_env, concurrency,
                         max_cost, price_prompt, price_completion)  # fmt: skip
    with only_one(folder):
        if answering is not None:
            with _bar(f"{name}  answers", len(texts.rows), "answers") as advance:
                outputs = alpaca.answer(answering, texts, folder, decoding, name, advance)
            answers = files.read_outputs(outputs)
        assert answers is not None and outputs is not None
        typer.echo(f"{outputs}: {len(answers)} answers, each to its instruction")
        if client is not None and question is not None:
            with _bar(f"{judge}  annotates", len(answers), "calls") as advance:
                rows = asyncio.run(annotate.ask(texts, answers, client, question, advance))
        elif annotator is not None:
            rows = annotate.ask_package(texts, answers, annotator, folder / "package_cache.json")
        else:
            return
        rows = files.check_annotations(rows, "the judge's annotations", allow_missing=allow_missing)
        made = {"model_outputs": outputs, "annotations": alpaca.write_annotations(folder, rows)}
        found = alpaca.numbers(rows, gamed, gamed_sha256)
        record = alpaca.write_numbers(folder, rows, found, made)
    typer.echo(score.table(rows[0]["generator_2"], found))
    typer.echo(str(record))


@app.command(name="mt_bench")
def mt_bench(
    model: OptionalSource = None,
    questions: Annotated[
        Path,
        typer.Option(help="FastChat's data/mt_bench/question.jsonl.", metavar="FILE", parser=place),
    ] = Path("question.jsonl"),
    answers: Annotated[
        Path | None,
        typer.Option(
            help="In place of MODEL: its answers, in FastChat's format.",
            metavar="FILE",
            parser=place,
        ),
    ] = None,
    out: Out = None,
    name: Name = None,
    judge: Judge = None,
    base_url: BaseUrl = None,
    key_env: KeyEnv = None,
    prompts: Annotated[
        Path,
        typer.Option(help="FastChat's data/judge_prompts.jsonl.", metavar="FILE", parser=place),
    ] = Path("judge_prompts.jsonl"),
    references: Annotated[
        Path,
        typer.Option(
            help="FastChat's data/mt_bench/reference_answer/gpt-4.jsonl.",
            metavar="FILE",
            parser=place,
        ),
    ] = Path("reference_answer/gpt-4.jsonl"),
    against: Annotated[
        Path | None,
        typer.Option(
            help="Compare in pairs with the model of these answers, in place of rating.",
            metavar="FILE",
            parser=place,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Judgments of each turn.", min=1)] = 1,
    judge_temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    judge_tokens: Annotated[int, typer.Option(help="Of a judgment, at most.", min=1)] = 2048,
    allow_malformed: Annotated[
        int | None,
        typer.Option(
            help="So many verdicts may be unreadable; they are left out of the means. Default: 5 % "
            "of them: judges now and then miss the format that FastChat's prompts ask for, and 8 of "
            "160 left out that were two points lower move the mean by 0.1.",
            min=0,
        ),
    ] = None,
    unpublished: Annotated[
        bool, typer.Option(help="Accept questions and prompts that are not MT-Bench's.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer, at most.", min=1)
    ] = 1024,
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
    """MT-Bench: answer 80 questions of two turns, have them rated or compared, score.

    Costs 160 answers of at most --max-new-tokens tokens and, with --judge, 160 judge calls for each
    of --repeats (320 with --against), of up to --judge-tokens tokens. Without a judge it stops at
    the answers. Started again, it goes on from what is there.
    """
    from selm_jax import artifacts
    from selm_jax.evaluation import mt_bench as bench
    from selm_jax.evaluation import mt_bench_judge as judging
    from selm_jax.evaluation import mt_bench_score as score
    from selm_jax.evaluation.model import open_model
    from selm_jax.lock import only_one

    _exactly_one(MODEL=model, answers=answers)
    asked = bench.read_questions(questions, unpublished)
    mode = "single" if against is None else "pair"
    decoding = bench.Decoding(max_new_tokens, seed)
    sampling = judging.Sampling(judge_temperature, judge_tokens)
    made: dict[str, Path] = {"questions": questions}
    templates: Mapping[str, Any] = {}
    given: Mapping[int, Any] = {}
    if judge is not None:
        templates = judging.read_prompts(prompts, unpublished)
        need = [q for q in asked if q.category in judging.WITH_REFERENCE]
        given = bench.read_answers(references, need, "reference answers")[1] if need else {}
        made |= {"prompts": prompts} | ({"references": references} if need else {})
    others = [bench.read_answers(against, asked)] if against else []
    own = bench.read_answers(answers, asked) if answers else None
    answering = None
    if model is not None:
        answering = open_model(
            model, revision=revision, iteration=iteration, dtype=dtype, tensor=tensor, slots=slots
        )
    name = name or (answering.name if answering else own[0] if own else "")
    folder = out or default_out(name, "mt_bench")
    if others and others[0][0] == name:
        raise EvaluationError(
            f"{against}: answers of {name!r} itself. Another --name tells them apart"
        )
    if own is not None:
        own = (name, own[1])

    if dry_run:
        costs = []
        if answering is not None:
            costs.append(bench.cost_of_answers(answering, asked, folder, decoding, name))
        if judge is not None:
            nothing = {q.id: ("", "") for q in asked}
            one = own or (name, nothing)
            todo = judging.matches(mode, asked, [one, *others], given, templates)
            left = judging.left_of(todo, repeats, judging.judgments(folder, mode, judge))
            unknown = 0 if own else 3 * max_new_tokens // 2  # turn 1 shows one answer, turn 2 two
            costs.append(judging.cost(todo, repeats, f"{judge} ({mode})", left,
                                      judge_tokens + unknown))  # fmt: skip
        _show(costs)
        return

    client = None
    if judge is not None:
        client = _client(judge, cache or folder / "judge.sqlite", base_url, key_env, concurrency,
                         max_cost, price_prompt, price_completion)  # fmt: skip
    with only_one(folder):
        if answering is not None:
            with _bar(f"{name}  answers", bench.TURNS * len(asked), "answers") as advance:
                answers = bench.answer(answering, asked, folder, decoding, name, advance)
            own = bench.read_answers(answers, asked)
            typer.echo(f"{answers}: {len(asked)} questions")
        assert own is not None and answers is not None
        if client is None:
            return
        todo = judging.matches(mode, asked, [own, *others], given, templates)
        journal = judging.judgments(folder, mode, client.model)
        with _bar(f"{client.model}  judges", len(todo) * repeats, "judgments") as advance:
            rows = asyncio.run(judging.ask(mode, todo, repeats, client, journal, sampling, advance))
        allowed = score.check_malformed(rows, allow_malformed, journal.file)
        found = score.single(rows, asked) if mode == "single" else score.pair(rows, asked)
        made |= {"answers": answers} | ({"against": against} if against else {})
        models = [own[0], *(each[0] for each in others)]
        record = {
            "benchmark": "MT-Bench" if not unpublished else "not MT-Bench: see --unpublished",
            "mode": mode, "models": models, "judge": client.model, "repeats": repeats,
            "sampling": dataclasses.asdict(sampling), "allow_malformed": allowed, **found,
            "files": {key: {"path": str(path), "sha256": artifacts.digest(path)}
                      for key, path in made.items()},
            "selm_jax": selm_jax.__version__,
        }  # fmt: skip
        title = " against ".join(models) + f", judged by {client.model}, {len(rows)} judgments"
        names = "_against_".join(map(bench.file_name, models))
        file = folder / f"{bench.file_name(client.model)}_{names}.json"
        artifacts.write_json(file, record)
    typer.echo(score.table(title, found))
    typer.echo(f"{journal.file}\n{file}")


def _show(costs: list[Cost]) -> None:
    left = [cost for cost in costs if cost.answers or cost.judge_calls]
    if left:
        show(left, console)
    else:
        typer.echo("nothing is left to be drawn or asked")


def _exactly_one(**given: object) -> None:
    if sum(value is not None for value in given.values()) != 1:
        names = [each if each.isupper() else f"--{each}" for each in given]
        raise EvaluationError(f"give one of {', '.join(names)}")


def _client(
    judge: str,
    cache: Path,
    base_url: str | None,
    key_env: str | None,
    concurrency: int,
    max_cost: float | None,
    price_prompt: float | None,
    price_completion: float | None,
):
    from selm_jax.feedback.judge_budget import Budget
    from selm_jax.feedback.judge_client import Client

    budget = Budget(None, max_cost, price_prompt, price_completion)
    return Client(judge, cache=cache, base_url=base_url, key_env=key_env,
                  concurrency=concurrency, budget=budget)  # fmt: skip


def _bar(title: str, total: int, unit: str):
    from selm_jax.progress import bar

    return bar(console, title, total, unit)
