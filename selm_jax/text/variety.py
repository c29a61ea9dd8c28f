"""How varied texts are: words, and how many of their sequences are new."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A word, one sign of a script that writes without spaces, or one other visible sign.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


def words(text: str) -> list[str]:
    """The text's words, case folded; every other visible sign counts as one of them."""
    return _WORD.findall(text.casefold())


def distinct(texts: Sequence[str], n: int) -> float:
    """Different sequences of n words over all of them, of all texts, in 0..1; 0 where there is none.

    Pooled over the texts as in Li et al. 2016 (arXiv 1510.03055, section 5), who divide by the
    number of words instead; sequences in the denominator let a text without repeats reach 1.
    """
    each = [words(text) for text in texts]
    found = [tuple(w[i : i + n]) for w in each for i in range(len(w) - n + 1)]
    return len(set(found)) / len(found) if found else 0.0
