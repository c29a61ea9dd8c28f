"""Writes parts of messages: short lists, 'did you mean', commands, durations, and sizes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def some(words: Sequence[str], most: int = 5) -> str:
    """Writes a list as readable text, such as `a, b, c, d, e and 12 more`."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the most similar of `known`, or `"."` if none is similar.

    Case is ignored.
    """
    lowered = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return f"; did you mean {lowered[near[0]]!r}?" if near else "."


def redo(iteration: Path, stage: str) -> str:
    """The command that runs a stage again, given the folder of its iteration."""
    return f"`selm redo {iteration.parent} {stage} -t {iteration.name.removeprefix('iteration_')}`"


def duration(seconds: float) -> str:
    """A duration in words: `40 s`, `12 min`, `3 h 20 min`, `2 days 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


def sizes_in_words(chosen: Mapping[str, Any], because: str, lowered: Iterable[str] = ()) -> str:
    """The sizes that a run chose, for what, and what it then gave up, in one line.

    >>> sizes_in_words({"rollout.slots": 8}, "9 answers", ["generate ran out of memory"])
    'rollout.slots 8 (9 answers); generate ran out of memory'
    """
    each = ", ".join(f"{key} {value}" for key, value in chosen.items())
    return "; ".join([*([f"{each} ({because})"] if chosen else []), *lowered])
