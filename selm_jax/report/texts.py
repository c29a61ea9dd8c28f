"""Measures of a set of answers' texts: a reward that rises on collapsing answers shows here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from selm_jax.report.data import Answer

# A word, one sign of a script that writes without spaces, or one other visible sign.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


@dataclass(frozen=True)
class TextMeasures:
    """`words`: mean words per answer, signs left out. `distinct_2`: see the function.
    `different`: different texts over answers. `cut_off`: share that ran into the length limit.
    Shares lie in 0..1."""

    answers: int
    words: float
    distinct_2: float
    different: float
    cut_off: float


def words(text: str) -> list[str]:
    """The text's words, case folded; every other visible sign counts as one of them."""
    return _WORD.findall(text.casefold())


def distinct_2(texts: Sequence[str]) -> float:
    """Different word pairs over all word pairs of all texts, in 0..1; 0 where there is no pair.

    Pooled over the answers as in Li et al. 2016 (arXiv 1510.03055, section 5), who divide by the
    number of words instead; pairs in the denominator let a text without repeats reach 1.
    """
    pairs = [pair for text in texts for pair in _pairs(words(text))]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


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
        distinct_2=distinct_2(texts),
        different=len({text.strip() for text in texts}) / count,
        cut_off=sum(answer.finish == "length" for answer in answers) / count,
    )


def _pairs(tokens: list[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(tokens))
