"""Measures a model on held-out prompts, for both `selm run` and `selm eval heldout`.

    answers = answer(policy, prompts, asked)                        evaluation.answers
    scores = scores_of(ranker.scores, prompts, answers, beside)
    own = measured(policy, prompts, answers, scores)                the policy may be freed now
    found = against(start, own)                                     rows of `tables`

First the policy computes log-probabilities of its own answers and of the data's pairs, then the
start model does so for the same tokens. So the two need not be in memory together, and one start
model serves many policies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from selm_jax.evaluation import frontier
from selm_jax.evaluation.answers import Stored
from selm_jax.evaluation.pairs import pairs_within
from selm_jax.feedback.ranker import Question, scores_beside
from selm_jax.policy.policy import Batches, Policy
from selm_jax.preferences.examples import Example
from selm_jax.tables import heldout, heldout_pairs
from selm_jax.text.prompts import Prompt

Logps = list[tuple[float, ...]]
# A function of questions and of the answers to each, which returns an array of scores per question.
Score = Callable[[Sequence[Question], Sequence[Sequence[str]]], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Own:
    """A policy's answers, with its log-probabilities of these answers and of the data's pairs.

    Attributes:
      scores: a score for each answer; NaN if a judge's verdict could not be read. None: no ranker.
      examples: examples with the answers, each answer once, and after them the pairs.
      places: for each example with answers, the indices of its answers.
      logps: the log-probabilities of all examples' responses.
      left_out: number of answers that are too long for a row and have no log-probabilities.
      pairs_left_out: number of pairs that cannot be scored.
    """

    answers: Sequence[Stored]
    scores: Sequence[float] | None
    examples: Sequence[Example]
    places: Sequence[Sequence[int]]
    logps: Logps
    left_out: int
    pairs_left_out: int

    @property
    def pairs(self) -> Sequence[Example]:
        return self.examples[len(self.places) :]


@dataclasses.dataclass(frozen=True)
class Tables:
    """Rows of the held-out tables: of answers, and of preference pairs (None without pairs)."""

    answers: list[heldout.Row]
    pairs: list[heldout_pairs.Row] | None


def scores_of(
    score: Score,
    prompts: Sequence[Prompt],
    answers: Sequence[Stored],
    beside: Sequence[str] | None = None,
) -> list[float]:
    """Scores all answers with a ranker; returns one score per answer, in the same order.

    Args:
      answers: the same number for each prompt, in the order of the prompts.
      beside: for a relative ranker, one text per prompt with which its answers are compared.
    """
    if not prompts:
        return []
    each = len(answers) // len(prompts)
    by_prompt = [answers[i : i + each] for i in range(0, len(answers), each)]
    questions = [mine[0].question for mine in by_prompt]
    texts = [[a.text for a in mine] for mine in by_prompt]
    if beside is None:
        found = score(questions, texts)
    else:
        found = scores_beside(score, questions, texts, beside)
    return [float(x) for mine in found for x in mine]


def measured(
    policy: Policy,
    prompts: Sequence[Prompt],
    answers: Sequence[Stored],
    scores: Sequence[float] | None,
) -> Own:
    """Computes a policy's log-probabilities of its own answers and of the data's preference pairs.

    Args:
      answers: the same number for each prompt, in the order of the prompts.
    """
    each = len(answers) // len(prompts) if prompts else 0
    prompt_ids = policy.prompt_ids([p.messages for p in prompts])
    whole = [
        Example(p.id, ids, tuple(a.token_ids or () for a in answers[i * each : (i + 1) * each]), {})
        for i, (p, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
    ]
    row = _longest_row(policy.batches, whole)
    examples, places = [], []
    for i, example in enumerate(whole):
        for part, of in in_rows(example, row):
            examples.append(part)
            places.append([i * each + k for k in of])
    pairs, left_out = fitting_pairs(policy, prompts)
    examples += pairs
    return Own(
        answers, scores, examples, places, policy.logps(examples),
        len(answers) - sum(map(len, places)), left_out,
    )  # fmt: skip


def against(start: Policy | None, own: Own) -> Tables:
    """Builds the held-out tables, adding the start model's log-probabilities of the same tokens.

    Args:
      start: None if the policy itself is the start model.
    """
    before = own.logps if start is None else start.logps(own.examples)
    n = len(own.places)
    policy, first = (_by_answer(own.places, logps[:n]) for logps in (own.logps, before))
    scores = own.scores or [math.nan] * len(own.answers)
    answers = [
        heldout.Row(
            a.prompt_id, a.messages[-1].content, "sample" if a.sample else "greedy", a.sample,
            a.text, tuple(a.token_ids or ()), a.finish, score=score,
            logp=policy.get(i, math.nan), logp_start=first.get(i, math.nan),
        )
        for i, (a, score) in enumerate(zip(own.answers, scores, strict=True))
    ]  # fmt: skip
    pairs = frontier.pair_rows(own.pairs, own.logps[n:], before[n:]) if own.pairs else None
    return Tables(answers, pairs)


def fitting_pairs(policy: Policy, prompts: Sequence[Prompt]) -> tuple[list[Example], int]:
    """The data's preference pairs that fit the policy, and the number of pairs left out."""
    positions = policy.config.max_positions
    return pairs_within(
        policy.chat, prompts, min(positions, policy.batches.row_length or positions)
    )


def _longest_row(batches: Batches, examples: Sequence[Example]) -> float:
    """The most tokens of a row.

    If rows are fitted to the examples, as with `training.row_length: auto`, a row has room for a
    prompt and three of its answers, as in training.
    """
    if batches.row_length is not None or batches.rows is None:
        return batches.row_length or math.inf
    most = (len(e.prompt) + 3 * max(map(len, e.responses), default=0) for e in examples)
    return max(most, default=math.inf)


def in_rows(example: Example, longest: float) -> list[tuple[Example, tuple[int, ...]]]:
    """Splits an example that is longer than a row into examples with one response each.

    Held-out prompts are never truncated, so a prompt with all its answers may not fit in a row.

    Returns:
      Examples, each with the indices of its responses.
    """
    every = tuple(range(len(example.responses)))
    if example.tokens <= longest:
        return [(example, every)]
    alone = [dataclasses.replace(example, responses=(r,)) for r in example.responses]
    return [(one, (k,)) for k, one in zip(every, alone, strict=True) if one.tokens <= longest]


def _by_answer(places: Sequence[Sequence[int]], logps: Logps) -> dict[int, float]:
    return {
        i: float(logp)
        for which, of_example in zip(places, logps, strict=True)
        for i, logp in zip(which, of_example, strict=True)
    }
