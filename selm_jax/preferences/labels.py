"""Labels as a noisy judge would give them, for studies with a gold reward."""

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
    """Says which of a pair's two responses is preferred, as a noisy judge with these scores would.

    The judge prefers the chosen one with probability 1 (`scores`)
    or sigmoid((score of chosen - score of rejected) / temperature) (`bradley_terry`; Bradley and
    Terry 1952; 1/2 for equal scores), and says the opposite with probability `flip`.

    Args:
        pair: what `select` picked.
        scores: `[candidates]`.
        temperature: in the unit of the scores, above 0.
        flip: from 0 to 1/2.
        seed: one for each prompt, as for `select`; the draw is independent of `select`'s.

    Returns:
        The pair, chosen and rejected exchanged if the judge says so, and the soft label: with what
        probability this judge prefers what is chosen now. A response paired with itself stays: 1/2.

    Raises:
        FeedbackError: an unknown kind, or a number out of its range.
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
