"""The command `selm lab compare`: every method against plain online DPO, as one page and table."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Annotated

import typer

from selm_jax.lab.verbs import Sampled, lab_verb, rounded, write
from selm_jax.shell import artifacts


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The options of `selm lab compare`."""

    conditions: Annotated[
        str | None,
        typer.Option(help="'base' and others, such as 'base,thin coverage'.", show_default="all"),
    ] = None
    sampled: Sampled


@lab_verb(
    "compare", files="lab_compare.html, .md (the table), .json (all numbers) and the figure .svg"
)
def compare(options: Compared) -> None:
    """Compare methods with online DPO.

    The methods are those of the field. Each has its best strength, chosen on other worlds. Data
    and fit are told apart.
    """
    from selm_jax.lab import compare as contest
    from selm_jax.lab import compare_page, page, plots

    o, asked = options.sampled, options.conditions
    names = [each.strip() for each in (asked or ",".join(contest.CONDITIONS)).split(",")]
    if unknown := [name for name in names if name not in contest.CONDITIONS]:
        known = ", ".join(contest.CONDITIONS)
        raise typer.BadParameter(
            f"the condition {unknown[0]!r} is unknown; expected some of {known}"
        )
    if "base" not in names:
        raise typer.BadParameter(
            f"the table shows the condition 'base', and {asked!r} lacks it; "
            f"use --conditions 'base,{asked}'"
        )
    places = [place for place in contest.PLACES if place.condition in names]
    start, found = time.monotonic(), None
    for step in contest.compare(o.seeds, o.seed, places=places):
        if isinstance(step, str):
            typer.echo(f"{step}: {time.monotonic() - start:.0f} s", err=True)
        else:
            found = step
    assert found is not None
    compared = write(found.compared, o.out / "lab_compare.json")
    slopes = rounded(found.slopes)
    world = f"{page.described(contest.SHAPE, contest.LENGTH)}; other features as named"
    verb = "compare" + (f" --conditions '{asked}'" if asked else "")
    made = page.Made(verb, o.seeds, o.seed, "compare.py, compare", world)
    best = [r for r in compared if r["effect"] == "best"]
    plot = plots.panels(
        best, "condition", "arm", "landscape", o.out / "lab_compare.svg", page.caption(made),
        "online DPO",
    )  # fmt: skip
    text = compare_page.markdown(compared)
    artifacts.write_text(o.out / "lab_compare.md", f"{text}\n{page.caption(made)}\n")
    sys.stdout.write(text)
    shown = [
        page.finding(r, r["arm"], "online DPO", f"{r['landscape']}, {r['condition']}", o.seeds)
        for r in best
    ]
    page.write(
        o.out / "lab_compare.html", "Which method explores?", made, shown, [plot],
        compare_page.numbers(compared, slopes), compare_page.sentences(compared),
    )  # fmt: skip
