"""Makes tables of the measurements, remarks on them, and verdicts about the goals."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from versus.contestants import ALL, BARS, Bar, Comparison
from versus.process import Measured

from selm_jax.bench.limits import cpu_name

QUIET = 0.15  # spread of a contestant's rates above which the run is called not quiet

HEADS = (
    "comparison", "contestant", "s/step, median (min-max)", "speed at the median",
    "scoring the reference, s", "peak RSS, MiB", "matmul around steps, GFLOP/s",
    "useful GFLOP/step", "of the matmul rate",
)  # fmt: skip
BAR_HEADS = ("bar", "wanted", "measured", "per round", "at equal matmul rates", "verdict")


@dataclass(frozen=True)
class Result:
    """The results of a comparison: its contestants' measurements and useful GFLOP per step."""

    comparison: Comparison
    found: dict[str, Measured]
    gflop: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    bar: Bar
    ratio: float | None  # None: a contestant was left out
    spread: tuple[float, float] | None = None  # over rounds
    even: float | None = None  # with each contestant's seconds times its own matmul rate

    @property
    def text(self) -> str:
        if self.ratio is None:
            return "left out"
        met = self.ratio >= self.bar.wanted
        if self.bar.quantity == "memory":
            met = self.ratio <= self.bar.wanted
        return "met" if met else "NOT MET"


def judge(result: Result) -> list[Verdict]:
    """Judges whether the results of a comparison meet its goals."""
    return [_judge(bar, result.found) for bar in BARS if bar.kind == result.comparison.kind]


def _judge(bar: Bar, found: dict[str, Measured]) -> Verdict:
    if bar.ours not in found or bar.theirs not in found:
        return Verdict(bar, None)
    ours, theirs = found[bar.ours], found[bar.theirs]
    if bar.quantity == "memory":
        return Verdict(bar, ours.peak / theirs.peak)
    rounds = [t / o for o, t in zip(ours.seconds, theirs.seconds, strict=True)]
    ratio = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
    return Verdict(bar, ratio, (min(rounds), max(rounds)), _products(theirs) / _products(ours))


def _products(m: Measured) -> float:
    """The median step time times the rate of the contestant's own matrix product (GFLOP)."""
    return statistics.median(s * rate for s, rate in zip(m.seconds, m.rates, strict=True))


def spread(values: Sequence[float], digits: int = 2) -> str:
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def rows(result: Result, examples: int, response: int) -> list[list[str]]:
    """Makes a table row for each contestant; `response` is the length of a generated answer."""
    out, comparison = [], result.comparison
    for key in comparison.contestants:
        m = result.found.get(key)
        head = [comparison.title, ALL[key].title]
        if m is None:
            out.append([*head, "left out", *[""] * (len(HEADS) - 3)])
            continue
        per_step = comparison.prompts * response or examples
        rate = per_step / statistics.median(m.seconds)
        speed = f"{rate:.{0 if comparison.prompts else 3}f} {comparison.unit}/s"
        gflop = result.gflop[key]
        out.append(
            [
                *head, spread(m.seconds), speed, spread(m.scoring) if m.scoring else "",
                f"{m.peak:.0f}", spread(m.gflops, 0), f"{gflop:.0f}",
                f"{gflop / _products(m):.0%}",
            ]
        )  # fmt: skip
    return out


def bar_rows(comparison: Comparison, verdicts: list[Verdict]) -> list[list[str]]:
    out = []
    for v in verdicts:
        sign = "at most" if v.bar.quantity == "memory" else "at least"
        title = v.bar.title + (f", {comparison.prompts} prompts" if comparison.prompts else "")
        measured = "" if v.ratio is None else f"{v.ratio:.2f}"
        per_round = "" if v.spread is None else f"{v.spread[0]:.2f}-{v.spread[1]:.2f}"
        even = "" if v.even is None else f"{v.even:.2f}"
        out.append([title, f"{sign} {v.bar.wanted:g}", measured, per_round, even, v.text])
    return out


def markdown(heads, body) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def show(title: str, heads, body) -> None:
    table = Table(*heads, title=title)
    for row in body:
        table.add_row(*row)
    Console(width=max(160, Console().width)).print(table)


def loss_difference(found: dict[str, Measured]) -> float | None:
    """The largest difference between our losses and those of the authors' recipe."""
    if "authors" not in found or "selm" not in found:
        return None
    both = zip(found["selm"].steps, found["authors"].steps, strict=True)
    return max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in both)


def notes(results: Sequence[Result], work: str) -> list[str]:
    """The remarks that are printed below the tables; `work` describes the steps."""
    versions = {}
    for result in results:
        for m in result.found.values():
            versions |= m.about["versions"]
    machine = (
        f"Machine: {os.cpu_count()} CPUs, {cpu_name()}. Python {platform.python_version()}. "
        + ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
        + "."
    )
    scoring = (
        "Our steps and those of TRL with a precomputed reference read stored log-probabilities. "
        "Computing them takes one forward pass over each example, once per iteration, which is not "
        "part of the step: it is measured separately as scoring."
    )
    return [work, machine, scoring, *_scoring_included(results), noise(results)]


def _scoring_included(results: Sequence[Result]) -> list[str]:
    found = next((r.found for r in results if r.comparison.kind == "SELM"), {})
    if (worst := loss_difference(found)) is None:
        return []
    whole = map(sum, zip(found["selm"].seconds, found["selm"].scoring, strict=True))
    ratio = statistics.median(found["authors"].seconds) / statistics.median(whole)
    return [
        f"Including scoring, SELM with three distinct responses is {ratio:.2f} times as fast as "
        + f"the authors' recipe. Their losses differ by at most {worst:.1e} in any round."
    ]


def noise(results: Sequence[Result]) -> str:
    """Says whether the machine was quiet, by the spread of each contestant's matmul rate."""
    spreads = {
        f"{ALL[key].title} ({r.comparison.title})": max(m.rates) / min(m.rates) - 1
        for r in results
        for key, m in r.found.items()
    }
    name = max(spreads, key=spreads.__getitem__)
    if spreads[name] <= QUIET:
        return f"Quiet: no contestant's matmul rate varies by more than {spreads[name]:.0%}."
    return (
        f"NOT QUIET: the matmul rate around the steps of {name} varies by {spreads[name]:.0%}, "
        f"more than {QUIET:.0%}. Measure again on an idle machine."
    )
