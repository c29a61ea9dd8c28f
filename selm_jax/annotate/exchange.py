"""Exports human preferences to files that other programs can read, and imports them.

Files are JSON lines or Parquet, with one row for each pair of answers of which a person prefers
one. There are two layouts:

* `trl`: `prompt`, `chosen` and `rejected` are lists of messages (TRL's conversational format).
* `ultrafeedback`: as in HuggingFaceH4/ultrafeedback_binarized, `prompt` is the last user turn, and
  `chosen` and `rejected` are whole conversations; `score_chosen` and `score_rejected` are from 0
  to 1.

Both also have `prompt_id`, `annotator`, and `comment` if the person wrote one. Tied answers make no
row, so there are no rows for a person who ranked all answers equal, or who skipped the question.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selm_jax.annotate.agreement import alpha, shares
from selm_jax.annotate.store import AnnotationError, Annotations, Item
from selm_jax.shell import artifacts, jsonl

SUFFIXES = (".jsonl", ".parquet")

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
LAYOUTS = {  # the columns in addition to those of both layouts
    "trl": [("prompt", _MESSAGES)],
    "ultrafeedback": [
        ("prompt", pa.string()), ("score_chosen", pa.float64()), ("score_rejected", pa.float64())
    ],
}  # fmt: skip


def export_pairs(
    store: Annotations, batch: str, file: Path, layout: str = "trl"
) -> dict[str, int | float]:
    """Writes the human preferences on a batch of questions to a file.

    Returns:
        Counts by name. `rows`: rows of the file. `all_equal`: rankings without a row because all
        answers are tied. `skips`: skipped questions. `alpha`: the agreement between people
        (`agreement.alpha`), if two people ranked the same question.

    Raises:
        AnnotationError: the layout or the suffix is unknown.
    """
    if layout not in LAYOUTS:
        raise AnnotationError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    _check_suffix(file)
    items = {item.digest: item for item in store.items(batch)}
    rows, equal, skips = [], 0, 0
    judgements = store.judgements(batch)
    for each in judgements:
        if each.ranks is None:
            skips += 1
            continue
        pairs = list(_pairs(each.ranks))
        equal += not pairs
        for better, worse in pairs:
            row = _row(items[each.question], shares(each.ranks).tolist(), better, worse, layout)
            said = {} if each.comment is None else {"comment": each.comment}
            rows.append(row | {"annotator": each.annotator} | said)
    if file.suffix == ".parquet":
        fields = [
            ("prompt_id", pa.string()), *LAYOUTS[layout],
            ("chosen", _MESSAGES), ("rejected", _MESSAGES), ("annotator", pa.string()),
            ("comment", pa.string()),
        ]  # fmt: skip
        artifacts.write_table(file, pa.Table.from_pylist(rows, schema=pa.schema(fields)))
    else:
        artifacts.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    counts: dict[str, int | float] = {"rows": len(rows), "all_equal": equal, "skips": skips}
    agreement = alpha(judgements)
    return counts if agreement is None else counts | {"alpha": agreement}


def import_pairs(store: Annotations, batch: str, file: Path) -> dict[str, int]:
    """Imports rankings of a batch's questions from a file in TRL's or UltraFeedback's layout.

    The rows of a person for a prompt must together rank all of its answers. For a row without
    `annotator`, the annotator is the name of the file. Rankings that are already in the store are
    not added again.

    Returns:
        Counts by name. `rows`: rows of the file. `rankings`: new rankings.

    Raises:
        AnnotationError: a row cannot be read, a prompt or an answer is not in this batch, or the
            rows do not make a ranking. In this case nothing is stored.
    """
    known = {(item.messages, frozenset(item.answers)): item for item in store.items(batch)}
    by_prompt: dict[tuple, list[Item]] = {}
    for (messages, _), item in known.items():
        by_prompt.setdefault(messages, []).append(item)
    liked: dict[tuple[str, str], set[tuple[int, int]]] = {}
    items, count = {}, 0
    for where, row in _read(file):
        count += 1
        annotator = str(row.get("annotator") or file.stem)
        prompt, chosen, rejected = _parse(row, where)
        fit = [i for i in by_prompt.get(prompt, ()) if {chosen, rejected} <= set(i.answers)]
        if len(fit) != 1:
            raise AnnotationError(
                f"{where}: {len(fit)} questions of the batch {batch!r} have this prompt and these "
                f"two answers; expected one. The prompt begins with {prompt[-1][1][:60]!r}."
            )
        (item,) = fit
        items[item.digest] = item
        pair = item.answers.index(chosen), item.answers.index(rejected)
        liked.setdefault((item.digest, annotator), set()).add(pair)
    ranked = {key: _ranking(items[key[0]], key[1], pairs, file) for key, pairs in liked.items()}
    fresh = 0
    for (digest, annotator), ranks in ranked.items():
        name = hashlib.sha256(json.dumps([batch, digest, annotator, ranks]).encode()).hexdigest()
        fresh += store.judge(digest, annotator, ranks, request=f"import {name}")
    return {"rows": count, "rankings": fresh}


def _pairs(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields all pairs of a better and a worse answer, as indices (better, worse)."""
    for i, j in itertools.permutations(range(len(ranks)), 2):
        if ranks[i] < ranks[j]:
            yield i, j


def _row(item: Item, scores: Sequence[float], better: int, worse: int, layout: str) -> dict:
    prompt = [{"role": role, "content": text} for role, text in item.messages]
    chosen, rejected = (
        [{"role": "assistant", "content": item.answers[i]}] for i in (better, worse)
    )
    row: dict[str, Any] = {"prompt_id": item.prompt_id}
    if layout == "trl":
        return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row | {
        "prompt": item.messages[-1][1],
        "chosen": prompt + chosen,
        "rejected": prompt + rejected,
        "score_chosen": float(scores[better]),
        "score_rejected": float(scores[worse]),
    }


def _read(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    _check_suffix(file)
    if file.suffix == ".parquet":
        for n, row in enumerate(pq.read_table(file).to_pylist(), 1):
            yield f"{file}, row {n}", row
        return
    for line in jsonl.lines(file.read_bytes()):
        where = f"{file}, line {line.number}"
        try:
            row = line.value()
        except jsonl.JsonError as error:
            raise AnnotationError(f"{where}: not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise AnnotationError(f"{where}: found {row!r}; expected a JSON object.")
        yield where, row


def _parse(row: Mapping[str, Any], where: str) -> tuple[tuple[tuple[str, str], ...], str, str]:
    """Parses a row: the prompt's messages, the chosen answer and the rejected answer."""
    turns = {}
    for key in ("prompt", "chosen", "rejected"):
        value = row.get(key)
        if key == "prompt" and isinstance(value, str):
            continue
        try:
            turns[key] = tuple((m["role"], m["content"]) for m in value or ())
        except (TypeError, KeyError) as error:
            raise AnnotationError(
                f"{where}, {key!r}: found {str(value)[:80]!r}; expected a list of messages with "
                "role and content."
            ) from error
        if not turns[key]:
            raise AnnotationError(f"{where}: {key!r} is missing or empty; expected messages.")
    *before, chosen = turns["chosen"]
    *before_rejected, rejected = turns["rejected"]
    if before != before_rejected:
        raise AnnotationError(
            f"{where}: chosen and rejected do not answer the same prompt; expected two answers to "
            "one prompt."
        )
    prompt = turns.get("prompt", ()) + tuple(before) if "prompt" in turns else tuple(before)
    if before and "prompt" in turns:
        raise AnnotationError(
            f"{where}: prompt is a list, but chosen has {1 + len(before)} messages; expected one."
        )
    if not prompt:
        raise AnnotationError(
            f"{where}: prompt is text, but chosen has no conversation; expected the prompt's "
            "messages and the answer in chosen."
        )
    return prompt, chosen[1], rejected[1]


def _ranking(item: Item, annotator: str, pairs: set[tuple[int, int]], file: Path) -> list[int]:
    """Builds the ranking whose pairs (better, worse) are exactly `pairs`."""
    net = [0] * len(item.answers)  # wins - losses, which determine the places of a ranking
    for better, worse in pairs:
        net[better] += 1
        net[worse] -= 1
    ranks = [1 + sum(other > mine for other in net) for mine in net]
    if set(_pairs(ranks)) != pairs:
        raise AnnotationError(
            f"{file}: the {len(pairs)} rows of {annotator!r} on prompt {item.prompt_id!r} do not "
            f"rank its {len(item.answers)} answers; expected a row for every pair that is not "
            "tied, and no cycle."
        )
    return ranks


def _check_suffix(file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise AnnotationError(
            f"{file}: the file type is not supported; use a name that ends in "
            f"{' or '.join(SUFFIXES)}."
        )
