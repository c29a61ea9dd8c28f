"""Measures of a set of answers' texts: a reward that rises on collapsing answers shows here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selm_jax.report.data import Answer
from selm_jax.text.variety import distinct, words


@dataclass(frozen=True)
class TextMeasures:
    """`words`: mean words per answer, signs left out. `distinct_2`: see `distinct`.
    `different`: different texts over answers. `cut_off`: share that ran into the length limit.
    Shares lie in 0..1."""

    answers: int
    words: float
    distinct_2: float
    different: float
    cut_off: float


def measure(answers: Sequence[Answer]) -> TextMeasures:
    """Raises ValueError for no answers: their mean has no value."""
    if not answers:
        raise ValueError("no answers to measure; expected at least one")
    texts = [answer.text for answer in answers]
    count = len(answers)
    length = sum(word[0].isalnum() for text in texts for word in words(text))
    return TextMeasures(
        answers=count,
        words=length / count,
        distinct_2=distinct(texts, 2),
        different=len({text.strip() for text in texts}) / count,
        cut_off=sum(answer.finish == "length" for answer in answers) / count,
    )
