"""Computes MT-Bench's scores from judgments, with confidence intervals.

Means are over judgments, as in FastChat's show_result: all turns and repetitions count the same;
malformed ones are left out and counted. The 95 % intervals are over questions, each with all its
judgments (the two turns of a question, and repetitions of a turn, are not independent). Those of
ratings are by `intervals.weighted`, those of wins by `proportions`. There is no interval for a
single question, or if all ratings are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.mt_bench.answer import Question
from selm_jax.evaluation.benchmarks.mt_bench.judgments import is_malformed, unread
from selm_jax.statistics import proportions
from selm_jax.statistics.intervals import weighted

# FastChat's prompts cannot be improved here, and even good judges sometimes miss the format.
# Leaving out 8 of 160 verdicts that would have been two points lower moves the mean by 0.1, less
# than half the width of its interval.
ALLOWED = 0.05

Row = Mapping[str, Any]


def check_malformed(rows: Sequence[Row], allowed: int | None, file: Path) -> int:
    """Checks that there are not too many malformed verdicts; returns the limit.

    Args:
        allowed: the limit; None is the share `ALLOWED` of all verdicts, rounded down.
        file: the file of the verdicts, for errors.

    Raises:
        EvaluationError: there are more malformed verdicts.
    """
    allowed = int(ALLOWED * len(rows)) if allowed is None else allowed
    malformed = [row for row in rows if is_malformed(row)]
    if len(malformed) > allowed:
        raise EvaluationError(
            f"{file}: {len(malformed)} of {len(rows)} verdicts could not be read, more than the "
            f"{allowed} allowed, such as the one {unread(malformed[0])}. Averaging only the "
            "readable verdicts would change the question set. No scores were written; the verdicts "
            "stay in the file. Use another judge, or accept this with --allow-malformed "
            f"{len(malformed)}, which leaves them out of the means."
        )
    return allowed


def single(rows: Sequence[Row], questions: Sequence[Question]) -> dict[str, Any]:
    """The MT-Bench scores of one model: overall, by turn and by category.

    Returns:
        The groups `overall`, `turn_1`, `turn_2` and `categories`, each with `score`, `low`, `high`,
        `judgments` and `malformed`; and `spread`, the mean standard deviation of repetitions of a
        judgment (None without repetitions).

    Raises:
        EvaluationError: judgments are missing, or none can be read.
    """
    _check(rows, questions)
    return _by_group(rows, questions, _mean_score) | {"spread": _spread(rows)}


def pair(rows: Sequence[Row], questions: Sequence[Question]) -> dict[str, Any]:
    """The win rates of model 1 against model 2: overall, by turn and by category.

    Returns:
        The groups of `single`, each with the counts `win`, `loss` and `tie` (two orders that
        disagree are a tie), `win_rate`, `loss_rate`, and `win_rate_adjusted`, which counts a tie
        half, with its `low` and `high`.

    Raises:
        EvaluationError: judgments are missing, or none can be read.
    """
    _check(rows, questions)
    return _by_group(rows, questions, _win_rates)


def outcome(row: Row) -> float:
    """Model 1's result: 1 for a win, 0 for a loss, 1/2 for a tie or if both orders disagree."""
    if row["g1_winner"] == "tie" or row["g1_winner"] != row["g2_winner"]:
        return 0.5
    return float(row["g1_winner"] == "model_1")


def table(title: str, found: Mapping[str, Any]) -> str:
    """Formats MT-Bench scores or win rates as text for the terminal."""
    key = "score" if "score" in found["overall"] else "win_rate_adjusted"
    groups = {"overall": found["overall"], "turn 1": found["turn_1"], "turn 2": found["turn_2"]}
    lines = [title]
    for name, group in (groups | found["categories"]).items():
        if group[key] is None:
            lines.append(f"  {name:<12} no readable judgment")
            continue
        text = f"  {name:<12} {group[key]:6.3f}  {_ends(group)}"
        if key != "score":
            text += f"  {group['win']} wins, {group['tie']} ties, {group['loss']} losses"
        lines.append(text + (f"  {group['malformed']} malformed" if group["malformed"] else ""))
    if found.get("spread") is not None:
        lines.append(f"  repetitions of one judgment differ by {found['spread']:.3f} (std)")
    return "\n".join(lines)


def _ends(group: Mapping[str, Any]) -> str:
    if group["low"] is None:
        return "(no interval: one question, or equal ratings)"
    return f"[{group['low']:.3f}, {group['high']:.3f}]"


def _check(rows: Sequence[Row], questions: Sequence[Question]) -> None:
    """Checks that both turns of every question were judged equally often."""
    times: dict[tuple[int, int], int] = {(q.id, turn): 0 for q in questions for turn in (1, 2)}
    for row in rows:
        place = (row["question_id"], row["turn"])
        if place not in times:
            raise EvaluationError(
                f"there is a judgment of question {place[0]}, which is not among the questions. "
                "Give the questions that were judged."
            )
        times[place] += 1
    most = max(times.values(), default=0)
    partial = [place for place, count in times.items() if count < most]
    if partial or not most:
        number, turn = partial[0] if partial else next(iter(times))
        raise EvaluationError(
            f"judgments of {len(partial) or len(times)} of {len(times)} turns are missing, such as "
            f"question {number}, turn {turn}. Averaging only the others would change the question "
            "set. Judge the rest first."
        )
    if all(is_malformed(row) for row in rows):
        raise EvaluationError(
            f"none of {len(rows)} judgments can be read, so there is no score. Use another judge."
        )


def _by_group(
    rows: Sequence[Row],
    questions: Sequence[Question],
    describe: Callable[[Sequence[Row]], dict[str, Any]],
) -> dict[str, Any]:
    category = {q.id: q.category for q in questions}
    # A file has them in the order in which the judge answered, which would show in the last digit.
    rows = sorted(rows, key=lambda row: (row["question_id"], row["turn"]))
    turns = {turn: [row for row in rows if row["turn"] == turn] for turn in (1, 2)}
    found: dict[str, Any] = {"overall": describe(rows)}
    found |= {f"turn_{turn}": describe(those) for turn, those in turns.items()}
    found["categories"] = {}
    for name in dict.fromkeys(category.values()):
        those = [row for row in rows if category[row["question_id"]] == name]
        found["categories"][name] = describe(those)
    return found


def _mean_score(rows: Sequence[Row]) -> dict[str, Any]:
    return _counts(rows) | dict(zip(("score", "low", "high"), _mean_of_scores(rows), strict=True))


def _win_rates(rows: Sequence[Row]) -> dict[str, Any]:
    results = [outcome(row) for row in rows if not is_malformed(row)]
    win, loss, tie = (results.count(x) for x in (1.0, 0.0, 0.5))
    total = len(results)
    return _counts(rows) | {
        "win": win,
        "loss": loss,
        "tie": tie,
        "win_rate": win / total if total else None,
        "loss_rate": loss / total if total else None,
        **dict(zip(("win_rate_adjusted", "low", "high"), _share(rows), strict=True)),
    }


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    malformed = sum(map(is_malformed, rows))
    return {"judgments": len(rows), "malformed": malformed}


_Interval = tuple[float | None, float | None, float | None]


def _mean_of_scores(rows: Iterable[Row]) -> _Interval:
    """The mean score of the readable verdicts, and the ends of its interval over questions."""
    sums, counts = _by_question(rows, lambda row: row["score"])
    if not len(sums):
        return None, None, None
    found = weighted(sums / counts, counts)
    return float(sums.sum() / counts.sum()), found.low, found.high


def _share(rows: Iterable[Row]) -> _Interval:
    """The share of verdicts that model 1 won (a tie counts half), and the ends of its interval."""
    sums, counts = _by_question(rows, outcome)
    if not len(sums):
        return None, None, None
    return float(sums.sum() / counts.sum()), *proportions.interval(sums / counts, counts)


def _by_question(
    rows: Iterable[Row], value: Callable[[Row], float]
) -> tuple[Float[np.ndarray, " questions"], Float[np.ndarray, " questions"]]:
    """For each question, the sum and the count of the values of its readable verdicts."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if not is_malformed(row):
            found.setdefault(row["question_id"], []).append(value(row))
    sums = np.array([sum(values) for values in found.values()], np.float64)
    return sums, np.array([len(values) for values in found.values()], np.float64)


def _spread(rows: Sequence[Row]) -> float | None:
    """The mean standard deviation between repeated judgments; None if none was repeated."""
    repeated: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if not is_malformed(row):
            repeated.setdefault((row["question_id"], row["turn"]), []).append(row["score"])
    several = [np.std(values, ddof=1) for values in repeated.values() if len(values) > 1]
    return float(np.mean(several)) if several else None
