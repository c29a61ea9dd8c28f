"""`selm eval mt_bench`."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import selm_jax
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
    app,
    default_out,
    within,
)
from selm_jax.shell.paths import place
from selm_jax.shell.ranges import Range


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
    judgments: Annotated[
        Path | None,
        typer.Option(
            help="In place of MODEL: score these judgments of FastChat's format, of the model --name; "
            "asks nobody.",
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
    judge_temperature: Annotated[float, typer.Option(callback=within(Range(0)))] = 0.0,
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
        bool,
        typer.Option(
            help="Accept questions, prompts and reference answers that are not MT-Bench's."
        ),
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
    from selm_jax.evaluation.benchmarks.mt_bench import answer as bench
    from selm_jax.evaluation.benchmarks.mt_bench import judge as judging
    from selm_jax.evaluation.benchmarks.mt_bench import judgments as verdicts
    from selm_jax.evaluation.model import open_model
    from selm_jax.shell.lock import only_one

    exactly_one(MODEL=model, answers=answers, judgments=judgments)
    if judgments is not None and (judge or against):
        raise EvaluationError("--judgments are there already: leave --judge and --against out")
    asked = bench.read_questions(questions, unpublished)
    if judgments is not None:
        scored = verdicts.read(judgments, name)
        folder = out or default_out(scored.models[0], "mt_bench")
        if not dry_run:
            with only_one(folder):
                made = {"questions": questions, "judgments": judgments}
                _score(scored, asked, folder, made, allow_malformed, unpublished, judgments, {})
        return
    mode = "single" if against is None else "pair"
    decoding = bench.Decoding(max_new_tokens, seed)
    sampling = judging.Sampling(judge_temperature, judge_tokens)
    made: dict[str, Path] = {"questions": questions}
    templates: Mapping[str, Any] = {}
    given: Mapping[int, Any] = {}
    if judge is not None:
        templates = judging.read_prompts(prompts, unpublished)
        need = [q for q in asked if q.category in judging.WITH_REFERENCE]
        given = bench.read_references(references, need, unpublished) if need else {}
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
            left = judging.left_of(todo, repeats, verdicts.journal(folder, mode, judge))
            unknown = 0 if own else 3 * max_new_tokens // 2  # turn 1 shows one answer, turn 2 two
            costs.append(judging.cost(todo, repeats, f"{judge} ({mode})", left,
                                      judge_tokens + unknown))  # fmt: skip
        show_costs(costs)
        return

    client = None
    if judge is not None:
        client = open_client(judge, cache or folder / "judge.sqlite", base_url, key_env, concurrency,
                         max_cost, price_prompt, price_completion)  # fmt: skip
    with only_one(folder):
        if answering is not None:
            with open_bar(f"{name}  answers", bench.TURNS * len(asked), "answers") as advance:
                answers = bench.answer(answering, asked, folder, decoding, name, advance)
            own = bench.read_answers(answers, asked)
            typer.echo(f"{answers}: {len(asked)} questions")
        assert own is not None and answers is not None
        if client is None:
            return
        todo = judging.matches(mode, asked, [own, *others], given, templates)
        journal = verdicts.journal(folder, mode, client.model)
        with open_bar(f"{client.model}  judges", len(todo) * repeats, "judgments") as advance:
            rows = asyncio.run(judging.ask(mode, todo, repeats, client, journal, sampling, advance))
        made |= {"answers": answers} | ({"against": against} if against else {})
        models = (own[0], *(each[0] for each in others))
        scored = verdicts.Judgments(mode, models, client.model, rows)
        how = {"repeats": repeats, "sampling": dataclasses.asdict(sampling)}
        _score(scored, asked, folder, made, allow_malformed, unpublished, journal.file, how)


def _score(
    judged: Any,
    questions: Any,
    folder: Path,
    made: Mapping[str, Path],
    allow_malformed: int | None,
    unpublished: bool,
    where: Path,
    how: Mapping[str, Any],
) -> None:
    """Writes and shows the scores of `mt_bench_judgments.Judgments`, which are in the file `where`.

    Args:
        made: what they were made of, by what it is.
        how: more that the record says of the judging.
    """
    from selm_jax.evaluation.benchmarks.files import file_name
    from selm_jax.evaluation.benchmarks.mt_bench import score
    from selm_jax.shell import artifacts

    rows = judged.rows
    allowed = score.check_malformed(rows, allow_malformed, where)
    found = (
        score.single(rows, questions) if judged.mode == "single" else score.pair(rows, questions)
    )
    record = {
        "benchmark": "MT-Bench" if not unpublished else "not MT-Bench: see --unpublished",
        "mode": judged.mode, "models": list(judged.models), "judge": judged.judge, **how,
        "allow_malformed": allowed, **found,
        "files": {key: {"path": str(path), "sha256": artifacts.digest(path)}
                  for key, path in made.items()},
        "selm_jax": selm_jax.__version__,
    }  # fmt: skip
    title = " against ".join(judged.models) + f", judged by {judged.judge}, {len(rows)} judgments"
    names = "_against_".join(map(file_name, judged.models))
    file = folder / f"{file_name(judged.judge)}_{names}.json"
    artifacts.write_json(file, record)
    typer.echo(score.table(title, found))
    typer.echo(f"{where}\n{file}")
