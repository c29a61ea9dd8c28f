"""`selm figures RUN ... -o DIR`: draws the paper's figures from your runs (SVG, PDF, PNG, CSV).

    figure2_win_rates                 every iteration of every run against every other
    figure3_rewards_by_run, ..._by_iteration_RUN      histograms of held-out rewards
    figure4_implicit_rewards          of chosen and rejected responses, SELM minus DPO, sorted
    figure5_own_samples               the same for each policy's own held-out samples
    figure6_one_change                held-out reward where one setting differs from the first run

Figures 2, 3, 5 and 6 need what the runs have stored. For figure 4 the policies score preference
pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from selm_jax.config import most_in_row
from selm_jax.evaluation.pairs import pairs_within
from selm_jax.objectives.roles import PAIR
from selm_jax.preferences.examples import Example
from selm_jax.report import paper
from selm_jax.report.data import RunData, report_data
from selm_jax.report.drawing import PaperFigure
from selm_jax.report.paper import Implicit
from selm_jax.report.published import drawing as published_numbers
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell.progress import terminal
from selm_jax.tables import examples as table
from selm_jax.text.prompts import load_prompts


def write(
    runs: Sequence[Run],
    out: Path,
    *,
    pairs: str | None = None,
    published: bool = False,
    console: Console | None = None,
) -> list[Path]:
    """Writes each figure for which the runs have data, and prints which figures are left out.

    Args:
      pairs: a file or Hub id with preference pairs for figure 4, in the columns prompt, chosen and
        rejected. None uses the held-out pairs of the runs' data, or else those of iteration 1.
      published: also draws the paper's own tables and its authors' model cards, marked as such.

    Returns:
      the paths of the SVG drawings; the PDF, PNG and data of each are beside it.

    Raises:
      RunError: there is nothing to draw.
    """
    console = console or terminal()
    files = []
    for figure in _figures(runs, pairs, published, console):
        svg = out / f"{figure.name}.svg"
        for kind, content in figure.drawings.items():
            with artifacts.whole(svg.with_suffix(f".{kind}")) as partial:
                partial.write_bytes(content)
        artifacts.write_text(svg.with_suffix(".csv"), figure.csv())
        files.append(svg)
        console.print(
            f"{svg}, .pdf, .png; {len(figure.rows)} rows of data in {svg.stem}.csv", soft_wrap=True
        )
    if not files:
        raise RunError(
            "no figure could be drawn, because no run has held-out answers. Evaluate the runs with "
            "`selm measure`, or draw the paper's own numbers with --published"
        )
    return files


def _figures(
    runs: Sequence[Run], pairs: str | None, published: bool, console: Console
) -> Iterator[PaperFigure]:
    if published:
        yield from published_numbers.figures()
    data = [report_data(run.folder.path) for run in runs]
    if not data:
        return
    labels = short_labels(data)
    if not all(each.answers for each in data):
        console.print("figures 2, 3, 5, 6 are left out, because a run has no held-out answers")
    else:
        yield paper.win_rates(data, labels)
        yield from paper.reward_histograms(data, labels)
        if (found := paper.panels(data, labels)) is not None:
            yield found
    base = next((i for i, run in enumerate(runs) if _is_dpo(run)), None)
    others = [i for i, run in enumerate(runs) if not _is_dpo(run)]
    if base is None or not others:
        console.print("figures 4 and 5 are left out: they need a dpo run (or alpha 0) and another")
        return
    yield from _own_samples(runs, data, labels, base, others)
    yield _pairs(runs, labels, base, others, pairs, console)


def short_labels(runs: Sequence[RunData]) -> list[str]:
    """Labels for the runs: their names or, if two are equal, the differing parts of their paths."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [run.path.resolve().parts for run in runs]
    while all(len(p) > 1 for p in paths) and len({p[0] for p in paths}) == 1:
        paths = [p[1:] for p in paths]
    while all(len(p) > 1 for p in paths) and len({p[-1] for p in paths}) == 1:
        paths = [p[:-1] for p in paths]
    return ["/".join(p) for p in paths]


def _is_dpo(run: Run) -> bool:
    alpha = run.experiment.objective.get("alpha")
    without_term = alpha == 0 or (isinstance(alpha, list) and not any(alpha))
    return run.experiment.objective["loss"] == "dpo" or without_term


def _beta(run: Run) -> float:
    beta = run.experiment.objective.get("beta")
    if beta is None:
        raise RunError(
            f"{run.folder.path}: the objective has no beta, so it has no implicit reward. Leave "
            "out this run"
        )
    return float(beta)


def _own_samples(
    runs: Sequence[Run],
    data: Sequence[RunData],
    labels: Sequence[str],
    base: int,
    others: Sequence[int],
) -> Iterator[PaperFigure]:
    """Draws figure 5 of the paper: implicit rewards of each policy's own held-out samples.

    The policies are those after iteration 2, as in the paper, or after the last common one.
    """
    t = min(2, *(max(each.evaluations, default=0) for each in data))
    found = {i: paper.own_samples(data[i], labels[i], t, _beta(runs[i])) for i in (base, *others)}
    rewards = [each.of["own samples"].values() for each in found.values()]
    if t and all(any(map(math.isfinite, each)) for each in rewards):
        title = f"Implicit reward of own samples after iteration {t} (reference: the start model)"
        yield paper.implicit_differences(
            "figure5_own_samples", title, found[base], [found[i] for i in others]
        )


def _pairs(
    runs: Sequence[Run],
    labels: Sequence[str],
    base: int,
    others: Sequence[int],
    pairs: str | None,
    console: Console,
) -> PaperFigure:
    """Draws figure 4 of the paper: implicit rewards on the same pairs, after iteration 1.

    All runs have the same reference then.
    """
    source, examples = _examples(runs[base], pairs)
    for i in others:
        if pairs is None and _examples(runs[i], None)[1] != examples:
            raise RunError(
                f"figure 4 needs the same pairs for all runs, but {runs[base].folder} and "
                f"{runs[i].folder} have different {source}. Name "
                "pairs for both with --pairs"
            )
    console.print(f"figure 4: {len(examples)} {source}")
    known: dict[str, list[tuple[float, ...]]] = {}

    def logps(run: Run, folder: Path) -> list[tuple[float, ...]]:
        key = artifacts.digest(folder)
        if key not in known:
            known[key] = run.programs.policy(folder, run.chat).logps(examples)
        return known[key]

    def implicit(i: int) -> Implicit:
        run = runs[i]
        policy, reference = logps(run, run.policy(1).path), logps(run, run.start.path)
        of = {
            role: {
                e.prompt_id: _beta(run) * (p[e.roles[role]] - r[e.roles[role]])
                for e, p, r in zip(examples, policy, reference, strict=True)
            }
            for role in PAIR
        }
        return Implicit(labels[i], of)

    title = f"Implicit reward after iteration 1, {len(examples)} {source}"
    return paper.implicit_differences(
        "figure4_implicit_rewards", title, implicit(base), [implicit(i) for i in others]
    )


def _examples(run: Run, pairs: str | None) -> tuple[str, list[Example]]:
    """Loads the pairs of figure 4; returns a phrase that describes them, and their token ids.

    Stored log-probabilities are left out. So are pairs that cannot be scored or do not fit into a
    row, as in the evaluation.
    """
    longest = most_in_row(run.experiment.training.row_length, run.programs.config.max_positions)
    if pairs is not None:
        prompts = map(
            run.data.with_system, load_prompts(pairs, chosen="chosen", rejected="rejected")
        )
        return f"pairs of {pairs}", pairs_within(run.chat, prompts, longest)[0]
    if heldout := pairs_within(run.chat, run.heldout, longest)[0]:
        return "held-out pairs", heldout
    stored = table.read(run.folder.iteration(1) / "examples.parquet")
    trained = [
        Example.of(e.prompt_id, e.prompt, {role: e.responses[e.roles[role]] for role in PAIR})
        for e in stored
    ]
    return "pairs that iteration 1 was trained on", trained
