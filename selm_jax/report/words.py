"""Finds the words whose frequencies differ most between iterations, or between methods."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from selm_jax.report.data import Answer, RunData
from selm_jax.text.variety import words

_SHOWN = 12
_CLEAR = 1.96


@dataclass(frozen=True)
class Change:
    """A word, its count per 1000 words before and after, and the z value of the change."""

    word: str
    before: float
    after: float
    z: float


@dataclass(frozen=True)
class Changes:
    """The words that one set of texts uses more or less often than another, by decreasing |z|."""

    title: str
    more: Sequence[Change]
    less: Sequence[Change]


def changes(title: str, before: Sequence[str], after: Sequence[str]) -> Changes:
    """Compares the word frequencies of two sets of texts.

    z is the log-odds ratio divided by its standard deviation, with an informative Dirichlet prior
    from both sets (Monroe, Colaresi and Quinn, Political Analysis 16, 2008, equations 15 to 22).
    Words with |z| up to 1.96 are left out. z is a guide for reading, not a test.
    """
    one, two = (_counts(texts) for texts in (before, after))
    n, m = one.total(), two.total()
    if not n or not m:
        return Changes(title, (), ())
    prior = one + two
    total = prior.total()
    scale = min(total, 500) / total
    found = []
    for word, count in prior.items():
        a = count * scale
        rest = total * scale - a
        if rest <= 0:
            continue  # this is the only word in both sets
        y, x = two[word] + a, one[word] + a
        odds = math.log(y / (m - two[word] + rest)) - math.log(x / (n - one[word] + rest))
        z = odds / math.sqrt(1 / y + 1 / x)
        if abs(z) > _CLEAR:
            found.append(Change(word, 1000 * one[word] / n, 1000 * two[word] / m, z))
    found.sort(key=lambda each: (-each.z, each.word))
    more = [each for each in found if each.z > 0][:_SHOWN]
    return Changes(title, more, [each for each in reversed(found) if each.z < 0][:_SHOWN])


def of_page(runs: Sequence[RunData], labels: Sequence[str]) -> list[Changes]:
    """Compares word use in each run's last iteration with its first and with run 1's last."""
    found = []
    for run, label in zip(runs, labels, strict=True):
        ts = sorted({a.iteration for a in run.answers})
        if len(ts) > 1:
            title = f"{label}: iteration {ts[-1]} against iteration {ts[0]}"
            found.append(changes(title, _texts(run, ts[0]), _texts(run, ts[-1])))
    last = [max((a.iteration for a in run.answers), default=0) for run in runs]
    for run, label, t in list(zip(runs, labels, last, strict=True))[1:]:
        if run.answers and runs[0].answers:
            title = f"{label} against {labels[0]}, each after its last iteration"
            found.append(changes(title, _texts(runs[0], last[0]), _texts(run, t)))
    return found


def _texts(run: RunData, t: int) -> list[str]:
    answers: list[Answer] = [a for a in run.answers if a.iteration == t]
    return [a.text for a in answers]


def _counts(texts: Sequence[str]) -> Counter[str]:
    return Counter(word.lower() for text in texts for word in words(text) if word[0].isalnum())
