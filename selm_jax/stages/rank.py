"""rank: every candidate with its score, rank and role (ranked.parquet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from selm_jax.annotate.store import AnnotationError, Store
from selm_jax.config import as_dict
from selm_jax.feedback.human import Human, items_of, store_of
from selm_jax.feedback.ranker import Question
from selm_jax.parallel import multihost
from selm_jax.preferences.acquisition import MODEL_BASED, Prospect, best
from selm_jax.preferences.candidates import Candidate, Dropped, FeedbackError, Pair
from selm_jax.preferences.examples import ROLES, Example
from selm_jax.preferences.labels import label
from selm_jax.preferences.selection import draws, ranks
from selm_jax.preferences.selection_report import Report
from selm_jax.run.rows import question
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.stages.asking import scores_in_parts, unread
from selm_jax.stages.generate import RESPONSES, Counts, response_files
from selm_jax.text.answers import answer_ids, check_spelled
from selm_jax.text.answers import answers as answers_of
from selm_jax.text.chat import UnusableAnswer
from selm_jax.text.prompts import Prompt

RANKED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("candidate", pa.int32()),
        ("source", pa.string()),
        ("sample", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish", pa.string()),
        ("score", pa.float64()),  # null if nobody was asked, or a judge said nothing readable of it
        ("rank", pa.int32()),
        ("chosen", pa.bool_()),
        ("rejected", pa.bool_()),
        ("explore", pa.bool_()),
        ("dropped", pa.string()),  # why the prompt gave no pair; null if it gave one
        ("preference", pa.float64()),  # of the chosen one: its soft label; null for the others
    ]
)


@dataclasses.dataclass(frozen=True)
class Pool:
    """The prompts of an iteration with all their candidates, before anybody is asked.

    `usable` says of each prompt whether all its answers can be used, `asked` which of these prompts
    the budget lets be asked about, `cost` what the choice of them cost.
    """

    prompts: Sequence[Prompt]
    candidates: Sequence[Sequence[Candidate]]
    usable: Sequence[bool]
    asked: Sequence[int]
    cost: Counts

    def questions(self, which: Sequence[int]) -> tuple[list[Question], list[list[str]]]:
        """What a ranker is given: prompts, and the texts of their candidates."""
        texts = [[each.text for each in self.candidates[i]] for i in which]
        return [question(self.prompts[i]) for i in which], texts


def rank(run: Run, t: int) -> Counts:
    """The ranker scores the candidates of the prompts that it is asked about; each becomes a pair
    or a counted drop."""
    if run.experiment.taught:
        return _teach(run, t)
    f = run.experiment.feedback
    pool = pool_of(run, t)
    answered = multihost.on_first(lambda: _answered(run, t, pool))
    found, told = scores_in_parts(run, t, *pool.questions(answered))
    scores = dict(zip(answered, found, strict=True))
    silent = {
        i: "not_asked" if usable else "unusable_answer" for i, usable in enumerate(pool.usable)
    } | dict.fromkeys(pool.asked, "not_answered")
    report, rows = Report(), []
    for i, (prompt, each) in enumerate(zip(pool.prompts, pool.candidates, strict=True)):
        seed = (run.experiment.seed, t, i)
        soft = None
        if i not in scores:
            result: Pair | Dropped = Dropped(silent[i])
        else:
            result = _selected(run, prompt, each, scores[i], seed)
        if isinstance(result, Pair):
            result, soft = label(result, scores[i], **as_dict(f.labels), seed=seed)
        report.add(each, scores.get(i), result)
        rows += _ranked_rows(prompt, each, scores.get(i), result, soft)
    _write(run, t, rows)
    of_ranker = {f"ranker/{key}": value for key, value in told.items()}
    return report.as_dict() | pool.cost | unread(told) | of_ranker


def _selected(run: Run, prompt: Prompt, candidates, scores, seed) -> Pair | Dropped:
    try:
        return run.select(candidates, scores, seed=seed)
    except FeedbackError as error:
        raise FeedbackError(f"prompt {prompt.id!r}: {error}") from error


def pool_of(run: Run, t: int) -> Pool:
    """Every candidate of an iteration, and which prompts are to be asked about."""
    prompts = run.prompts(t)
    answers: dict[str, list[dict]] = {}
    for file in response_files(run, t):
        for row in artifacts.read_table(file, RESPONSES).to_pylist():
            answers.setdefault(row["prompt_id"], []).append(row)
    found = [_candidates(run, prompt, answers.get(prompt.id, [])) for prompt in prompts]
    able = [i for i, (_, usable) in enumerate(found) if usable]
    pool = Pool(prompts, [each for each, _ in found], [usable for _, usable in found], able, {})
    budget = run.experiment.feedback.budget
    return pool if budget is None else _within_budget(run, t, pool, budget)


def put_questions(run: Run, t: int, minimum: int | None = None) -> tuple[Store, str]:
    """Puts an iteration's questions where people are asked them, whichever ranker the run has.

    Args:
      minimum: how many people are to rank each; None: as the ranker's settings say, or 1.

    Returns:
      the store, and the name of the batch.

    Raises:
      AnnotationError: there is nothing to rank, or the ranker waits for another minimum.
    """
    if run.experiment.taught:
        raise AnnotationError(
            f"{run.folder.path}: the data set's answers are taught as they are; there is nothing to rank"
        )
    f = run.experiment.feedback
    of_ranker = f.settings.get("minimum", 1) if f.ranker == "human" else None
    if minimum is not None and of_ranker not in (None, minimum):
        raise AnnotationError(
            f"the ranker waits for {of_ranker} people per prompt, found a minimum of {minimum}; "
            "change feedback.settings.minimum"
        )
    store = Store(store_of(run.folder.path, f.settings if f.ranker == "human" else {}))
    pool = pool_of(run, t)
    items = [item for item in items_of(*pool.questions(pool.asked)) if item is not None]
    store.put(_batch(run, t), items, minimum or of_ranker or 1)
    return store, _batch(run, t)


def _batch(run: Run, t: int) -> str:
    return f"{run.folder.name}/iteration_{t}"


def _answered(run: Run, t: int, pool: Pool) -> list[int]:
    """The prompts that the ranker can score: all that are asked about, but for people."""
    ranker = run.ranker
    if not isinstance(ranker, Human):
        return list(pool.asked)
    if ranker.wait:
        run.console.print(
            f"iteration {t}  rank: waits for people; `selm annotate {run.folder.path}` asks them",
            soft_wrap=True,
        )
    with run.bar(f"iteration {t}  rank", len(pool.asked), "prompts") as advance:
        found = ranker.collect(
            run.folder.path,
            _batch(run, t),
            *pool.questions(pool.asked),
            lambda more: advance(more, 0),
        )
    return [i for i, ready in zip(pool.asked, found, strict=True) if ready]


def _within_budget(run: Run, t: int, pool: Pool, budget: int) -> Pool:
    """The pool with the prompts chosen that `feedback.acquisition` values most.

    Prompts that can give no pair, whatever is answered, are not asked about. The policy is the one
    that generated, policy t-1; its own reference is that of iteration t-1. In iteration 1 it is the start
    model itself: all reward gaps are 0, and the choice is random.
    """
    f = run.experiment.feedback
    able = [i for i in pool.asked if len({c.text for c in pool.candidates[i]}) > 1]
    values, cost = np.zeros(len(able)), {}
    if f.acquisition in MODEL_BASED and able:
        prospects, cost = _prospects(run, t, pool, able)
        values = np.array([MODEL_BASED[f.acquisition](p) for p in prospects])
    chosen = best(values, budget, draws((run.experiment.seed, t), "the budget", 3))
    asked = [able[i] for i in chosen]
    cost |= {"asked": len(asked), "asked/candidates": sum(len(pool.candidates[i]) for i in asked)}
    return dataclasses.replace(pool, asked=asked, cost=cost)


def _prospects(
    run: Run, t: int, pool: Pool, which: Sequence[int]
) -> tuple[list[Prospect], dict[str, int]]:
    """Log-probabilities of candidates that have token ids, and what they cost."""
    kept = [[c for c in pool.candidates[i] if c.token_ids] for i in which]
    examples = []
    for i, each in zip(which, kept, strict=True):
        ids = tuple(dict.fromkeys(c.token_ids for c in each if c.token_ids))
        prompt = pool.prompts[i]
        examples.append(Example(prompt.id, run.data.prompt_ids(prompt), ids, {}))
    scorer = run.programs.scorer
    policy = scorer.logps(run.programs.start_of(run.policy(t - 1)), examples)
    compared = run.experiment.feedback.acquisition == "reward_gap" and t > 1
    reference = (
        scorer.logps(run.programs.start_of(run.reference(t - 1)), examples) if compared else policy
    )
    prospects = []
    for e, each, p, r in zip(examples, kept, policy, reference, strict=True):
        at = [e.responses.index(c.token_ids) for c in each]
        drawn = np.array([c.source == "sample" for c in each])
        prospects.append(Prospect(np.array(p)[at], np.array(r)[at], drawn))
    tokens = (1 + compared) * sum(e.tokens for e in examples)
    return prospects, {"acquisition/forward_tokens": tokens}


def _teach(run: Run, t: int) -> Counts:
    """The data set's answers are what is trained on, as they are: there is nothing to rank."""
    roles = ("chosen", "rejected") if run.experiment.data.rejected else ("chosen",)
    rows, unusable = [], 0
    for prompt in run.prompts(t):
        found = [(role, _of_data(run, prompt, role)) for role in roles]
        if not all(usable for _, (_, usable) in found):
            unusable += 1
            continue
        rows += [
            _row(prompt, i, candidate)
            | {"rank": i + 1, role: True, "score": _score_of_data(run, prompt, role)}
            for i, (role, (candidate, _)) in enumerate(found)
        ]
    _write(run, t, rows)
    what = "pairs" if "rejected" in roles else "answers"
    counts = {what: len(rows) // len(roles)}
    return counts | {"drops": unusable, "drops/unusable_answer": unusable}


def _write(run: Run, t: int, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows, schema=RANKED)
    if multihost.is_first():
        artifacts.write_table(run.folder.iteration(t) / "ranked.parquet", table)


def _candidates(run: Run, prompt: Prompt, answers: Sequence[dict]) -> tuple[list[Candidate], bool]:
    """The policy's answers, then the data set's chosen and rejected: the authors' order.

    Returns:
      the candidates, and whether all answers of the data can be used.
    """
    own = [
        Candidate(a["kind"], a["text"], tuple(a["token_ids"]), a["finish"], a["sample"])
        for a in answers
    ]
    if not run.experiment.candidates.dataset:
        return own, True
    found = [_of_data(run, prompt, source) for source in answers_of(prompt)]
    return own + [candidate for candidate, _ in found], all(usable for _, usable in found)


def _of_data(run: Run, prompt: Prompt, source: str) -> tuple[Candidate, bool]:
    """One of the data set's answers, and whether it can be used; where bad rows are errors, it can."""
    ids, usable = (
        None,
        True,
    )  # `layout: paper` and reward models make ids of pairs, not of candidates
    if run.experiment.text.layout == "default":
        try:
            if run.task.rates:
                check_spelled(run.chat, prompt, source)
            else:
                ids = answer_ids(run.chat, prompt, source)
        except UnusableAnswer:
            if run.experiment.data.on_bad_row == "error":
                raise
            usable = False
    return Candidate(source, answers_of(prompt)[source], ids, "dataset", 0), usable


def _score_of_data(run: Run, prompt: Prompt, role: str) -> float | None:
    """What the data says that an answer is worth; None where the experiment names no column."""
    d = run.experiment.data
    column = {"chosen": d.chosen_score, "rejected": d.rejected_score}[role]
    if column is None:
        return None
    return prompt.row[column]  # a float: looked at when the rows were read


def _ranked_rows(
    prompt: Prompt, candidates, scores, result: Pair | Dropped, soft: float | None
) -> list[dict]:
    place = None if scores is None or np.isnan(scores).any() else ranks(scores)
    pair = dataclasses.asdict(result) if isinstance(result, Pair) else {}
    rows = []
    for i, candidate in enumerate(candidates):
        row = _row(prompt, i, candidate)
        if scores is not None and not np.isnan(scores[i]):
            row["score"] = float(scores[i])
        if place is not None:
            row["rank"] = int(place[i])
        row |= {role: pair.get(role) == i for role in ROLES}
        row["explore"] |= i in pair.get("explored", ())
        row["dropped"] = result.reason if isinstance(result, Dropped) else None
        row["preference"] = soft if row["chosen"] else None
        rows.append(row)
    return rows


def _row(prompt: Prompt, i: int, candidate: Candidate) -> dict[str, Any]:
    """What a row says of a candidate that plays no role."""
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.messages[-1].content,
        "candidate": i,
        "source": candidate.source,
        "sample": candidate.sample,
        "token_ids": candidate.token_ids,
        "text": candidate.text,
        "finish": candidate.finish,
        **dict.fromkeys(ROLES, False),
    }
