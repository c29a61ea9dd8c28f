"""Computes text statistics of answers, which show whether a rising reward hides a collapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selm_jax.report.data import Answer
from selm_jax.text.variety import distinct, words


@dataclass(frozen=True)
class TextMeasures:
    """Text statistics of a set of answers: length, variety and share cut off.

    Attributes:
      answers: number of answers.
      words: mean number of words per answer, without punctuation.
      distinct_2: see `text.variety.distinct`.
      different: number of different texts divided by the number of answers, from 0 to 1.
      cut_off: share of answers that reached the length limit, from 0 to 1.
    """

    answers: int
    words: float
    distinct_2: float
    different: float
    cut_off: float


def measure(answers: Sequence[Answer]) -> TextMeasures:
    """Computes text statistics of answers. Raises ValueError if there are none."""
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
