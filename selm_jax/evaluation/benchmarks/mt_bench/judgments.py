"""MT-Bench's judgments as files of FastChat's format: one JSON line for each verdict.

`single` rates the answer to a turn, `pair` says which of two models' answers is better, in both
orders. A file holds the verdicts of one judge on any number of models.
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
    """All verdicts on one model, or on one against another, of one judge.

    Attributes:
        mode: "single" or "pair".
        models: the model's name, or both.
    """

    mode: str
    models: tuple[str, ...]
    judge: str
    rows: Sequence[Row]


def journal(folder: Path, mode: str, judge: str) -> Journal:
    """The file of a judge's verdicts, of any number of models."""
    file = folder / "model_judgment" / f"{file_name(judge)}_{mode}.jsonl"
    return Journal(file, lambda row: _key(mode, row))


def read(file: Path, name: str | None = None) -> Judgments:
    """The verdicts of a file, such as FastChat's `gpt-4_single.jsonl`.

    Args:
        name: of the model, or of the first of two, where the file is about several.

    Raises:
        EvaluationError: there is no such file; a line is no verdict; the file is about several models
            and `name` is none of them; verdicts of several judges.
    """
    rows = read_rows(file)
    mode = "pair" if "g1_winner" in rows[0] else "single"
    seen = set()
    for i, row in enumerate(rows):
        try:
            key = _key(mode, row)
        except (LookupError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{file}, row {i}: no verdict of FastChat's format: {type(error).__name__}: {error}."
            ) from error
        if key in seen:
            raise EvaluationError(f"{file}, row {i}: the verdict {key!r} is there twice.")
        seen.add(key)
    about = sorted({tuple(row[key] for key in _MODELS[mode]) for row in rows})
    mine = [models for models in about if name in (None, models[0])]
    if len(mine) != 1:
        which = "none of them" if not mine else "there for several" if name else "not given"
        listed = ", ".join(" against ".join(models) for models in about[:10])
        raise EvaluationError(
            f"{file}: its judgments are of {listed}{', ...' if about[10:] else ''}; --name is {which}. "
            "Expected the name of the model, or of the first of two, that is to be scored."
        )
    found = [row for row in rows if tuple(row[key] for key in _MODELS[mode]) == mine[0]]
    judges = sorted({str(row["judge"][0]) for row in found})
    if len(judges) > 1:
        raise EvaluationError(f"{file}: judgments of several judges: {', '.join(judges)}.")
    return Judgments(mode, mine[0], judges[0], found)


def is_malformed(row: Row) -> bool:
    return row.get("score") == -1 or "error" in (row.get("g1_winner"), row.get("g2_winner"))


def unread(row: Row) -> str:
    """Where a malformed verdict stands and how it ends, for errors."""
    second = "g1_winner" in row and row["g1_winner"] != "error"
    text = str(row.get("judgment", row.get(f"g{1 + second}_judgment", "")))
    return f"on question {row['question_id']}, turn {row['turn']}, which ends {text[-120:]!r}"


def _key(mode: str, row: Row) -> tuple:
    """Which verdict it is. Raises LookupError, TypeError or ValueError if it is none."""
    for name in _VERDICT[mode]:
        value = row[name]
        if mode == "pair" and value not in _WINNERS:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(_WINNERS)}")
        if mode == "single" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} is {value!r}; expected a rating")
    row["judge"][0]  # every verdict says whose it is
    names = tuple(row[name] for name in _MODELS[mode])
    return row["question_id"], row["turn"], names, row.get("repeat", 0)
