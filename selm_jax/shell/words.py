"""Phrases for error messages: short lists and "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def some(words: Sequence[str], most: int = 5) -> str:
    """A list as readable text: `a, b, c, d, e and 12 more`."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the most similar of `known`, or `"."` if none is similar.

    Case is ignored.
    """
    lowered = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return f"; did you mean {lowered[near[0]]!r}?" if near else "."
