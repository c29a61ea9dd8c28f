"""Compares the middle world's runs with the laboratory's predictions, in a table and a figure.

    PYTHONPATH=. python -m experiments.middle.results

reads the finished runs of the two sweeps, and writes docs/images/middle_world.json (a record for
each run) and middle_world.svg, and the tables of docs/middle_world.md. With `--drawn` it reads no
runs: the figure and the tables are made again from the records in docs/images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.middle import language
from selm_jax.lab import stats
from selm_jax.report.drawing import COLOURS, MUTED, drawings
from selm_jax.shell import artifacts
from selm_jax.sweep.grid import Member, read_sweep
from selm_jax.tables import heldout

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
RECORDS = DOCS / "images" / "middle_world.json"
LAB = DOCS / "images" / "lab_compare.json"
BASELINE = "dpo"
IN_LAB = {  # the laboratory's name of each method
    "dpo_half_beta": "dpo_other_beta",
    "selm": "selm",
    "vpo": "vpo",
    "se_popo": "se_popo",
    "geb": "geb_complement",
    "ipo_online": "ipo_online",
    "best_of_4": "best_of_4",
}
NO_DIFFERENCE = "no clear difference"
Record = dict[str, Any]


def read_runs() -> list[Record]:
    """A record of each run, of the seeds for which all methods of a landscape are finished."""
    found = []
    for landscape in language.LANDSCAPES:
        members = read_sweep(HERE / f"{landscape}.yaml").members
        done = {(m.cell.name, m.seed): record(landscape, m) for m in members if _is_done(m)}
        methods = {m.cell.name for m in members}
        whole = {s for _, s in done if all((method, s) in done for method in methods)}
        found += [each for (_, seed), each in done.items() if seed in whole]
    return found


def _is_done(member: Member) -> bool:
    last = Path(member.experiment.output) / f"iteration_{member.experiment.iterations}"
    return last.exists() and artifacts.Stages(last).read().get("evaluate", {}).get("done", False)


def record(landscape: str, member: Member) -> Record:
    """Reads a run's held-out answers into lists with a number for the start and each iteration.

    The regret of a policy is the optimum (`language.best_value`) minus its mean reward, plus beta
    times its KL from the start model; both are estimated from the answers sampled from it.
    """
    numbers: dict[str, list[float]] = {"regret": [], "reward": [], "kl": [], "greedy": []}
    for t in range(member.experiment.iterations + 1):
        rows = heldout.read(Path(member.experiment.output) / f"iteration_{t}" / "heldout.parquet")
        sampled = [row for row in rows if row.kind == "sample"]
        best = language.best_value(landscape)
        towns = [language.TOWNS.index(language.read(row.prompt).town) for row in sampled]
        reward = float(np.mean([row.score for row in sampled]))
        kl = float(np.mean([row.logp - row.logp_start for row in sampled]))
        numbers["regret"].append(float(best[towns].mean()) - reward + language.BETA * kl)
        numbers["reward"].append(reward)
        numbers["kl"].append(kl)
        numbers["greedy"].append(float(np.mean([r.score for r in rows if r.kind == "greedy"])))
    rounded = {k: [float(f"{x:.6g}") for x in each] for k, each in numbers.items()}
    return {"landscape": landscape, "method": member.cell.name, "seed": member.seed} | rounded


def totals(records: Sequence[Record], landscape: str, method: str) -> np.ndarray:
    """The cumulative regret of each of a method's runs, over all iterations, by seed."""
    mine = [r for r in records if (r["landscape"], r["method"]) == (landscape, method)]
    mine.sort(key=lambda r: r["seed"])
    return np.array([sum(r["regret"][1:]) for r in mine])


def compare(records: Sequence[Record]) -> list[Record]:
    """The methods' paired differences from DPO, corrected over all of them (Holm)."""
    compared = []
    for landscape in language.LANDSCAPES:
        base = totals(records, landscape, BASELINE)
        for method in IN_LAB:
            own = totals(records, landscape, method)
            about = {"landscape": landscape, "method": method, "seeds": len(own)}
            compared.append(about | stats.compare(own, base))
    return stats.correct(compared)


def predictions() -> dict[tuple[str, str], Record]:
    """The laboratory's comparisons in its base condition, by landscape and method."""
    of_lab = {
        (r["landscape"], r["arm"]): r
        for r in json.loads(LAB.read_text(encoding="utf-8"))
        if r["effect"] == "best" and r["condition"] == "base"
    }
    pairs = [(landscape, method) for landscape in language.LANDSCAPES for method in IN_LAB]
    return {(place, method): of_lab[place, IN_LAB[method]] for place, method in pairs}


def said(comparison: Mapping[str, Any]) -> str:
    """Says whether a method has less regret than DPO, more, or no clear difference."""
    if comparison["p_holm"] >= 0.05:
        return NO_DIFFERENCE
    return "less" if comparison["difference"] < 0 else "more"


def verdict(predicted: str, found: str) -> str:
    """Says what became of a prediction.

    That there is no clear difference is hardly ever refuted by few seeds, so finding none does not
    count as a prediction that held.
    """
    if found == NO_DIFFERENCE:
        return "not contradicted" if predicted == NO_DIFFERENCE else "not seen"
    return "held" if predicted == found else "contradicted"


def table(compared: Sequence[Record], landscape: str) -> Iterator[str]:
    """The lines of a landscape's table: predictions beside what was found."""
    yield "| method | predicted | in the laboratory | found | difference [95 %] | p (Holm) | |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    expected = predictions()
    for r in compared:
        if r["landscape"] != landscape:
            continue
        lab = expected[landscape, r["method"]]
        one, other = said(lab), said(r)
        cells = (
            f"`{r['method']}`", one, f"{100 * lab['relative']:+.0f} %", other, percent(r),
            f"{r['p_holm']:.2g}", verdict(one, other),
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def levels(records: Sequence[Record], landscape: str) -> Iterator[str]:
    """The lines of a table of the methods' means over seeds."""
    yield "| method | cumulative regret | sampled reward | greedy reward | KL, nats |"
    yield "| --- | --- | --- | --- | --- |"
    for method in (BASELINE, *IN_LAB):
        mine = [r for r in records if (r["landscape"], r["method"]) == (landscape, method)]
        total = stats.over_seeds(totals(records, landscape, method))
        last = [np.mean([r[name][-1] for r in mine]) for name in ("reward", "greedy", "kl")]
        cells = [f"`{method}`", f"{total.mean:.2f} [{total.low:.2f}, {total.high:.2f}]"]
        yield f"| {' | '.join(cells + [f'{x:.2f}' for x in last])} |"


def summary(records: Sequence[Record], compared: Sequence[Record]) -> Iterator[str]:
    """The lines that say how many runs there are and what became of the predictions."""
    if not records:
        yield "The runs have not been made yet."
        return
    seeds = [f"{r['seeds']} in `{r['landscape']}`" for r in compared[:: len(IN_LAB)]]
    lab = predictions()
    predicted = [said(lab[r["landscape"], r["method"]]) for r in compared]
    verdicts = [verdict(one, said(r)) for one, r in zip(predicted, compared, strict=True)]
    some, none = (
        [v for v, one in zip(verdicts, predicted, strict=True) if (one == NO_DIFFERENCE) == none]
        for none in (False, True)
    )
    yield (
        f"{len(records)} runs: 8 methods with the same seeds, {' and '.join(seeds)}. The "
        f"laboratory predicts a difference in {len(some)} cases: it was found in "
        f"{some.count('held')}, was not seen in {some.count('not seen')}, and was contradicted in "
        f"{some.count('contradicted')}. It predicts no clear difference in {len(none)} cases, and "
        f"a clear one was found in {none.count('contradicted')} of them."
    )
    yield ""
    yield "![Differences from DPO, here and in the laboratory](images/middle_world.svg)"
    yield ""
    yield (
        "*Paired by seed, with 95 % intervals over seeds; p is Holm's over the 14 comparisons. "
        "Numbers: [json](images/middle_world.json).*"
    )


def draw(figure: Figure, compared: Sequence[Record]) -> None:
    """Draws each method's difference from DPO, here and in the laboratory, in % of DPO's regret."""
    axes = figure.subplots(1, len(language.LANDSCAPES), sharey=True)
    expected = predictions()
    for axis, landscape in zip(axes, language.LANDSCAPES, strict=True):
        here = [r for r in compared if r["landscape"] == landscape][::-1]
        there = [expected[landscape, r["method"]] for r in here]
        for results, colour, shift, marker, label in (
            (there, COLOURS[1], 0.14, "s", "laboratory"),
            (here, COLOURS[0], -0.14, "o", "middle world"),
        ):
            means, lows, highs = (
                100 * np.array([r[key] / r["base"] for r in results])
                for key in ("difference", "low", "high")
            )
            axis.errorbar(
                means, np.arange(len(results)) + shift, xerr=[means - lows, highs - means],
                fmt=marker, color=colour, markersize=4, linewidth=1.2, label=label,
            )  # fmt: skip
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.set(title=landscape, xlabel="cumulative regret minus DPO's, in % of DPO's")
        axis.set_yticks(range(len(here)), [r["method"] for r in here])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def percent(r: Mapping[str, Any]) -> str:
    """A comparison's difference with its interval, in % of DPO's regret."""
    mean, low, high = (100 * r[key] / r["base"] for key in ("difference", "low", "high"))
    return f"{mean:+.0f} % [{low:+.0f}, {high:+.0f}]"


def between(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with other lines between the two comments that bear a name."""
    before, start, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not (start and end):
        raise ValueError(f"docs/middle_world.md has no comments {name!r}, to put its table between")
    return before + start + "\n".join(lines) + "\n" + end + after


def main(drawn: bool = False) -> None:
    """Writes the records, the figure and the tables of the document."""
    if not drawn:
        lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in read_runs())
        artifacts.write_text(RECORDS, f"[\n{lines}\n]\n")
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    compared = compare(records)
    svg = drawings((7.2, 3.2), lambda figure: draw(figure, compared))["svg"]
    RECORDS.with_suffix(".svg").write_bytes(svg)
    document = DOCS / "middle_world.md"
    page = document.read_text(encoding="utf-8")
    page = between(page, "summary", list(summary(records, compared)))
    for landscape in language.LANDSCAPES:
        page = between(page, f"{landscape}: found", list(table(compared, landscape)))
        page = between(page, f"{landscape}: levels", list(levels(records, landscape)))
    artifacts.write_text(document, page)
    print("\n".join(summary(records, compared)))


if __name__ == "__main__":
    main("--drawn" in sys.argv[1:])
