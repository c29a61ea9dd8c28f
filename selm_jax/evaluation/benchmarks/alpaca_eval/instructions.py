"""Reads AlpacaEval's instructions, answers and annotations, and verifies that they are genuine.

The texts belong to AlpacaEval and are not included here; their digests are. `instructions.txt` has,
for each of the 805 instructions in the official order, the first 16 hex digits of the SHA-256 of
the instruction and of the baseline's answer, taken from published annotations. The order matters:
the length-controlled win rate looks up an instruction's difficulty by the position of its row.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.files import Row, read_rows, text_of
from selm_jax.shell.paths import place

BASELINE = "gpt4_1106_preview"
HUB_DATASET = "tatsu-lab/alpaca_eval"
# As pinned by two other projects, with digests of the files; not compared with the Hub itself.
HUB_REVISION = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
_SET_FILE = "alpaca_eval_gpt4_baseline.json"


@dataclass(frozen=True)
class Known:
    """Digests of an evaluation set's instructions and of the baseline's answers, in order."""

    instructions: tuple[str, ...]
    baseline: tuple[str, ...]

    @staticmethod
    def of(instructions: Sequence[str], baseline: Sequence[str]) -> Known:
        return Known(tuple(map(_digest, instructions)), tuple(map(_digest, baseline)))


@lru_cache(maxsize=1)
def published() -> Known:
    """The digests of AlpacaEval 2's 805 instructions and baseline answers."""
    text = Path(__file__).with_name("instructions.txt").read_text(encoding="ascii")
    instructions, baseline = zip(*(line.split() for line in text.splitlines()), strict=True)
    return Known(instructions, baseline)


@dataclass(frozen=True)
class EvalSet:
    """AlpacaEval's instructions and the baseline's answers, in the official order.

    Attributes:
        rows: pairs (data set, instruction).
        baseline: the baseline's answers in the same order; None if the file has none.
        source: the file that they come from.
    """

    rows: tuple[tuple[str, str], ...]
    baseline: tuple[str, ...] | None
    source: str

    @property
    def instructions(self) -> list[str]:
        return [instruction for _, instruction in self.rows]


def read_set(given: str | None = None, known: Known | None = None) -> EvalSet:
    """Reads and verifies the instructions, and the baseline's answers if the file has them.

    Args:
        given: a file of JSON or JSON lines. Its rows have `instruction`, and either `output` and
            `generator` (like alpaca_eval_gpt4_baseline.json or a model's model_outputs.json) or
            `output_1` and `generator_1` (like a published annotations.json). For other values see
            `data_file`.
        known: digests of the expected texts; by default those of the published ones.

    Raises:
        EvaluationError: a text or the order differs, or there are too many or too few rows.
    """
    known = known or published()
    path = data_file(_SET_FILE, given, "--instructions")
    rows = read_rows(path)
    instructions = [text_of(row, "instruction", path, i) for i, row in enumerate(rows)]
    check_instructions(instructions, str(path), known)
    named = [(row.get("dataset") or "", each) for row, each in zip(rows, instructions, strict=True)]
    return EvalSet(tuple(named), _baseline(rows, path, known), str(path))


def read_outputs(file: Path, known: Known | None = None) -> list[dict[str, str]]:
    """Reads and verifies a model's answers, in the official package's input format.

    Raises:
        EvaluationError: an instruction is missing, doubled, changed or in the wrong place; an
            answer is not a text; there are several generators; or these are the baseline's answers.
    """
    known = known or published()
    rows = read_rows(file)
    keys = ("instruction", "output", "generator")
    found = [{key: text_of(row, key, file, i) for key in keys} for i, row in enumerate(rows)]
    check_instructions([row["instruction"] for row in found], str(file), known)
    _only_one("generator", found, file)
    if found[0]["generator"] == BASELINE:
        raise EvaluationError(
            f"{file}: these are the answers of the baseline {BASELINE}; expected another model's."
        )
    names = [row.get("dataset") or "" for row in rows]
    return [{"dataset": name} | row for name, row in zip(names, found, strict=True)]


def read_annotations(
    file: Path, known: Known | None = None, allow_missing: int = 0
) -> list[dict[str, Any]]:
    """Reads a judge's annotations from a file and checks them (`check_annotations`)."""
    return check_annotations(read_rows(file), str(file), known, allow_missing)


def check_annotations(
    rows: Sequence[Row], where: str, known: Known | None = None, allow_missing: int = 0
) -> list[dict[str, Any]]:
    """Checks a judge's annotations, which compare one model's answers with the baseline's.

    Args:
        rows: annotations in the official package's format.
        where: their name in errors.
        allow_missing: how many instructions may lack a preference (null, NaN, or no row at all).

    Returns:
        The rows; a missing preference is None.

    Raises:
        EvaluationError: rows are missing, reordered or doubled; there is another baseline, or
            several models or annotators; or a preference is invalid.
    """
    known = known or published()
    keys = ("instruction", "output_1", "generator_1", "output_2", "generator_2")
    for i, row in enumerate(rows):
        for key in keys:
            text_of(row, key, where, i)
    absent = check_instructions([row["instruction"] for row in rows], where, known, allow_missing)
    for key in ("generator_1", "generator_2", "annotator"):
        _only_one(key, rows, where)
    baseline, model = rows[0]["generator_1"], rows[0]["generator_2"]
    if baseline != BASELINE:
        raise EvaluationError(
            f"{where}: annotated against {baseline!r}, but AlpacaEval 2's baseline is "
            f"{BASELINE!r}. Annotate the model's answers again."
        )
    if model == BASELINE:
        raise EvaluationError(
            f"{where}: {BASELINE!r} is annotated against itself; expected another model."
        )
    check_baseline([row["output_1"] for row in rows], where, known, places(rows, known))
    missing = []
    found = []
    for i, row in enumerate(rows):
        value = row.get("preference")
        if value is None or (isinstance(value, float) and math.isnan(value)):
            missing.append(i)
            value = None
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise EvaluationError(f"{where}, row {i}: preference is {value!r}; expected a number.")
        elif value != 0 and not 1 <= value <= 2:
            raise EvaluationError(
                f"{where}, row {i}: preference is {value!r}; expected a number from 1 (the "
                "baseline's answer is better) to 2 (the model's is better), or 0 for a draw."
            )
        found.append(dict(row) | {"preference": value})
    lost = len(missing) + len(absent)
    if lost > allow_missing:
        gone = f", and {len(absent)} instructions have no row" if absent else ""
        raise EvaluationError(
            f"{where}: {len(missing)} of {len(rows)} preferences are missing (rows "
            f"{_some(missing)}), because the judge's answers could not be read{gone}. Leaving them "
            "out would change the set of instructions. Annotate again, or accept this with "
            f"--allow-missing {lost}."
        )
    if not any(row["preference"] is not None for row in found):
        raise EvaluationError(f"{where}: no row has a preference. Annotate again.")
    return found


def places(rows: Sequence[Row], known: Known | None = None) -> list[int]:
    """Looks up each row's instruction number, counted from 0 in the official order."""
    at = {digest: i for i, digest in enumerate((known or published()).instructions)}
    return [at[_digest(row["instruction"])] for row in rows]


def check_instructions(
    found: Sequence[str], where: str, known: Known, allow_missing: int | None = None
) -> list[int]:
    """Checks that every instruction is present once, unchanged and in the official order.

    Args:
        allow_missing: how many may be absent. None: none, and the error does not offer the option.

    Returns:
        The numbers of the instructions that are absent.

    Raises:
        EvaluationError: instructions are missing, doubled, changed or reordered; the message lists
            the rows.
    """
    digests = [_digest(text) for text in found]
    if tuple(digests) == known.instructions:
        return []
    places = {digest: i for i, digest in enumerate(known.instructions)}
    held = set(digests)
    missing = [i for digest, i in places.items() if digest not in held]
    rest = [digest for digest in known.instructions if digest in held]
    if digests == rest and len(missing) <= (allow_missing or 0):
        return missing
    faults = []
    if missing:
        faults.append(f"instructions {_some(missing)} of {len(places)} are missing")
    doubled = [i for i, n in Counter(digests).items() if n > 1 and i in places]
    if doubled:
        doubles = _some([places[each] for each in doubled])
        faults.append(f"instructions {doubles} appear more than once")
    unknown = [i for i, digest in enumerate(digests) if digest not in places]
    if unknown:
        faults.append(
            f"the texts of rows {_some(unknown)} are not AlpacaEval's, such as "
            f"{found[unknown[0]][:80]!r}"
        )
    if not doubled and not unknown and digests != rest:
        i = next(i for i, digest in enumerate(digests) if digest != rest[i])
        there = "the other instructions" if missing else "the instructions"
        faults.append(f"{there} are in another order: row {i} has number {places[digests[i]]}")
    accept = ""
    if digests == rest and allow_missing is not None:
        accept = (
            " Leaving them out would change the set of instructions. Annotate the rest, or accept "
            f"this with --allow-missing {len(missing)}."
        )
    raise EvaluationError(
        f"{where}: {'; '.join(faults)} (counted from 0). Expected AlpacaEval's "
        f"{len(places)} instructions, unchanged and in the official order.{accept}"
    )


def check_baseline(
    found: Sequence[str], where: str, known: Known, places: Sequence[int] | None = None
) -> None:
    """Raises EvaluationError if an answer differs from that of the published baseline.

    Args:
        places: the number of the instruction for each answer; None: all instructions, in order.
    """
    expected = known.baseline if places is None else [known.baseline[i] for i in places]
    pairs = zip(found, expected, strict=True)
    other = [i for i, (text, digest) in enumerate(pairs) if _digest(text) != digest]
    if other:
        raise EvaluationError(
            f"{where}: {len(other)} answers of the baseline are not the published ones of "
            f"{BASELINE} (rows {_some(other)}). Use the published file."
        )


def data_file(name: str, given: str | None, option: str) -> Path:
    """Finds or downloads a file of AlpacaEval's data set; returns its path.

    Args:
        given: a path, or "hub" to download the file at the pinned revision. None uses a copy that
            was downloaded before.
        option: the command-line option of `given`, for errors.

    Raises:
        EvaluationError: the file is not there or cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    if given not in (None, "hub"):
        if not place(given).is_file():
            raise EvaluationError(f"{option} {given}: no such file.")
        return place(given)
    where = f"{name} of the Hub data set {HUB_DATASET} (revision {HUB_REVISION[:8]})"
    try:
        return Path(
            hf_hub_download(
                HUB_DATASET, name, repo_type="dataset", revision=HUB_REVISION,
                local_files_only=given is None,
            )
        )  # fmt: skip
    except (OSError, ValueError) as error:  # the Hub's errors are OSErrors
        if given is None:
            raise EvaluationError(
                f"{where} is not on this machine. Give it with {option} FILE, or download it with "
                f"{option} hub."
            ) from None
        reason = str(error).strip().partition("\n")[0]
        raise EvaluationError(
            f"{option} hub: {where} could not be downloaded: {reason}. Give a copy with "
            f"{option} FILE"
        ) from error


def _baseline(rows: Sequence[Row], path: Path, known: Known) -> tuple[str, ...] | None:
    for output, generator in (("output_1", "generator_1"), ("output", "generator")):
        if all(row.get(generator) == BASELINE for row in rows):
            texts = [text_of(row, output, path, i) for i, row in enumerate(rows)]
            check_baseline(texts, str(path), known)
            return tuple(texts)
    return None


def _only_one(key: str, rows: Sequence[Row], where: object) -> None:
    names = sorted({str(row.get(key)) for row in rows})
    if len(names) > 1:
        raise EvaluationError(
            f"{where}: {key} is {', '.join(names[:3])}{' ...' if names[3:] else ''}; expected the "
            "same value in all rows."
        )


def _some(places: Sequence[int]) -> str:
    return ", ".join(map(str, places[:5])) + (" ..." if len(places) > 5 else "")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
