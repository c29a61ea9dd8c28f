"""The results of a laboratory experiment in words, and as rows of a table.

Every experiment compares methods with a baseline in several places: landscapes, conditions, noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selm_jax.report.answer import Compared
from selm_jax.report.summary import listed, number, plural
from selm_jax.statistics.intervals import Estimate

_LISTED = 4
"""How many places a sentence names; if there are more, it names the largest effect."""


@dataclass(frozen=True)
class Finding:
    """A method's cumulative regret minus its baseline's, in one place (a landscape).

    Attributes:
      method, baseline: the names of the compared algorithms.
      place: where they were compared, such as a landscape.
      difference: the mean over seeds, in units of reward, with its interval.
      relative: the difference as a share of the baseline's regret.
      base: the baseline's mean cumulative regret.
      p_holm: p after Holm's correction over all comparisons of the family.
    """

    method: str
    baseline: str
    place: str
    difference: Estimate
    relative: float
    base: float
    p_holm: float

    @property
    def differs(self) -> bool:
        return Compared(self.method, self.difference, self.p_holm).differs

    def __str__(self) -> str:
        """Such as "needle (−47 %, 95 % interval −55 to −39)": percents of the baseline's regret."""
        ends = (self.difference.low, self.difference.high)
        low, high = (None if end is None else number(100 * end / self.base) for end in ends)
        interval = "" if low is None else f", 95 % interval {low} to {high}"
        return f"{self.place} ({number(100 * self.relative, sign=True)} %{interval})"


def finding(record: dict[str, Any], method: str, baseline: str, place: str, seeds: int) -> Finding:
    """The finding of a record of `stats.compare` with its corrected p."""
    ends = (record["low"], record["high"])
    difference = Estimate(record["difference"], None, *ends, p=record["p"], seeds=seeds)
    return Finding(
        method.replace(" -", " −"), baseline, place, difference,
        record["relative"], record["base"], record["p_holm"],
    )  # fmt: skip


def answer(found: Sequence[Finding], seeds: int) -> list[str]:
    """The results in sentences: first how many comparisons are clear, then each method's.

    For example: "selm alpha=0.1, compared with DPO: less regret in needle (−47 %, 95 % interval −55
    to −39); more regret in smooth (...)."
    """
    less, more = (
        [f for f in found if f.differs and sign * f.difference.mean > 0] for sign in (-1, 1)
    )
    baselines = listed(list(dict.fromkeys(f.baseline for f in found)), "or")
    undecided = len(found) - len(less) - len(more)
    first = (
        f"{plural(len(found), 'comparison')} with {baselines}, each over {seeds} worlds: "
        f"{len(less)} with clearly less regret, {len(more)} with clearly more, "
        f"{undecided} undecided (p below 0.05 after Holm's correction counts as clear)."
    )
    groups = dict.fromkeys((f.method, f.baseline) for f in found)
    sentences, same = [], []
    for method, baseline in groups:
        mine = [f for f in found if (f.method, f.baseline) == (method, baseline)]
        parts = [
            f"{verb} {_where([f for f in mine if f in kind], len(mine))}"
            for verb, kind in (("less regret", less), ("more regret", more))
            if any(f in kind for f in mine)
        ]
        if parts:
            sentences.append(f"{method}, compared with {baseline}: {'; '.join(parts)}.")
        elif len(mine) == 1:
            sentences.append(f"{method} does not clearly differ from {baseline} in {mine[0]}.")
        else:
            same.append((method, baseline))
    for baseline in dict.fromkeys(b for _, b in same):
        methods = [m for m, b in same if b == baseline]
        sentences.append(f"Nowhere clearly different from {baseline}: {', '.join(methods)}.")
    return [first, *sentences]


def _where(clear: Sequence[Finding], places: int) -> str:
    """Where a method differs: each place, or how many and the largest effect if there are many."""
    if len(clear) <= _LISTED:
        return "in " + ", ".join(map(str, clear))
    largest = max(clear, key=lambda f: abs(f.relative))
    return f"in {len(clear)} of {places} places, most in {largest}"
