"""Loads prompts and preference pairs from local files, a bucket, or the Hugging Face Hub.

Every row becomes a `Prompt`: the conversation up to its last user turn and, if the data has them, a
chosen and a rejected answer. A row that cannot be used is an error that names it, or, if you choose
so, it is dropped and counted. Nothing is dropped silently.

These forms of rows are supported:

    prompt only                  {"prompt": str}  or  {"prompt": [{role, content}, ...]}
    explicit pair                a prompt as above, "chosen" and "rejected" as str or [assistant]
    UltraFeedback-binarized      {"prompt": str, "chosen": [..., user, assistant], "rejected": ...}
    conversational, no prompt    {"chosen": [..., user, assistant], "rejected": ...}

A further column `system` may contain the row's system message. A list of messages may be stored as
text, in JSON or as Python prints it (pandas does so in CSV).

A pair of plain strings without a prompt is refused, because we would have to guess where the prompt
ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, overload

import numpy as np
from etils import epath

from selm_jax.config import Data, Experiment
from selm_jax.config.kinds import DuplicateIds, OnBadRow
from selm_jax.shell.storage import is_url
from selm_jax.shell.threads import of_each
from selm_jax.text import tables
from selm_jax.text.conversations import (
    Columns,
    Message,
    Prompt,
    canonical_json,
    choose_columns,
    parse,
)
from selm_jax.text.tables import BadRow, DataError, Row

__all__ = [
    "DataError",
    "Message",
    "Prompt",
    "PromptSet",
    "load_data",
    "load_prompts",
    "portion",
    "prompts_digest",
]

T = TypeVar("T")
Part = Literal["train", "heldout"]  # of the data of an experiment

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclasses.dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """The prompts of one split, in file order; use it like a list.

    Attributes:
      prompts: the usable rows.
      dropped: reason -> numbers of the dropped rows, counted from 1 over the whole split.
      notes: sentences about columns that were read, or not read, without being named.
    """

    prompts: tuple[Prompt, ...]
    dropped: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index):
        return self.prompts[index]

    def without(self, reason: str, bad: Callable[[Prompt], bool]) -> PromptSet:
        """Returns a copy without `bad` prompts, which its `dropped` lists under `reason`."""
        rows = list(enumerate(self.by_row(), start=1))
        there = [number for number, found in rows if found is not None]
        told = of_each(bad, self.prompts)
        out = tuple(number for number, is_bad in zip(there, told, strict=True) if is_bad)
        if not out:
            return self
        gone = set(out)
        kept = tuple(p for number, p in rows if p is not None and number not in gone)
        return PromptSet(kept, {**self.dropped, reason: out}, self.notes)

    def by_row(self) -> list[Prompt | None]:
        """Every row of the split, in file order; None for a row that was dropped."""
        out = {number for numbers in self.dropped.values() for number in numbers}
        kept = iter(self.prompts)
        rows = range(1, len(self.prompts) + len(out) + 1)
        return [None if number in out else next(kept) for number in rows]


def load_prompts(
    path_or_id: str,
    *,
    split: str | None = None,
    prompt: str = "prompt",
    prompt_id: str = "prompt_id",
    chosen: str | None = None,
    rejected: str | None = None,
    system: str | None = "system",
    scores: Sequence[str] = (),
    revision: str | None = None,
    config: str | None = None,
    on_bad_row: OnBadRow = "error",
    duplicate_ids: DuplicateIds = "error",
) -> PromptSet:
    """Reads the prompts in one split of a dataset.

    Args:
      path_or_id: a .jsonl, .json (a list of objects), .parquet, .arrow, .csv or .tsv file (text
        also as .gz), a folder of such files (they may be in its `data/`), a folder that
        `Dataset.save_to_disk` wrote, or a Hub dataset id `owner/name`. A name whose parent folder
        exists is a path.
      split: the split of a folder or Hub dataset. In a folder, split `train` is the file
        `train.parquet` or the shards `train-00000-of-00002.parquet`, ... May be omitted if there
        is only one; a single file has none.
      prompt: column of the prompt.
      prompt_id: column of the id. If the data has no column of the default name, the id is the
        first 16 hex digits of the SHA-256 of the messages.
      chosen: column of the preferred answer. None means `chosen`, if the data has this column.
      rejected: column of the other answer. None means `rejected`, if the data has this column.
      system: column of the row's system message, which is put before its prompt unless it is null
        or blank. The column may be missing if it has the default name. None reads none.
      scores: columns of numbers, stored as numbers or as text; `Prompt.row` has them as floats.
      revision: commit, tag or branch of a Hub dataset; not allowed for local files.
      config: configuration of a Hub dataset: the second argument of `load_dataset`.
      on_bad_row: "error" stops at the first unusable row. "drop" leaves such rows out and lists
        them in `PromptSet.dropped` under one of: invalid JSON, not an object, wrong number of
        cells, missing column, missing id, no number, wrong type, bad message, empty prompt, empty
        response, no assistant answer, last message not a user turn, prompt mismatch, two system
        messages, chosen equals rejected, lone surrogate, nested too deeply, duplicate id, duplicate
        row.
      duplicate_ids: how to treat an id that occurs again. "error": as a bad row. "number": as one
        more pair for the same prompt, with the id `ID#2`, `ID#3`, ... Exact copies of a row, and
        ids of different prompts, are always bad rows.

    Raises:
      DataError: if a file, split or column is missing, a file cannot be read, no row is usable, or,
        with on_bad_row="error", a row is unusable.
      ValueError: if `on_bad_row` or `duplicate_ids` has an unknown value.
    """
    for name, value, known in (
        ("on_bad_row", on_bad_row, get_args(OnBadRow)),
        ("duplicate_ids", duplicate_ids, get_args(DuplicateIds)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected {' or '.join(map(repr, known))}.")
    rows = list(_read(path_or_id, split, revision, config))
    columns = choose_columns(
        path_or_id, rows, prompt=prompt, prompt_id=prompt_id, chosen=chosen, rejected=rejected,
        system=system, scores=scores,
    )  # fmt: skip
    kept: dict[str, tuple[Prompt, Row]] = {}
    dropped: dict[str, list[int]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            found = _with_free_id(parse(row.values, columns), kept, columns, duplicate_ids)
        except BadRow as bad:
            if on_bad_row == "error":
                raise _unusable(row, bad) from bad
            dropped.setdefault(bad.reason, []).append(number)
        else:
            kept[found.id] = found, row
    if not kept:
        raise _none_usable(path_or_id, len(rows), dropped)
    return PromptSet(
        tuple(found for found, _ in kept.values()),
        {reason: tuple(numbers) for reason, numbers in dropped.items()},
        tuple(_notes(columns, kept.values())),
    )


def _none_usable(path_or_id: str, rows: int, dropped: Mapping[str, Sequence[int]]) -> DataError:
    counts = {reason: len(numbers) for reason, numbers in dropped.items()}
    return DataError(
        f"{path_or_id}: no usable row: read {rows}, dropped {counts}. Fix the data, or name its "
        "columns in the settings `data`."
    )


def _unusable(row: Row, bad: BadRow) -> DataError:
    column = f", column {bad.column!r}" if bad.column else ""
    return DataError(
        f"{row.where}{column}: {bad.reason}: {bad.detail} Fix the row, or set data.on_bad_row to "
        "'drop' to leave out and count such rows."
    )


def load_data(data: Data, part: Part = "train", *, pairs: bool = True) -> PromptSet:
    """Loads `data.train` or `data.heldout` with the experiment's settings; see `load_prompts`.

    Args:
      data: the settings `data`.
      part: which of the two to load.
      pairs: whether every row needs answers; otherwise they are read only if there are any.
    """
    path, split, config = {
        "train": (data.train, data.train_split, data.train_config),
        "heldout": (data.heldout, data.heldout_split, data.heldout_config),
    }[part]
    numbers = (data.chosen_score, data.rejected_score, data.bonus)
    return load_prompts(
        str(path),
        split=split,
        prompt=data.prompt,
        prompt_id=data.prompt_id,
        chosen=data.chosen if pairs else None,
        rejected=data.rejected if pairs else None,
        system=None if data.system is not None else data.system_column,
        scores=[s for s in numbers if s and part == "train"],
        revision=data.revision,
        config=config,
        on_bad_row=data.on_bad_row,
        duplicate_ids=data.duplicate_ids if pairs else "error",
    )


def rows_of(rows: Sequence[T], t: int, e: Experiment) -> list[T]:
    """Selects the rows of iteration t from all rows of a dataset, usable or not.

    Raises:
      DataError: if there are fewer rows than portions.
    """
    d = e.data
    left = rows[d.skip :]
    if len(left) < e.portions:
        skipped = f", {len(left):,} of them after data.skip: {d.skip:,}" if d.skip else ""
        named = "data.portions asks" if d.portions else "iterations and data.first_portion ask"
        raise DataError(
            f"{d.train} has {len(rows):,} rows{skipped}; {named} for {e.portions:,} portions of at "
            "least one row each. Use fewer portions or more data"
        )
    seed = e.seed if d.shuffle else None
    return portion(left, d.first_portion - 1 + t, e.portions, shuffle_seed=seed)


def portion(
    prompts: Sequence[T], index: int, portions: int, *, shuffle_seed: int | None = None
) -> list[T]:
    """Returns the `index`-th of `portions` equal parts, one part for each iteration.

    As in the paper's runs (arXiv 2405.19332, reference code), parts are contiguous and have
    len(prompts) // portions prompts each; the remainder at the end is in no part. So 61,135 rows
    give 4 parts of 15,283 (3 rows unused) or 3 parts of 20,378 (1 row unused).

    Args:
      prompts: the whole set, the same for every index. For a dataset, pass all its rows, usable or
        not (`PromptSet.by_row`); otherwise one bad row would shift every later part.
      index: from 1 to `portions`.
      portions: how many parts.
      shuffle_seed: if given (zero or more), the set is shuffled before it is cut. The order depends
        only on the seed and the length. The reference code does not shuffle.

    Raises:
      ValueError: if the index is outside 1..portions, or there are more portions than prompts.
    """
    if not 1 <= index <= portions:
        raise ValueError(f"the portion is {index}; expected an index from 1 to {portions}.")
    size = len(prompts) // portions
    if size == 0:
        raise ValueError(
            f"{len(prompts)} prompts cannot be cut into {portions} portions. Use fewer portions."
        )
    order = np.arange(len(prompts))
    if shuffle_seed is not None:
        # numpy promises never to change raw bits, but not Generator.permutation (NEP 19).
        order = np.argsort(np.random.Philox(key=shuffle_seed).random_raw(len(order)), kind="stable")
    return [prompts[i] for i in order[(index - 1) * size : index * size].tolist()]


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """The SHA-256, in hex, of the prompts in order, with every field, as canonical JSON lines."""
    sha = hashlib.sha256()
    for one in prompts:
        fields = {
            "id": one.id,
            "messages": [[m.role, m.content] for m in one.messages],
            "chosen": one.chosen,
            "rejected": one.rejected,
            "row": dict(one.row),
        }
        sha.update(canonical_json(fields) + b"\n")
    return sha.hexdigest()


def _with_free_id(
    new: Prompt, kept: Mapping[str, tuple[Prompt, Row]], columns: Columns, policy: str
) -> Prompt:
    """Returns `new`, with a number added to its id if the id is taken and `policy` allows it."""
    column = columns.prompt_id or columns.prompt or columns.chosen
    name, count = new.id, 1
    while name in kept:
        old, row = kept[name]
        if policy == "error":
            detail = (
                f"{name!r} is already the id of {row.where}. If prompts may have several pairs, "
                "set duplicate_ids to 'number'."
            )
            raise BadRow("duplicate id", column, detail)
        if old.messages != new.messages:
            detail = f"{name!r} is already the id of another prompt, {row.where}."
            raise BadRow("duplicate id", column, detail)
        if (old.chosen, old.rejected) == (new.chosen, new.rejected):
            raise BadRow("duplicate row", column, f"prompt and answers equal those of {row.where}.")
        count += 1
        name = f"{new.id}#{count}"
    return dataclasses.replace(new, id=name)


def _notes(columns: Columns, kept: Iterable[tuple[Prompt, Row]]) -> Iterator[str]:
    """Yields notes on columns of system messages that were read or may have been missed."""
    rows = list(kept)
    if columns.system is not None:
        values = [row.values for _, row in rows if not isinstance(row.values, BadRow)]
        count = sum(bool(str(each.get(columns.system) or "").strip()) for each in values)
        yield (
            f"the column {columns.system!r} gives {count:,} of {len(rows):,} prompts their system "
            "message (data.system_column)"
        )
    for name in dict.fromkeys(name for prompt, _ in rows for name in prompt.row):
        if name.lower().startswith("system"):
            yield (
                f"the column {name!r} is not read. If it contains system messages, set "
                f"data.system_column to {name!r} and data.system to null"
            )


def _read(
    path_or_id: str, split: str | None, revision: str | None, config: str | None
) -> Iterator[Row]:
    if is_url(path_or_id):
        return tables.read_bucket(path_or_id, split)
    path = epath.Path(path_or_id).expanduser()
    named_like_file = tables.kind_of(path.name) is not None
    if _HUB_ID.fullmatch(path_or_id) and not named_like_file and not path.parent.exists():
        return _read_hub(path_or_id, split, revision, config)
    for what, given in (("revision", revision), ("configuration", config)):
        if given is not None:
            raise DataError(
                f"{path_or_id} is read as a local path, which has no {what} {given!r}. Remove the "
                f"{what}, or name a Hub dataset, owner/name."
            )
    return tables.read(path, split)


def _read_hub(
    name: str, split: str | None, revision: str | None, config: str | None
) -> Iterator[Row]:
    import datasets  # imported late: it takes seconds, and local files do not need it

    try:
        found: Any = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        hint = (
            " Name one as data.train_config or data.heldout_config."
            if config is None and "onfig name is missing" in str(error)
            else ""
        )
        raise DataError(  # RuntimeError: the dataset is a script, which `datasets` does not run
            f"{name}: there is no such file or folder, and the Hub has no such dataset "
            f"(configuration {config!r}, split {split!r}, revision {revision!r}): {error}{hint}"
        ) from error
    if split is None:  # then load_dataset gives a mapping of all splits
        if len(found) > 1:
            there = ", ".join(found)
            raise DataError(
                f"{name} has several splits: {there}. Choose one with data.train_split or "
                "data.heldout_split."
            )
        split, found = next(iter(found.items()))
    for number, values in enumerate(found, start=1):
        yield Row(f"{name} [{split}]", number, None, values)
