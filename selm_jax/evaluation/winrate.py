"""Runs `selm eval winrate A B ...`: pairwise win rates from stored answers, by any ranker.

For every two contestants the ranker scores both answers to each prompt, once as (A, B) and once as
(B, A). How far A won is a share from 0 to 1; a tie is 1/2. A judge itself compares both orders of
the answers; if they disagree, it is a tie. The shares of (A, B) and (B, A) must sum to 1.

`equal_length` computes the win rate at equal length.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from selm_jax.evaluation import EvaluationError, equal_length
from selm_jax.evaluation.answers import Asked, Stored, answered, cost, read, together
from selm_jax.evaluation.contestants import Contestant
from selm_jax.evaluation.cost import CHARACTERS_PER_TOKEN, Cost, judge_cost, judges, show
from selm_jax.evaluation.malformed import Malformed, unread_line
from selm_jax.evaluation.model import Found, Model
from selm_jax.feedback.ranker import Ranker, reported
from selm_jax.shell import artifacts
from selm_jax.shell.memory import release
from selm_jax.statistics.intervals import Estimate, pooled
from selm_jax.text.conversations import Prompt

Shares = Float[np.ndarray, " answers"]

_TOLERANCE = 1e-6
_COUNTED_AS = "ties"  # how malformed answers of a judge count


def shares(
    ranker: Ranker, one: Sequence[Stored], other: Sequence[Stored], names: tuple[str, str]
) -> Shares:
    """The win of each answer in `one` over its counterpart in `other`, from 0 (lost) to 1 (won).

    Raises:
      EvaluationError: the ranker's result depends on the order of the two answers.
    """
    questions = [a.question for a in one]
    forth = ranker.scores(questions, [[a.text, b.text] for a, b in zip(one, other, strict=True)])
    back = ranker.scores(questions, [[b.text, a.text] for a, b in zip(one, other, strict=True)])
    won = np.array([_share(ranker, *scores) for scores in forth])
    lost = np.array([_share(ranker, *scores) for scores in back])
    odd = np.abs(won + lost - 1)
    if (odd > _TOLERANCE).any():
        at = int(odd.argmax())
        raise EvaluationError(
            f"the ranker {ranker.name} is not antisymmetric: at prompt {one[at].prompt_id!r} "
            f"{names[0]} beats {names[1]} by {won[at]:.4g}, but in the other order {names[1]} "
            f"beats {names[0]} by {lost[at]:.4g} ({int((odd > _TOLERANCE).sum())} of {len(odd)} "
            "answers). It is random, or its scores depend on the order. Use another ranker"
        )
    return won


def _share(ranker: Ranker, one: float, other: float) -> float:
    """Turns two scores into the first answer's win, from 0 (lost) to 1 (won).

    Scores of judges that compare are shares already; for all other rankers only the order counts.
    An unreadable answer of a judge is a tie (`Malformed` limits their number).
    """
    if np.isnan(one) or np.isnan(other):
        return 0.5
    if getattr(ranker, "form", None) in ("pairwise", "logprob"):
        return float(one)
    return (1 + float(np.sign(one - other))) / 2


def compare(y: Shares, one: Sequence[Stored], other: Sequence[Stored]) -> dict[str, Any]:
    """The win rates between two methods, with intervals over prompts (not over samples)."""
    prompts = list(dict.fromkeys(a.prompt_id for a in one))
    at = {name: i for i, name in enumerate(prompts)}
    of = np.array([at[a.prompt_id] for a in one])
    lengths = np.array([[len(a.text), len(b.text)] for a, b in zip(one, other, strict=True)], float)
    data = equal_length.Comparisons.of(y, lengths, of)
    rate = pooled(np.bincount(of, y * data.weight)[None], share=True)
    assert rate is not None  # every answer has a share
    return {
        "prompts": len(prompts),
        "win_rate": asdict(rate),
        "length_controlled": asdict(equal_length.estimate(data)),
        "length_weight": equal_length.fit(data)[1],
        "ties": float(np.mean(y == 0.5)),
        "mean_lengths": lengths.mean(axis=0).tolist(),
    }


def run(
    contestants: Sequence[Contestant],
    prompts: Callable[[], Sequence[Prompt]],
    ranker: Ranker,
    *,
    open_model: Callable[[Found], Model],
    asked: Asked,
    out: Path,
    keep: Path,
    allow_malformed: int = 0,
    dry_run: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Computes pairwise win rates; writes `winrate.json` and `comparisons.jsonl` into `out`.

    Args:
      contestants: models, or files of answers (`answers`).
      prompts: returns the prompts for models; not called if all contestants are files.
      out: a folder that must not exist yet.
      keep: the cache folder of answers; answers in it are not generated again.
      allow_malformed: how many of a judge's answers may be unreadable; an answer that is used in
        several comparisons counts in each.

    Raises:
      EvaluationError: there are fewer than two contestants, they answered different prompts, the
        ranker is not antisymmetric, there are more malformed answers than allowed, or `out` exists.
    """
    if len(contestants) < 2:
        raise EvaluationError(f"found {len(contestants)} model or file; expected two or more")
    if ranker.name == "human":
        raise EvaluationError(
            "ranker 'human' works only with `selm annotate`; give another one with --ranker"
        )
    if not dry_run and out.exists():
        raise EvaluationError(f"{out} already exists. Move it away, or give another --out")
    if dry_run:
        show(_costs(contestants, prompts, ranker, open_model, asked, keep), console)
        return {}
    sets, files = {}, {}
    for c in contestants:
        if c.file is not None:
            sets[c.name], files[c.name] = read(c.file), str(c.file)
        else:
            found, file = answered(open_model(c.models[0]), prompts(), asked, keep)
            sets[c.name], files[c.name] = found, str(file)
    release()
    keyed = together(sets)
    order = list(next(iter(keyed.values())))
    ordered = {name: [of[key] for key in order] for name, of in keyed.items()}
    pairs, lines, verdicts = [], [], Malformed(allow_malformed, _COUNTED_AS)
    verdicts.watch(ranker, askings=2)
    for a, b in itertools.combinations(ordered, 2):
        y = shares(ranker, ordered[a], ordered[b], (a, b))
        verdicts.add(ranker)  # only of the reverse order, which repeats the first one's answers
        pairs.append({"a": a, "b": b, **compare(y, ordered[a], ordered[b])})
        pairs[-1] |= {"ranker": reported(ranker)}
        lines += [
            {"prompt_id": name, "sample": sample, "a": a, "b": b, "share_of_a": float(share)}
            for (name, sample), share in zip(order, y, strict=True)
        ]
    report = {
        "ranker": ranker.name, **verdicts.record, "answers": files, "pairs": pairs,
        "ridge": equal_length.RIDGE, "matrix": matrix(list(ordered), pairs, "win_rate"),
        "length_controlled_matrix": matrix(list(ordered), pairs, "length_controlled"),
    }  # fmt: skip
    with artifacts.whole(out) as folder:
        folder.mkdir()
        artifacts.write_json(folder / "winrate.json", report)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        artifacts.write_text(folder / "comparisons.jsonl", text)
    print_report(report, list(ordered), console)
    console.print(f"results: {out}", soft_wrap=True)
    return report


def matrix(names: Sequence[str], pairs: Sequence[dict], key: str) -> list[list[float]]:
    """The matrix of win rates: entry (i, j) is how often i beats j; 1/2 on the diagonal."""
    rates = {(p["a"], p["b"]): p[key]["mean"] for p in pairs}
    rates |= {(b, a): 1 - rate for (a, b), rate in rates.items()}
    return [[rates.get((a, b), 0.5) for b in names] for a in names]


def _costs(
    contestants: Sequence[Contestant], prompts: Callable[[], Sequence[Prompt]], ranker: Ranker,
    open_model: Callable[[Found], Model], asked: Asked, keep: Path,
) -> list[Cost]:  # fmt: skip
    parts, characters, count = [], [], 0
    for c in contestants:
        if c.file is not None:
            answers = read(c.file)
            count = len(answers)
            characters.append(sum(len(a.text) + len(a.question.prompt) for a in answers))
            parts.append(Cost(f"{c.name} (file)"))
        else:
            those = prompts()
            count = len(those) * asked.each
            limit = asked.limit * CHARACTERS_PER_TOKEN
            characters.append(sum(limit + len(p.messages[-1].content) for p in those) * asked.each)
            parts.append(cost(open_model(c.models[0]), those, asked, keep))
    others = len(contestants) - 1
    for judge in judges(ranker):
        # Pairs are judged in both orders; a rating is of one answer, and the cache reuses it.
        times = 1 if judge.form == "pointwise" else 2 * others
        calls = count * len(contestants) * (1 if judge.form == "pointwise" else others)
        parts.append(judge_cost(judge, calls, times * sum(characters)))
    return parts


def print_report(report: dict[str, Any], names: list[str], console: Console) -> None:
    prompts = report["pairs"][0]["prompts"]
    for key, title in (
        ("matrix", "win rate of row over column, in % (ties count half)"),
        ("length_controlled_matrix", "win rate at equal length, in %"),
    ):
        table = Table(title=f"{title}; {prompts} prompts; ranker: {report['ranker']}", box=None)
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right")
        for name, row in zip(names, report[key], strict=True):
            table.add_row(name, *(f"{100 * v:.1f}" for v in row))
        console.print(table)
    for pair in report["pairs"]:
        raw, even = Estimate(**pair["win_rate"]), Estimate(**pair["length_controlled"])
        a, b = (f"{x:,.0f}" for x in pair["mean_lengths"])
        console.print(
            f"{pair['a']} over {pair['b']}: {raw}, at equal length {even}, ties "
            f"{pair['ties']:.3f}; characters {a} and {b}", soft_wrap=True,
        )  # fmt: skip
    if unread := unread_line(report, _COUNTED_AS):
        console.print(unread, soft_wrap=True)
