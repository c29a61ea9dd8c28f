"""The command `selm lab acquire`: rules for which prompts to ask about, against random ones."""

from __future__ import annotations

import sys

from selm_jax.lab.verbs import Sampled, collect, lab_verb, write
from selm_jax.shell import artifacts

_CONTROLS = {
    "random": "random prompts",
    "random_distinct": "random prompts with two different responses",
}


@lab_verb(
    "acquire", files="lab_acquire.html, .md (the table), .json (all numbers) and the figure .svg"
)
def acquire(o: Sampled) -> None:
    """Compare acquisition rules by regret.

    Each round draws a pool of plain online DPO's pairs, and a rule chooses a quarter of them, which
    are labelled. The rules are those of feedback.acquisition, except that d_optimal uses the
    world's own features. A random choice is the control; another is a random choice among pairs of
    two different responses.
    """
    from selm_jax.lab import acquire as rules
    from selm_jax.lab import compare_page, page, plots

    found = rules.correct(collect(rules.compare(o.seeds, o.seed), "landscape"))
    compared = write(found, o.out / "lab_acquire.json")
    world = f"{page.described(rules.SHAPE, rules.LENGTH)}, of {rules.POOL}; other features as named"
    made = page.Made("acquire", o.seeds, o.seed, "acquire.py, compare", world)
    plot = plots.panels(
        rules.against(compared, "random"), "condition", "arm", "landscape",
        o.out / "lab_acquire.svg", page.caption(made), "random prompts",
    )  # fmt: skip
    text = compare_page.of_controls(compared)
    artifacts.write_text(o.out / "lab_acquire.md", f"{text}\n{page.caption(made)}\n")
    sys.stdout.write(text)
    shown = [
        page.finding(
            r, r["arm"], _CONTROLS[r["control"]], f"{r['landscape']}, {r['condition']}", o.seeds
        )
        for r in compared
    ]
    title = "Which prompts to ask about?"
    page.write(o.out / "lab_acquire.html", title, made, shown, [plot])
