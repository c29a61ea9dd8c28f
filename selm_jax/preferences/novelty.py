"""Count bonuses: how rare an explored answer is among those of its iteration.

Answers are counted by a hash of their tokens (SimHash, as in arXiv 1611.04717): every pair of
neighbouring tokens votes, with a fixed sign of its own, on each bit of the code, so that answers
that share most pairs mostly share the code. An answer's bonus is 1 / sqrt(n), where n explored
answers have its code. COPO (arXiv 2501.12735) estimates the same number with a network.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from selm_jax.objectives.roles import EXPLORE
from selm_jax.preferences.examples import Example, Ids


def with_bonuses(examples: Sequence[Example], bits: int) -> list[Example]:
    """The examples with the count bonus of what they explore, the mean if several answers explore.

    >>> pairs = [Example.of(f"p{i}", (1,), {"explore": ids}) for i, ids in enumerate(
    ...     [(5, 6, 2), (5, 6, 2), (5, 6, 2), (5, 6, 2), (9, 8, 7, 2)])]
    >>> [example.bonus for example in with_bonuses(pairs, bits=32)]
    [0.5, 0.5, 0.5, 0.5, 1.0]
    """
    explored = [[e.responses[i] for i in e.playing(EXPLORE)] for e in examples]
    codes = [[_code(answer, bits) for answer in answers] for answers in explored]
    count = Counter(code for each in codes for code in each)
    return [
        dataclasses.replace(e, bonus=float(np.mean([count[code] ** -0.5 for code in each])))
        for e, each in zip(examples, codes, strict=True)
    ]


def _code(answer: Ids, bits: int) -> int:
    """The SimHash of an answer, a number of `bits` bits."""
    ids = np.array((0, *answer), np.uint64) + np.uint64(1)  # so that one token is a pair as well
    mixed = _mixed(_mixed(ids[:-1]) + ids[1:])
    votes = (mixed[:, None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    return sum(1 << i for i, share in enumerate(votes.mean(axis=0)) if share > 0.5)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing of 64-bit numbers: each bit of the result depends on all bits of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
