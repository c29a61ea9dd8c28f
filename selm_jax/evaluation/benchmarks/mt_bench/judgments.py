"""Reads and writes MT-Bench's judgments in FastChat's format: one JSON line per verdict.

`single` verdicts rate the answer to a turn; `pair` verdicts say which of two models' answers is
better, in both orders. A file has the verdicts of one judge on any number of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.files import Journal, file_name, read_rows

_MODELS = {"single": ("model",), "pair": ("model_1", "model_2")}
_VERDICT = {"single": ("score",), "pair": ("g1_winner", "g2_winner")}
_WINNERS = ("model_1", "model_2", "tie", "error")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Judgments:
    """All verdicts of one judge on one model, or on one model against another.

    Attributes:
        mode: "single" or "pair".
        models: the name of the model, or of both models.
    """

    mode: str
    models: tuple[str, ...]
    judge: str
    rows: Sequence[Row]


def journal(folder: Path, mode: str, judge: str) -> Journal:
    """Opens the file of a judge's verdicts on any number of models."""
    file = folder / "model_judgment" / f"{file_name(judge)}_{mode}.jsonl"
    return Journal(file, lambda row: _key(mode, row))


def read(file: Path, name: str | None = None) -> Judgments:
    """Reads the verdicts on one model from a file, such as FastChat's `gpt-4_single.jsonl`.

    Args:
        name: the name of the model (for pairs, of the first one) if the file is about several.

    Raises:
        EvaluationError: there is no such file, a line is not a verdict, there are verdicts of
            several judges, or `name` does not select one model (or pair) of the file.
    """
    rows = read_rows(file)
    mode = "pair" if "g1_winner" in rows[0] else "single"
    seen = set()
    for i, row in enumerate(rows):
        try:
            key = _key(mode, row)
        except (LookupError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{file}, row {i}: not a verdict in FastChat's format: {type(error).__name__}: "
                f"{error}. Correct or delete the line."
            ) from error
        if key in seen:
            raise EvaluationError(
                f"{file}, row {i}: the verdict {key!r} appears twice. Delete one of them."
            )
        seen.add(key)
    about = sorted({tuple(row[key] for key in _MODELS[mode]) for row in rows})
    mine = [models for models in about if name in (None, models[0])]
    if len(mine) != 1:
        which = "none of them" if not mine else "in several of them" if name else "not given"
        listed = ", ".join(" against ".join(models) for models in about[:10])
        raise EvaluationError(
            f"{file}: its judgments are about {listed}{', ...' if about[10:] else ''}; --name is "
            f"{which}. Give the name of the model to score (for a pair, of the first one)."
        )
    found = [row for row in rows if tuple(row[key] for key in _MODELS[mode]) == mine[0]]
    judges = sorted({str(row["judge"][0]) for row in found})
    if len(judges) > 1:
        raise EvaluationError(
            f"{file} has judgments of several judges: {', '.join(judges)}; expected one judge."
        )
    return Judgments(mode, mine[0], judges[0], found)


def is_malformed(row: Row) -> bool:
    return row.get("score") == -1 or "error" in (row.get("g1_winner"), row.get("g2_winner"))


def unread(row: Row) -> str:
    """Describes where a malformed verdict is and how its text ends, for error messages."""
    second = "g1_winner" in row and row["g1_winner"] != "error"
    text = str(row.get("judgment", row.get(f"g{1 + second}_judgment", "")))
    return f"on question {row['question_id']}, turn {row['turn']}, which ends {text[-120:]!r}"


def _key(mode: str, row: Row) -> tuple:
    """The key that identifies a verdict. Raises LookupError, TypeError or ValueError."""
    for name in _VERDICT[mode]:
        value = row[name]
        if mode == "pair" and value not in _WINNERS:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(_WINNERS)}")
        if mode == "single" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} is {value!r}; expected a rating")
    row["judge"][0]  # every verdict names its judge
    names = tuple(row[name] for name in _MODELS[mode])
    return row["question_id"], row["turn"], names, row.get("repeat", 0)
