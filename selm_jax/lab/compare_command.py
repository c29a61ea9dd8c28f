"""The command `selm lab compare`: every method against plain online DPO, as one page and table."""

from __future__ import annotations

import sys
import time

import typer

from selm_jax.lab.verbs import Sampled, lab_verb, rounded, write
from selm_jax.shell import artifacts


@lab_verb(
    "compare", files="lab_compare.html, .md (the table), .json (all numbers) and the figure .svg"
)
def compare(o: Sampled) -> None:
    """Compare the methods of the field with plain online DPO.

    Each has its best strength, chosen on other worlds. Data and fit are told apart.
    """
    from selm_jax.lab import compare as contest
    from selm_jax.lab import compare_page, page, plots

    start, found = time.monotonic(), None
    for step in contest.compare(o.seeds, o.seed):
        if isinstance(step, str):
            typer.echo(f"{step}: {time.monotonic() - start:.0f} s", err=True)
        else:
            found = step
    assert found is not None
    compared = write(found.compared, o.out / "lab_compare.json")
    slopes = rounded(found.slopes)
    world = f"{page.described(contest.SHAPE, contest.LENGTH)}; other features as named"
    made = page.Made("compare", o.seeds, o.seed, "compare.py, compare", world)
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
