"""A ranker that adds several rankers' weighted scores, each optionally rescaled per prompt.

The scales, over the candidates of one prompt:

* `none`: the ranker's own scores, unchanged.
* `zscore`: (score - mean) / standard deviation (of the population); all equal gives 0.
* `minmax`: (score - lowest) / (highest - lowest), from 0 to 1; all equal gives 1/2.
* `rank`: the share of the other candidates that it beats, a tie counting half, from 0 to 1; a
  candidate without others gets 1/2.

The last three discard how sure a ranker is: a small and a large difference between two candidates
give the same result. After them only comparisons within one prompt are meaningful.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from selm_jax.feedback.ranker import (
    FeedbackError,
    Question,
    Ranker,
    batches_of,
    build_ranker,
    check_asked,
    check_scores,
    folders_of,
    for_policy,
    is_relative,
    prompts_together,
    reported,
)
from selm_jax.shell.ranges import Range
from selm_jax.shell.words import did_you_mean

Scores = Float64[np.ndarray, " candidates"]


def none(scores: Scores) -> Scores:
    return scores


def minmax(scores: Scores) -> Scores:
    """Rescales the scores to [0, 1] over the candidates; equal scores all become 1/2."""
    if not len(scores) or scores.min() == scores.max():
        return np.full(len(scores), 0.5)
    scores = scores / np.abs(scores).max()  # so that no difference overflows
    return (scores - scores.min()) / (scores.max() - scores.min())


def zscore(scores: Scores) -> Scores:
    """Rescales the scores to mean 0 and standard deviation 1; equal scores all become 0."""
    scaled = minmax(scores)  # has the same z-scores, and no square overflows or underflows
    spread = scaled.std() if len(scores) else 0.0
    return (scaled - scaled.mean()) / spread if spread else np.zeros(len(scores))


def rank(scores: Scores) -> Scores:
    """Replaces each score by the share of other candidates that it beats; a tie counts half."""
    if len(scores) < 2:
        return np.full(len(scores), 0.5)
    wins = np.sign(scores[:, None] - scores).sum(1)  # wins - losses, against each of the others
    return (1 + wins / (len(scores) - 1)) / 2


WEIGHT = Range()  # of a part; a negative weight penalizes
SCALES: Mapping[str, Callable[[Scores], Scores]] = {
    "none": none,
    "zscore": zscore,
    "rank": rank,
    "minmax": minmax,
}


@dataclass(frozen=True)
class Part:
    """One ranker of a mixture, with its weight and the rescaling of its scores."""

    ranker: Ranker
    weight: float
    normalise: str


@dataclass(frozen=True)
class Mixture:
    """A ranker that adds the weighted scores of several rankers. Build it with `mixture`."""

    parts: tuple[Part, ...]
    name: str = "mixture"

    @property
    def relative(self) -> bool:
        return any(part.normalise != "none" or is_relative(part.ranker) for part in self.parts)

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(folder for part in self.parts for folder in folders_of(part.ranker))

    @property
    def batches(self) -> tuple[Any, ...]:
        return tuple(batch for part in self.parts for batch in batches_of(part.ranker))

    @property
    def together(self) -> int:
        return math.lcm(*(prompts_together(part.ranker) for part in self.parts))

    def for_policy(self, policy: Path, reference: Path | None) -> Mixture:
        """Returns the same mixture for an iteration's policy; see `ranker.for_policy`."""
        bound = [for_policy(part.ranker, policy, reference) for part in self.parts]
        parts = (replace(part, ranker=each) for part, each in zip(self.parts, bound, strict=True))
        return replace(self, parts=tuple(parts))

    def check(self, questions: Sequence[Question]) -> None:
        """Raises FeedbackError if a part cannot use a row."""
        for part in self.parts:
            check_asked(part.ranker, questions)

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Scores]:
        """Scores the candidates: one float64 array per question; see `ranker.Ranker`.

        Raises:
            FeedbackError: a part raised it, or a sum is not finite.
        """
        totals = [np.zeros(len(texts)) for texts in candidates]
        unread = [np.zeros(len(texts), bool) for texts in candidates]
        for part in self.parts:
            found = part.ranker.scores(questions, candidates)
            for total, gaps, scores in zip(totals, unread, found, strict=True):
                mine = np.isnan(scores)
                if mine.any() and part.normalise != "none":
                    gaps[:] = True  # the scale depends on all candidates
                    continue
                gaps |= mine
                total += part.weight * SCALES[part.normalise](scores)
        return check_scores(self.name, questions, candidates, totals, unread)

    def report(self) -> dict[str, int | float]:
        """The reports of all parts, with the prefix `NUMBER.RANKER/`; parts count from 1."""
        return {
            f"{number}.{part.ranker.name}/{key}": value
            for number, part in enumerate(self.parts, 1)
            for key, value in reported(part.ranker).items()
        }


def mixture(parts: Any) -> Mixture:
    """Makes a ranker that adds the weighted scores of several rankers.

    Args:
        parts: a list of mappings with the key `ranker` (a name or `package.module:function`) and
            optionally `settings` (the ranker's own), `weight` (1 by default; a negative weight
            penalizes) and `normalise` (`none` by default; see the top of this file).

    Raises:
        FeedbackError: there are no parts, a key or scale is unknown, a weight is not a finite
            number, or a part cannot be built; the message names the part, counted from 1.
    """
    if isinstance(parts, str | Mapping) or not isinstance(parts, Sequence) or not parts:
        raise FeedbackError(
            f"ranker 'mixture': parts is {parts!r}; expected a list of at least one mapping with "
            "the key 'ranker'."
        )
    return Mixture(tuple(_part(i, each) for i, each in enumerate(parts, 1)))


def _part(number: int, given: Any) -> Part:
    where = f"ranker 'mixture', part {number}"
    known = ("ranker", "settings", "weight", "normalise")
    if not isinstance(given, Mapping) or "ranker" not in given:
        raise FeedbackError(f"{where}: found {given!r}; expected a mapping with the key 'ranker'.")
    for key in given:
        if key not in known:
            raise FeedbackError(
                f"{where}: unknown key {key!r}{did_you_mean(str(key), known)} Expected "
                f"{', '.join(known)}."
            )
    weight = given.get("weight", 1.0)
    if (expected := WEIGHT.problem(weight)) is not None:
        raise FeedbackError(f"{where}: weight is {weight!r}; expected {expected}.")
    scale = given.get("normalise", "none")
    if scale not in SCALES:
        raise FeedbackError(
            f"{where}: normalise is {scale!r}{did_you_mean(str(scale), SCALES)} Expected one of "
            f"{', '.join(SCALES)}."
        )
    if given["ranker"] == "human":
        raise FeedbackError(
            f"{where}: ranker 'human' cannot be part of a mixture, because people may leave "
            "prompts unranked. Use it alone (ranker: human)."
        )
    try:
        return Part(
            build_ranker(given["ranker"], **given.get("settings", {})), float(weight), scale
        )
    except FeedbackError as error:
        raise FeedbackError(f"{where}: {error}") from error
