"""Computes the agreement between annotators, and one score per answer from their rankings."""

from __future__ import annotations

from collections.abc import Sequence

import krippendorff
import numpy as np
from jaxtyping import Float64

from selm_jax.annotate.store import Judgement


def shares(ranks: Sequence[int]) -> Float64[np.ndarray, " answers"]:
    """The share of the other answers that each answer beats, from 0 to 1; a tie counts as half.

    Args:
        ranks: the ranks of at least two answers; 1 is best.
    """
    place = np.asarray(ranks)
    wins = np.sign(place - place[:, None]).sum(1)  # wins - losses
    return (1 + wins / (len(place) - 1)) / 2


def mean_shares(judgements: Sequence[Judgement]) -> Float64[np.ndarray, " answers"]:
    """Each answer's share of the others that it beats, averaged over annotators (Borda count)."""
    return np.mean([shares(j.ranks) for j in judgements if j.ranks is not None], axis=0)


def alpha(judgements: Sequence[Judgement]) -> float | None:
    """Krippendorff's alpha of rankings: 1 is full agreement, 0 is agreement by chance.

    The units are the answers of all questions, and their values are the shares from `shares`, so
    the order of the answers in a file has no effect. There is no interval, because the values of a
    ranking depend on each other.

    Source: Krippendorff (2018), "Content Analysis", 4th edition, chapter 12, for ordinal data.

    Returns:
        Alpha, or None if no question was ranked by two people, or if all values are equal.
    """
    ranked = [(j.annotator, j.question, shares(j.ranks)) for j in judgements if j.ranks is not None]
    people = {name: n for n, name in enumerate(dict.fromkeys(name for name, _, _ in ranked))}
    answers = {question: len(of_each) for _, question, of_each in ranked}
    first = dict(zip(answers, np.cumsum([0, *answers.values()]), strict=False))  # unit by question
    values = np.full((len(people), sum(answers.values())), np.nan)
    for name, question, of_each in ranked:
        start = first[question]
        values[people[name], start : start + len(of_each)] = of_each
    compared = values[:, (~np.isnan(values)).sum(0) > 1]
    if not compared.size or len(np.unique(compared[~np.isnan(compared)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=compared, level_of_measurement="ordinal"))
