"""Writes a comparison's result in words: which runs or methods differ from the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selm_jax.report.data import RunData
from selm_jax.report.summary import listed, number, p_value, paired_difference, plural, rankers_of
from selm_jax.statistics.intervals import Estimate
from selm_jax.statistics.multiple import holm

_LEVEL = 0.05


@dataclass(frozen=True)
class Compared:
    """The comparison of one run or method with the baseline.

    Attributes:
      name: the name of the run or method.
      difference: its score minus the baseline's.
      p_holm: p after Holm's correction; None if there was no test.
    """

    name: str
    difference: Estimate
    p_holm: float | None

    @property
    def differs(self) -> bool:
        return self.p_holm is not None and self.p_holm < _LEVEL

    def __str__(self) -> str:
        d = self.difference
        if d.low is None and d.mean == 0:
            return f"{self.name} 0, the same score for every prompt"
        interval = f", 95 % interval {number(d.low)} to {number(d.high)}"
        p = "" if self.p_holm is None else f", p {p_value(self.p_holm)}"
        return f"{self.name} {number(d.mean, sign=True)}{interval if d.low is not None else ''}{p}"


def of_runs(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Writes in words which of several runs differ from the first one in held-out reward."""
    if (rankers := len(rankers_of(runs))) > 1:
        return (
            f"The runs were scored by {rankers} different rankers, so their rewards cannot be "
            "compared."
        )
    found = [paired_difference(runs[0], run) for run in runs[1:]]
    return sentence(labels[0], with_holm(list(zip(labels[1:], found, strict=True))), seeds=1)


def with_holm(found: Sequence[tuple[str, Estimate | None]]) -> list[Compared]:
    """Drops comparisons without an estimate, and applies Holm's correction to all p values."""
    made = [(name, each) for name, each in found if each is not None]
    p = {i: each.p for i, (_, each) in enumerate(made) if each.p is not None}
    adjusted = dict(zip(p, holm(np.array(list(p.values()), float)).tolist(), strict=True))
    return [Compared(name, each, adjusted.get(i)) for i, (name, each) in enumerate(made)]


def sentence(baseline: str, compared: Sequence[Compared], seeds: int) -> str:
    """Writes the results of comparisons with a baseline in sentences.

    For example: "Neither selm nor mine differs from dpo at 2 seeds (selm −0.02, 95 % interval −0.1
    to 0.06, p 1; ...)." A difference counts if p is below 0.05 after Holm's correction.
    """
    if not compared:
        return f"There is nothing to compare with {baseline} yet: no shared prompt has scores."
    at = f"at {plural(seeds, 'seed')}"
    clear = [each for each in compared if each.differs]
    same = [each for each in compared if not each.differs]
    parts = []
    for each in clear:
        way = "better" if each.difference.mean > 0 else "worse"
        parts.append(f"{each.name} is {way} than {baseline} {at} ({_numbers([each])}).")
    if same:
        also = " clearly" if clear else ""
        names = [each.name for each in same]
        who = names[0] if len(names) == 1 else _none_of(names)
        does = "does not differ" if len(names) == 1 else "differs"
        parts.append(f"{who} {does}{also} from {baseline} {at} ({_numbers(same)}).")
    text = " ".join(parts)
    if seeds == 1:
        text += " With one seed, this result generalizes to other prompts, but not to other seeds."
    return text


def _none_of(names: Sequence[str]) -> str:
    if len(names) == 2:
        return f"Neither {names[0]} nor {names[1]}"
    return f"None of {listed(names)}"


def _numbers(compared: Sequence[Compared]) -> str:
    if len(compared) == 1:
        return str(compared[0]).removeprefix(f"{compared[0].name} ")
    return "; ".join(map(str, compared))
