"""Defines what all commands of `selm lab` share: group, options, and what they print and write.

Each command prints its findings, and writes a page to NAME.html, which begins with the answer, all
numbers to NAME.json, and the figure to NAME.svg, NAME.pdf and NAME.png.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from selm_jax.shell import artifacts
from selm_jax.shell.paths import folder_to_write
from selm_jax.shell.verbs import Work, verb

app = typer.Typer(
    help="Test exploration in small worlds. The regret is computed exactly (docs/exploration.md).",
    no_args_is_help=True,
)

Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Folder for numbers and figures.", metavar="FOLDER",
        parser=folder_to_write,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """Options of `selm lab` commands: the number of worlds, the seed and the output folder."""

    seeds: Annotated[
        int,
        typer.Option(help="Number of random worlds per setting, each with its own noise.", min=2),
    ] = 128
    seed: Seed = 0
    out: Out = Path("runs/lab")


def lab_verb(name: str, arguments: str = "", files: str = "") -> Callable[[Work], Work]:
    """Makes a decorator that adds a command to `selm lab`."""
    files = files or f"lab_{name}.html, lab_{name}.json and the figure lab_{name}.svg"
    return verb(
        app, name, needs="nothing, not even an accelerator",
        writes=f"{files} into the folder of --out, and a summary to the terminal",
        example=f"selm lab {name} {arguments}--seeds 16",
    )  # fmt: skip


def collect(parts: Iterable[list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    """Collects the records of all parts, and prints the time since the start after each part."""
    records, start = [], time.monotonic()
    for part in parts:
        records += part
        typer.echo(f"{name} {part[0][name]}: {time.monotonic() - start:.0f} s", err=True)
    return records


def show(records: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    typer.echo(f"{', '.join(names)}: difference of cumulative regret [95 %], in %, Holm's p")
    for r in records:
        typer.echo(f"{', '.join(f'{r[n]}' for n in names):<40}{difference(r)}")


def difference(r: dict[str, Any]) -> str:
    return (
        f" {r['difference']:+.3f} {ends(r['low'], r['high'], '+.3f')}"
        f"{100 * r['relative']:>+8.1f} %  {r['p_holm']:.2g}"
    )


def ends(low: float | None, high: float | None, form: str) -> str:
    """Formats a confidence interval, or "(no interval)" if low is None."""
    return "(no interval)" if low is None else f"[{low:{form}}, {high:{form}}]"


def rounded(value: Any) -> Any:
    """Rounds nested floats to six digits, so that printed, plotted and written numbers agree."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def write(records: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Rounds records, writes them to a JSON file, and returns the rounded records."""
    records = rounded(records)
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
    artifacts.write_text(file, f"[\n{lines}\n]\n")
    typer.echo(f"numbers: {file}")
    return records
