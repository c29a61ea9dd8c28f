"""Measures how varied texts are: the share of distinct word n-grams (distinct-n)."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A word, one character of a script written without spaces, or one other visible character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


def words(text: str) -> list[str]:
    """The text's words, case folded. Each visible character outside a word counts as a word."""
    return _WORD.findall(text.casefold())


def distinct(texts: Sequence[str], n: int) -> float:
    """The number of distinct word n-grams divided by the number of all n-grams, from 0 to 1.

    It is 0 if there are no n-grams. They are pooled over all texts as in Li et al. 2016 (arXiv
    1510.03055, section 5), who divide by the number of words instead; dividing by the number of
    n-grams lets texts without repeats reach 1.
    """
    each = [words(text) for text in texts]
    found = [tuple(w[i : i + n]) for w in each for i in range(len(w) - n + 1)]
    return len(set(found)) / len(found) if found else 0.0
