"""Runs `selm eval mt_bench`: generates, judges and scores answers, skipping finished ones."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

import selm_jax
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.files import file_name
from selm_jax.evaluation.benchmarks.mt_bench import answer as bench
from selm_jax.evaluation.benchmarks.mt_bench import judge as judging
from selm_jax.evaluation.benchmarks.mt_bench import judgments as verdicts
from selm_jax.evaluation.benchmarks.mt_bench import score
from selm_jax.evaluation.benchmarks.mt_bench.options import Options
from selm_jax.evaluation.benchmarks.options import exactly_one, open_bar, show_costs
from selm_jax.evaluation.cost import Cost
from selm_jax.evaluation.model import Model
from selm_jax.evaluation.options import default_out
from selm_jax.feedback.judge.client import Client
from selm_jax.shell import artifacts
from selm_jax.shell.lock import only_one

Named = tuple[str, judging.Answers]  # a model's name, and its answers


def run(options: Options) -> None:
    """Generates answers, judges and scores them as the options request, and prints the scores.

    Raises:
      EvaluationError: options contradict each other, or a step fails.
    """
    o = options
    exactly_one(MODEL=o.model, answers=o.answers, judgments=o.judgments)
    if o.judgments is not None and (o.judging.judge or o.against):
        raise EvaluationError(
            "--judgments gives finished judgments: leave out --judge and --against"
        )
    asked = bench.read_questions(o.questions, o.unpublished)
    if o.judgments is not None:
        _score_only(options, asked, o.judgments)
        return
    bench_judge = _Judge.of(options, asked)
    others = [bench.read_answers(o.against, asked)] if o.against else []
    own = bench.read_answers(o.answers, asked) if o.answers else None
    model = None if o.model is None else o.loading.open(o.model)
    name = o.name or (model.name if model else own[0] if own else "")
    folder = o.out or default_out(name, "mt_bench")
    if others and others[0][0] == name:
        raise EvaluationError(
            f"--against {o.against}: these answers have the same model name, {name!r}. Give the "
            "evaluated model another name with --name"
        )
    if own is not None:
        own = (name, own[1])
    if o.dry_run:
        show_costs(_costs(options, asked, bench_judge, model, name, own, others, folder))
        return

    client = o.judging.client(folder)
    with only_one(folder):
        answers = o.answers
        if model is not None:
            decoding = bench.Decoding(o.max_new_tokens, o.seed)
            with open_bar(f"{name}  answers", bench.TURNS * len(asked), "answers") as advance:
                answers = bench.answer(model, asked, folder, decoding, name, advance)
            own = bench.read_answers(answers, asked)
            typer.echo(f"{answers}: {len(asked)} questions")
        assert own is not None and answers is not None
        if client is None or bench_judge is None:
            return
        judged, file = _ask(bench_judge, asked, [own, *others], client, folder)
        made = {"questions": o.questions, **bench_judge.files, "answers": answers}
        if o.against:
            made["against"] = o.against
        how = {"repeats": o.repeats, "sampling": bench_judge.sampling.fields()}
        _score(judged, asked, folder, made, options, file, how)


@dataclass(frozen=True)
class _Judge:
    """MT-Bench's judge, with its prompts, reference answers and settings.

    Attributes:
        mode: "single" or "pair".
        templates: the judge's prompts, by name.
        references: reference answers by question, for questions that are judged with one.
        files: the files that prompts and references were read from.
    """

    name: str
    mode: str
    repeats: int
    sampling: judging.Sampling
    templates: Mapping[str, judging.JudgePrompt]
    references: judging.Answers
    files: Mapping[str, Path]

    @classmethod
    def of(cls, options: Options, asked: Sequence[bench.Question]) -> _Judge | None:
        """Reads the judge's files; None if the options name no judge.

        Raises:
          EvaluationError: a file is missing, or is not MT-Bench's.
        """
        o = options
        if o.judging.judge is None:
            return None
        sampling = judging.Sampling(o.judge_temperature, o.judge_tokens, o.judging.fields())
        templates = judging.read_prompts(o.prompts, o.unpublished)
        need = [q for q in asked if q.category in judging.WITH_REFERENCE]
        references = bench.read_references(o.references, need, o.unpublished) if need else {}
        files = {"prompts": o.prompts} | ({"references": o.references} if need else {})
        mode = "single" if o.against is None else "pair"
        return cls(o.judging.judge, mode, o.repeats, sampling, templates, references, files)

    def matches(
        self, asked: Sequence[bench.Question], models: Sequence[Named]
    ) -> list[judging.Match]:
        return judging.matches(self.mode, asked, models, self.references, self.templates)


def _costs(
    options: Options,
    asked: Sequence[bench.Question],
    judge: _Judge | None,
    model: Model | None,
    name: str,
    own: Named | None,
    others: Sequence[Named],
    folder: Path,
) -> list[Cost]:
    """The cost of the answers and judgments that are still missing, for `--dry-run`."""
    costs = []
    if model is not None:
        decoding = bench.Decoding(options.max_new_tokens, options.seed)
        costs.append(bench.cost_of_answers(model, asked, folder, decoding, name))
    if judge is not None:
        nothing = {q.id: ("", "") for q in asked}
        todo = judge.matches(asked, [own or (name, nothing), *others])
        journal = verdicts.journal(folder, judge.mode, judge.name)
        left = judging.left_of(todo, judge.repeats, journal)
        # The judge reads one answer at turn 1 and two at turn 2.
        unknown = 0 if own else 3 * options.max_new_tokens // 2
        longest = judge.sampling.max_tokens + unknown
        costs.append(judging.cost(todo, f"{judge.name} ({judge.mode})", left, longest))
    return costs


def _ask(
    judge: _Judge,
    asked: Sequence[bench.Question],
    models: Sequence[Named],
    client: Client,
    folder: Path,
) -> tuple[verdicts.Judgments, Path]:
    """Requests the missing judgments; returns all judgments of the models, and their file."""
    todo = judge.matches(asked, models)
    journal = verdicts.journal(folder, judge.mode, judge.name)
    with open_bar(f"{judge.name}  judges", len(todo) * judge.repeats, "judgments") as advance:
        rows = asyncio.run(
            judging.ask(judge.mode, todo, judge.repeats, client, journal, judge.sampling, advance)
        )
    names = tuple(name for name, _ in models)
    return verdicts.Judgments(judge.mode, names, judge.name, rows), journal.file


def _score_only(options: Options, asked: Sequence[bench.Question], judgments: Path) -> None:
    judged = verdicts.read(judgments, options.name)
    folder = options.out or default_out(judged.models[0], "mt_bench")
    if not options.dry_run:
        with only_one(folder):
            made = {"questions": options.questions, "judgments": judgments}
            _score(judged, asked, folder, made, options, judgments, {})


def _score(
    judged: verdicts.Judgments,
    asked: Sequence[bench.Question],
    folder: Path,
    made: Mapping[str, Path],
    options: Options,
    where: Path,
    how: Mapping[str, Any],
) -> None:
    """Computes, writes and prints the scores of judgments that come from the file `where`.

    Args:
        made: the input files by name.
        how: more fields for the record of how they were judged.
    """
    rows = judged.rows
    allowed = score.check_malformed(rows, options.allow_malformed, where)
    found = score.single(rows, asked) if judged.mode == "single" else score.pair(rows, asked)
    record = {
        "benchmark": "MT-Bench" if not options.unpublished else "not MT-Bench: see --unpublished",
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
