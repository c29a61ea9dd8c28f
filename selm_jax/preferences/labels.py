"""Simulates the labels of a noisy judge, for studies with a gold reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

from scipy.special import expit

from selm_jax.config.kinds import LabelKind
from selm_jax.preferences.candidates import FeedbackError, Pair, check_choice
from selm_jax.preferences.selection import Scores, draws


def label(
    pair: Pair,
    scores: Scores,
    *,
    kind: str = "scores",
    temperature: float = 1.0,
    flip: float = 0.0,
    seed: int | Sequence[int] | None = None,
) -> tuple[Pair, float]:
    """Draws a noisy judge's preference between a pair's two responses, given their scores.

    The judge prefers the chosen response with probability 1 (`scores`) or
    sigmoid((score of chosen - score of rejected) / temperature) (`bradley_terry`; Bradley and Terry
    1952; 1/2 for equal scores), and reports the opposite with probability `flip`.

    Args:
        pair: the pair that `select` picked.
        scores: `[candidates]`.
        kind: `scores` or `bradley_terry`.
        temperature: above 0, in the unit of the scores.
        flip: from 0 to 1/2.
        seed: one for each prompt, as for `select`; the draw is independent of those of `select`.

    Returns:
        The pair, with chosen and rejected exchanged if the judge prefers the rejected response, and
        the soft label: the probability that this judge prefers the response now chosen. A pair of a
        response with itself stays as it is; its soft label is 1/2.

    Raises:
        FeedbackError: if the kind is unknown or a number is out of its range.
    """
    check_choice("labels.kind", kind, get_args(LabelKind))
    if not 0.0 < temperature < float("inf"):
        raise FeedbackError(f"labels.temperature is {temperature!r}; expected a number above 0.")
    if not 0.0 <= flip <= 0.5:
        raise FeedbackError(f"labels.flip is {flip!r}; expected a number from 0 to 0.5.")
    if pair.chosen == pair.rejected:
        return pair, 0.5
    gap = float(scores[pair.chosen]) - float(scores[pair.rejected])
    prefers = 1.0 if kind == "scores" else float(expit(gap / temperature))
    says = (1.0 - flip) * prefers + flip * (1.0 - prefers)
    if says == 1.0 or draws(seed, "drawing labels", 2).random() < says:
        return pair, says
    swapped = dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    return swapped, 1.0 - says
