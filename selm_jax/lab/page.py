"""Writes the page of a `selm lab` experiment: answer, settings, figures and numbers."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from selm_jax.lab import experiments
from selm_jax.lab.algorithms import Length
from selm_jax.lab.findings import Finding, answer, finding
from selm_jax.lab.worlds import WorldShape
from selm_jax.report import header, lab_page
from selm_jax.report.curves import Plot
from selm_jax.report.lab_page import Numbers
from selm_jax.shell.commit import commit, versions

__all__ = [
    "Made",
    "base_case",
    "caption",
    "constants",
    "described",
    "finding",
    "of_shape",
    "regret_and_slope",
    "write",
]

Record = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """How the numbers of an experiment were made; its text is the last line of every figure.

    Attributes:
      verb: the words after `selm lab`, without the seeds.
      seeds, seed: the number of worlds per setting, and the first seed.
      code: the file and the function in `selm_jax/lab`.
      world: the sizes of the worlds and of the runs, in words.
    """

    verb: str
    seeds: int
    seed: int
    code: str
    world: str

    @property
    def command(self) -> str:
        return f"selm lab {self.verb} --seeds {self.seeds} --seed {self.seed}"

    def __str__(self) -> str:
        return f"{self.command}; {self.seeds} seeds per setting; selm_jax/lab/{self.code}"

    def facts(self) -> dict[str, str]:
        now = datetime.datetime.now(datetime.UTC)
        return {
            "Command": self.command,
            "Worlds": f"{self.seeds} per setting; seed {self.seed}",
            "Sizes": self.world,
            "Code": f"selm_jax/lab/{self.code}",
            **header.code(versions(), commit()),
            "Made": now.strftime("%Y-%m-%d %H:%M UTC"),
        }


def caption(made: Made) -> str:
    """How the numbers were made, with the version of the code: below a table or a figure."""
    of, _, changed = (commit() or "unknown").partition("-")
    code = f"selm_jax {versions()['selm_jax']}, commit {of[:12]}{'-' * bool(changed)}{changed}"
    return f"{made}; {code}"


def of_shape(shape: WorldShape) -> str:
    """The sizes of a world in words."""
    features = "tabular" if shape.dimension is None else f"{shape.dimension} features"
    return f"{shape.prompts} prompts with {shape.responses} responses each, {features}"


def described(shape: WorldShape, length: Length) -> str:
    """The sizes of a world and of the runs in it, in words."""
    queries = "1 query" if length.queries == 1 else f"{length.queries} queries"
    return (
        f"{of_shape(shape)}, beta {shape.beta:g}; {length.rounds} rounds of {queries} and "
        f"{length.steps} descent steps"
    )


def base_case() -> str:
    """The base case of `experiments.conditions` in words."""
    _, shape, _, length, _ = experiments.conditions()[0]
    return f"base: {described(shape, length)}"


def write(
    file: Path,
    title: str,
    made: Made,
    found: Sequence[Finding],
    plots: Sequence[Plot] = (),
    tables: Sequence[Numbers] = (),
    more: Sequence[str] = (),
) -> None:
    """Writes the page and says where.

    `tables` stand below that of its comparisons, and the sentences `more` below its answer.
    """
    lab_page.write(
        file,
        title=title,
        answer=[*answer(found, made.seeds), *more],
        facts=made.facts(),
        plots=plots,
        tables=[_comparisons(file.stem, found), *tables],
    )
    typer.echo(f"page: {file}")


def _comparisons(name: str, found: Sequence[Finding]) -> Numbers:
    columns = (
        *("Method", "Compared with", "Where", "Difference of regret", "Difference, %"),
        *("Baseline's regret", "p (Holm)"),
    )
    rows = [
        (
            *(f.method, f.baseline, f.place),
            (f.difference.mean, f.difference.low, f.difference.high),
            *(100 * f.relative, f.base, f.p_holm),
        )
        for f in found
    ]
    return Numbers(name, "Differences of cumulative regret", columns, rows)


def regret_and_slope(records: Sequence[Record]) -> Numbers:
    """The cumulative regret of each algorithm, and its slope."""
    rows = [
        (
            *(r["algorithm"], r["landscape"], f"{r['rounds'][-1]} rounds"),
            tuple(r[end][-1] for end in ("mean", "low", "high")),
            (r["slope"], r["slope_low"], r["slope_high"]),
        )
        for r in records
    ]
    caption = "Cumulative regret, and its slope against log t (1: constant regret a round)"
    columns = ("Algorithm", "Landscape", "After", "Regret", "Slope")
    return Numbers("lab_regret_slopes", caption, columns, rows)


def constants(records: Sequence[Record]) -> Numbers:
    """The constants of the theorem, its bound, and the regret of never leaving the reference."""
    names = ("beta", "rounds", "r_max", "alpha", "bound", "worst")
    caption = "The theorem's constants (medians), its bound, and the regret of the reference"
    columns = ("beta", "Rounds", "R_max", "alpha", "Bound", "Regret of the reference")
    return Numbers(
        "lab_theory_constants", caption, columns, [[r[n] for n in names] for r in records]
    )
