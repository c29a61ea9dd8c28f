"""Picks a pair for each prompt from its candidates' scores, and counts prompts without a pair."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from selm_jax.config import Labels, as_dict
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.candidates import Candidate, Dropped, FeedbackError, Pair
from selm_jax.preferences.labels import label
from selm_jax.preferences.selection import ranks
from selm_jax.preferences.selection_report import Report
from selm_jax.stages.ranking.candidates import Pool, row_of
from selm_jax.tables import ranked
from selm_jax.text.prompts import Prompt

# `select(candidates, scores, seed=...)`, see `preferences.selection.select`.
Select = Callable[..., Pair | Dropped]


def pairs(
    pool: Pool,
    scores: Mapping[int, np.ndarray],
    select: Select,
    labels: Labels,
    seed: tuple[int, int],
) -> tuple[list[ranked.Row], Report]:
    """Returns (rows of all candidates, with the pairs marked; a report that counts the pairs).

    Args:
      scores: an array [candidates] for each scored prompt, by the prompt's index in the pool.
      select: picks the pair of one prompt, or returns why there is none.
      labels: how a pair's label is derived from the scores.
      seed: the experiment's seed and the iteration.

    Raises:
      FeedbackError: the scores of a prompt cannot be used. The message names the prompt.
    """
    silent = {
        i: "not_asked" if usable else "unusable_answer" for i, usable in enumerate(pool.usable)
    } | dict.fromkeys(pool.asked, "not_answered")
    report, rows = Report(), []
    for i, (prompt, each) in enumerate(zip(pool.prompts, pool.candidates, strict=True)):
        of_prompt = (*seed, i)
        soft = None
        if i not in scores:
            result: Pair | Dropped = Dropped(silent[i])
        else:
            try:
                result = select(each, scores[i], seed=of_prompt)
            except FeedbackError as error:
                raise FeedbackError(f"prompt {prompt.id!r}: {error}") from error
        if isinstance(result, Pair):
            result, soft = label(result, scores[i], **as_dict(labels), seed=of_prompt)
        report.add(each, scores.get(i), result)
        rows += _rows(prompt, each, scores.get(i), result, soft)
    return rows, report


def _rows(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    scores: np.ndarray | None,
    result: Pair | Dropped,
    soft: float | None,
) -> Iterator[ranked.Row]:
    place = None if scores is None or np.isnan(scores).any() else ranks(scores)
    pair = dataclasses.asdict(result) if isinstance(result, Pair) else {}
    for i, candidate in enumerate(candidates):
        roles = {role: pair.get(role) == i for role in ROLES}
        roles["explore"] |= i in pair.get("explored", ())
        yield row_of(
            prompt, i, candidate, **roles,
            score=math.nan if scores is None else float(scores[i]),
            rank=None if place is None else int(place[i]),
            dropped=result.reason if isinstance(result, Dropped) else None,
            preference=soft if roles["chosen"] and soft is not None else math.nan,
        )  # fmt: skip
