"""Asks the ranker for the scores of a stage's candidates.

An iteration's candidates are scored in parts, which are kept until all candidates are ranked
(scores/part-*.parquet).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from selm_jax.evaluation.cost import judges
from selm_jax.feedback.judge.unread import UnreadableJudge, mostly, too_many
from selm_jax.feedback.ranker import Question, batches_of, counted, prompts_together, reported
from selm_jax.parallel import multihost
from selm_jax.run.inputs import LazyRanker
from selm_jax.shell import artifacts, parts
from selm_jax.shell.shared_stages import key_of
from selm_jax.stages.step import Step
from selm_jax.tables import scores as table

Scores = list[list[float | None]]  # by prompt and candidate; None: an unreadable judgement
Told = dict[str, int | float]  # the counts that a ranker reports

FOLDER = "scores"


def asked_scores(
    ranker: LazyRanker, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    """The ranker's scores, one array per question.

    Only the first process calls the ranker: it may be people or a server with a budget, and a
    model's score of a text may depend on the batch.
    """
    return _arrays(multihost.on_first(lambda: _ask(ranker, questions, candidates)))


def scores_in_parts(
    step: Step,
    ranker: LazyRanker,
    questions: Sequence[Question],
    candidates: Sequence[Sequence[str]],
) -> tuple[list[np.ndarray], Told]:
    """The scores of an iteration's candidates, and the ranker's counts, summed over all parts.

    Finished parts are not scored again. Rankings by people are not split into parts: they are
    stored already, and more may have come in since.

    Raises:
      Stopped: the run was told to stop; the finished parts are kept.
      UnreadableJudge: most of a judge's answers cannot be read. No part is kept: the readable
        answers are in the judge's cache, and the rest must be asked for again.
    """
    feedback = step.settings.feedback
    if feedback.ranker == "human":
        scores = asked_scores(ranker, questions, candidates)
        return scores, multihost.on_first(lambda: reported(ranker.ranker))
    size = multihost.on_first(lambda: _prompts_per_part(ranker, feedback.prompts_per_part))
    count = -(-len(questions) // size) or 1  # one empty part if there are no questions
    scores, told = [], Counter()
    try:
        with step.bar(len(questions), "prompts") as advance:
            for i, file in enumerate(parts.files(step.folder / FOLDER, count)):
                multihost.stop_if_told()
                mine = slice(i * size, (i + 1) * size)
                work = partial(_part, ranker, file, questions[mine], candidates[mine])
                found, of_part = multihost.on_first(work)
                scores += _arrays(found)
                told.update(of_part)
                advance(len(found), 0)
        check_read(step, ranker, dict(told))
    except UnreadableJudge:
        multihost.on_first(lambda: artifacts.remove(step.folder / FOLDER))
        raise
    return scores, dict(told)


def check_read(step: Step, ranker: LazyRanker, told: Told) -> None:
    """Checks that most of a judge's answers in a stage could be read.

    A judge that gives few answers is not checked while it works, so it is checked here.

    Raises:
      UnreadableJudge: most of its answers could not be read.
    """
    if halved := counted(told, "batch_halved"):
        step.say(f"the ranker ran out of memory, so its batch was halved {halved} times")
        batches = multihost.on_first(
            lambda: [(batch.rows, batch.lowered) for batch in batches_of(ranker.ranker)]
        )
        if any(lowered for _, lowered in batches):  # and not in an earlier start of the run
            step.ranker_batches[:] = [rows for rows, _ in batches]
    malformed, answers = counted(told, "malformed"), counted(told, "asked")
    if mostly(malformed, answers):
        examples = multihost.on_first(lambda: [x for j in judges(ranker.ranker) for x in j.unread])
        name = f"ranker {step.settings.feedback.ranker!r}"
        raise too_many(name, malformed, answers, *examples[:1])


def unread(told: Told) -> Told:
    """The number of a judge's unreadable answers, as {"malformed": n}; {} without a judge."""
    judged = counted(told, "asked") > 0
    return {"malformed": counted(told, "malformed")} if judged else {}


def _prompts_per_part(ranker: LazyRanker, wanted: int) -> int:
    """The prompts per part: `wanted`, rounded up so that no batch of the ranker is split."""
    together = prompts_together(ranker.ranker)
    return -(-wanted // together) * together


def _part(
    ranker: LazyRanker,
    file: Path,
    questions: Sequence[Question],
    candidates: Sequence[Sequence[str]],
) -> tuple[Scores, Told]:
    """Scores one part of the questions, or reads its file; returns (scores, ranker's counts)."""
    key = _key(questions, candidates)
    if (found := _read(file, key)) is not None:
        return found
    scores = _ask(ranker, questions, candidates)
    told = reported(ranker.ranker)
    rows = [table.Row(q.id, tuple(of)) for q, of in zip(questions, _arrays(scores), strict=True)]
    table.write(file, rows, about=json.dumps({"key": key, "told": told}))
    return scores, told


def _ask(
    ranker: LazyRanker, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
) -> Scores:
    return _plain(ranker.ranker.scores(questions, candidates))


def _read(file: Path, key: str) -> tuple[Scores, Told] | None:
    """The (scores, ranker's counts) of a finished part; None if no part has this key."""
    if not parts.is_there(file):
        return None
    about = json.loads(table.about(file) or "{}")
    if about.get("key") != key:
        return None
    return _plain([row.scores for row in table.read(file)]), about["told"]


def _key(questions: Sequence[Question], candidates: Sequence[Sequence[str]]) -> str:
    """A digest of a part's prompts and candidates, used to recognise a part that is finished."""
    prompts = [question.id for question in questions]
    return key_of(prompts=prompts, candidates=candidates)


def _plain(scores: Iterable[Iterable[float]]) -> Scores:
    return [[None if np.isnan(x) else float(x) for x in each] for each in scores]


def _arrays(scores: Scores) -> list[np.ndarray]:
    return [np.array(each, np.float64) for each in scores]  # None becomes NaN
