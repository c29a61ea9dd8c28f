"""The table of `selm lab compare`, as text for a document and as rows of its page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selm_jax.lab.arms import ARMS, Arm
from selm_jax.lab.stats import Record
from selm_jax.lab.worlds import LANDSCAPES
from selm_jax.report.lab_page import Numbers

_SURE = 0.05
_ARMS = {arm.name: arm for arm in ARMS}


def counts(records: Sequence[Record]) -> tuple[int, int]:
    """In how many places regret is significantly lower, and in how many it is higher."""
    sure = [r["difference"] for r in records if r["p_holm"] < _SURE]
    return sum(d < 0 for d in sure), sum(d > 0 for d in sure)


def rows(compared: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of the table: a method in each row.

    A landscape's cell is the difference in its base condition, in % of DPO's regret, with * if it
    is significant ("–" if a run diverged), and then in how many of its conditions regret is lower /
    higher, if there are several.
    """
    landscapes = [name for name in LANDSCAPES if any(r["landscape"] == name for r in compared)]
    columns = [
        "method",
        *landscapes,
        "all",
        "one strength for all",
        "the data alone",
        "the fit alone",
    ]
    return columns, [_row(name, compared, landscapes) for name in _names(compared)]


def _names(compared: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r["arm"] for r in compared))


def _row(name: str, compared: Sequence[Record], landscapes: Sequence[str]) -> list[str]:
    of = {e: [r for r in compared if (r["arm"], r["effect"]) == (name, e)] for e in _EFFECTS}
    one = ""
    if of["one"]:
        one = f"{_plain(of['one'][0]['strength'])}: {_pair(of['one'])}"
    if of["data"]:
        apart = [_pair(of["data"]), _pair(of["fit"])]
    else:
        apart = ["all of it", "none of it"]
    cells = [_cell([r for r in of["best"] if r["landscape"] == each]) for each in landscapes]
    return [name, *cells, _pair(of["best"]), one, *apart]


_EFFECTS = ("best", "one", "data", "fit")


def _pair(records: Sequence[Record]) -> str:
    return "{} / {}".format(*counts(records))


def _cell(records: Sequence[Record]) -> str:
    base = next(r for r in records if r["condition"] == "base")
    if math.isnan(base["relative"]):
        found = "–"
    else:
        star = "*" if base["p_holm"] < _SURE else ""
        found = f"{round(100 * base['relative']):+d} %{star}".replace("-", "−")
    return f"{found}, {_pair(records)}" if len(records) > 1 else found


def by_landscape(compared: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a comparison that has neither strengths nor separate fits."""
    columns, lines = rows(compared)
    end = columns.index("all") + 1
    return columns[:end], [line[:end] for line in lines]


def of_controls(compared: Sequence[Record]) -> str:
    """A table in Markdown, as `by_landscape` has it, for each control that records name."""
    tables = []
    for control in dict.fromkeys(r["control"] for r in compared):
        (_, *columns), lines = by_landscape([r for r in compared if r["control"] == control])
        tables.append(in_markdown([f"against `{control}`", *columns], lines))
    return "\n".join(tables)


def markdown(compared: Sequence[Record]) -> str:
    """The table in Markdown."""
    return in_markdown(*rows(compared))


def in_markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of methods in Markdown, with their names as code."""
    lines = [[f"`{line[0]}`", *(cell.replace("*", "\\*") for cell in line[1:])] for line in lines]
    head = [list(columns), ["---"] * len(columns)]
    return "".join("| " + " | ".join(line) + " |\n" for line in [*head, *lines])


def where(compared: Sequence[Record], name: str) -> tuple[str, str]:
    """In which landscapes a method has less regret, and in which more.

    Such as "needle 7, wrong 5" and "smooth 6", with numbers of conditions if there are several. A
    method that the laboratory lacks has "–" twice.
    """
    mine = [r for r in compared if (r["arm"], r["effect"]) == (name, "best")]
    if not mine:
        return "–", "–"
    by = {each: [r for r in mine if r["landscape"] == each] for each in LANDSCAPES}
    found = [
        ", ".join(
            f"{each} {n}" if len(records) > 1 else each
            for each, records in by.items()
            if (n := counts(records)[i])
        )
        for i in (0, 1)
    ]
    return found[0] or "nowhere", found[1] or "nowhere"


def sentences(compared: Sequence[Record]) -> list[str]:
    """Says what the other effects show together, after the answer about the best strengths."""
    texts = {
        "one": "With one strength for all places instead of each place's own",
        "data": "Where only the policy that asks is bent (the data alone)",
        "fit": "Where only the policy that is judged is bent (the fit alone)",
    }
    return [
        f"{text}: of {len(those)} comparisons {counts(those)[0]} have clearly less regret and "
        f"{counts(those)[1]} clearly more."
        for effect, text in texts.items()
        if (those := [r for r in compared if r["effect"] == effect])
    ]


def numbers(compared: Sequence[Record], slopes: Sequence[Record]) -> list[Numbers]:
    """The tables of the page, below that of all comparisons."""
    columns, lines = rows(compared)
    return [
        Numbers(
            "lab_compare_methods",
            "Each method against plain online DPO: % in the base condition (* significant), and in "
            "how many conditions regret is lower / higher",
            columns, lines,
        ),
        Numbers(
            "lab_compare_what", "What each method changes, and the strengths it was tried at",
            ("Method", "What it changes", "Strengths"),
            [(a.name, a.what, _strengths(a)) for n in _names(compared) if (a := _ARMS.get(n))],
        ),
        Numbers(
            "lab_compare_apart", "The data alone, the fit alone, and the same strength everywhere",
            ("Effect", "Method", "Place", "Strength", "Difference, %", "p (Holm)"),
            [
                (r["effect"], r["arm"], f"{r['landscape']}, {r['condition']}", r["strength"],
                 _percent(r), r["p_holm"])
                for r in compared if r["effect"] != "best"
            ],
        ),
        Numbers(
            "lab_compare_slopes",
            "Slope of log cumulative regret against log t, base condition (1: no progress)",
            ("Method", "Landscape", "Slope"),
            [
                (r["arm"], r["landscape"], (r["slope"], r["slope_low"], r["slope_high"]))
                for r in slopes
            ],
        ),
    ]  # fmt: skip


def _strengths(arm: Arm) -> str:
    return ", ".join(map(_plain, arm.strengths)) if len(arm.strengths) > 1 else ""


def _plain(strength: float) -> str:
    return f"{strength:g}".replace("-", "−")


def _percent(r: Record) -> tuple[float | None, float | None, float | None]:
    low, high = (None if r[end] is None else 100 * r[end] / r["base"] for end in ("low", "high"))
    return 100 * r["relative"], low, high
