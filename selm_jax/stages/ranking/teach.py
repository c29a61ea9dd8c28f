"""Takes training pairs from the data set directly, without a ranker."""

from __future__ import annotations

import math
from collections.abc import Iterable

from selm_jax.config import Data
from selm_jax.stages.ranking.candidates import OfData, row_of
from selm_jax.tables import ranked
from selm_jax.text.prompts import Prompt


def taught(
    prompts: Iterable[Prompt], of_data: OfData, data: Data
) -> tuple[list[ranked.Row], dict[str, int]]:
    """Returns (rows of all prompts whose answers can be used, counts of pairs and of drops).

    Args:
      data: names the columns with rejected answers and scores, if there are any.
    """
    columns = {"chosen": data.chosen_score}
    if data.rejected:
        columns["rejected"] = data.rejected_score
    rows, unusable = [], 0
    for prompt in prompts:
        found = [(role, of_data.candidate(prompt, role)) for role in columns]
        if not all(usable for _, (_, usable) in found):
            unusable += 1
            continue
        rows += [
            row_of(
                prompt,
                i,
                candidate,
                rank=i + 1,
                score=_score(prompt, columns[role]),
                **{role: True},
            )
            for i, (role, (candidate, _)) in enumerate(found)
        ]
    what = "pairs" if data.rejected else "answers"
    counts = {what: len(rows) // len(columns)}
    return rows, counts | {"drops": unusable, "drops/unusable_answer": unusable}


def _score(prompt: Prompt, column: str | None) -> float:
    """The score of an answer in the data; NaN if the experiment names no column for it."""
    return math.nan if column is None else prompt.row[column]  # a float: rows were checked
