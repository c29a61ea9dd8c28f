"""Reads a row of a dataset: a conversation that ends with a user turn, and up to two answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from selm_jax.shell.words import did_you_mean
from selm_jax.text.cells import as_number, carried, check, shortened, unwrapped
from selm_jax.text.tables import BadRow, DataError, Row

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation for a model to answer, with the dataset's own answers, if any.

    Attributes:
      id: unique in its set.
      messages: the conversation up to and including the last user turn.
      chosen: the preferred answer's text, if the data has one.
      rejected: the other answer's text, if the data has one.
      row: the other columns, for rules and reports to read: text, numbers, booleans, dates (as ISO
        text), null, and lists and objects of these. Columns of bytes are not kept.
    """

    id: str
    messages: tuple[Message, ...]
    chosen: str | None = None
    rejected: str | None = None
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Columns(NamedTuple):
    """The names of the columns to read; None for a column that the dataset does not have."""

    prompt: str | None
    prompt_id: str | None
    chosen: str | None
    rejected: str | None
    system: str | None = None
    scores: tuple[str, ...] = ()


def choose_columns(
    source: str,
    rows: Sequence[Row],
    *,
    prompt: str,
    prompt_id: str,
    chosen: str | None,
    rejected: str | None,
    system: str | None = None,
    scores: Sequence[str] = (),
) -> Columns:
    """Decides which columns of the data are read. The arguments are those of `load_prompts`.

    Raises:
      DataError: if a column is missing from every row, or a pair of strings has no prompt.
    """
    readable = [(row, row.values) for row in rows if not isinstance(row.values, BadRow)]
    there = dict.fromkeys(name for _, values in readable for name in values)
    if not readable:
        return Columns(prompt, None, None, None)

    def need(name: str) -> str:
        if name not in there:
            raise DataError(
                f"{source}: missing column {name!r}{did_you_mean(name, there)} The columns are: "
                f"{', '.join(there)}."
            )
        return name

    chosen = need(chosen) if chosen else ("chosen" if "chosen" in there else None)
    rejected = need(rejected) if rejected else ("rejected" if "rejected" in there else None)
    if rejected and not chosen:
        need("chosen")
    implicit = False
    if chosen and prompt == "prompt" and prompt not in there:
        implicit = True
        for row, values in readable:
            if _is_plain_text(values.get(chosen), chosen):
                raise DataError(
                    f"{row.where}, column {chosen!r}: this is a string, but there is no column "
                    f"'prompt'. The columns are: {', '.join(there)}. It is not clear where the "
                    "prompt ends in this string. Put the prompt into a column of its own and name "
                    "this column, or write each answer as a list of messages."
                )
    optional_id = prompt_id == "prompt_id" and prompt_id not in there
    if system == "system" and system not in there:
        system = None
    return Columns(
        None if implicit else need(prompt),
        None if optional_id else need(prompt_id),
        chosen,
        rejected,
        need(system) if system else None,
        tuple(map(need, scores)),
    )


def parse(values: Mapping[str, Any] | BadRow, columns: Columns) -> Prompt:
    """Makes a `Prompt` from a row; raises BadRow if the row cannot be used."""
    if isinstance(values, BadRow):
        raise values
    row = carried({name: value for name, value in values.items() if name not in columns})
    row |= {name: _score(values, name) for name in columns.scores}
    conversations = (columns.prompt, columns.chosen, columns.rejected)
    values = {n: unwrapped(v, n) if n in conversations else v for n, v in values.items()}
    for name in values.keys() & set(columns):
        check(values[name], name)
    given = _value(values, columns.prompt, "empty prompt") if columns.prompt else None
    answers = {
        name: _answer(_value(values, name, "empty response"), name)
        for name in (columns.chosen, columns.rejected)
        if name
    }
    before = {conversation for conversation, _ in answers.values()}
    if len(before) > 1:
        detail = f"the messages before the answer are not those of column {columns.chosen!r}."
        raise BadRow("prompt mismatch", columns.rejected, detail)
    messages = _join(given, before.pop() if before else (), columns)
    messages = _with_system(values.get(columns.system or ""), messages, columns.system)
    _check_prompt(messages, columns.prompt or columns.chosen)
    chosen = answers[columns.chosen][1] if columns.chosen else None
    rejected = answers[columns.rejected][1] if columns.rejected else None
    if chosen and rejected and chosen.strip() == rejected.strip():
        detail = f"both are {shortened(chosen)}, so there is no preference."
        raise BadRow("chosen equals rejected", columns.rejected, detail)
    return Prompt(
        id=_identity(values, columns.prompt_id, messages),
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        row=row,
    )


def _is_plain_text(value: Any, column: str) -> bool:
    try:
        return isinstance(unwrapped(value, column), str)
    except BadRow:  # `parse` reports it
        return False


def canonical_json(value: Any) -> bytes:
    """Writes a value as JSON in one fixed form, for digests: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _value(values: Mapping[str, Any], column: str, if_null: str) -> Any:
    if column not in values:
        raise BadRow("missing column", column, f"this row has only {', '.join(values)}.")
    if values[column] is None:
        raise BadRow(if_null, column, "the value is null.")
    return values[column]


def _score(values: Mapping[str, Any], column: str) -> float:
    found = as_number(_value(values, column, "no number"))
    if found is None:
        raise BadRow("no number", column, f"{shortened(values[column])} is not a finite number.")
    return found


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        detail = f"{shortened(value)} is neither text nor a list of messages."
        raise BadRow("wrong type", column, detail)
    messages = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            detail = (
                f"message {number} is {shortened(item)}; expected an object with role and content."
            )
            raise BadRow("bad message", column, detail)
        # In Parquet every message has every key that one of them has, with null if it is missing.
        extra = [k for k, v in item.items() if k not in ("role", "content") and v is not None]
        if item["role"] not in ROLES or not isinstance(item["content"], str) or extra:
            detail = (
                f"message {number} has role {item['role']!r}, content of type "
                f"{type(item['content']).__name__} and other keys {extra}; expected one of the "
                f"roles {', '.join(ROLES)}, a string, and no other keys."
            )
            raise BadRow("bad message", column, detail)
        messages.append(Message(item["role"], item["content"]))
    return tuple(messages)


def _answer(value: Any, column: str) -> tuple[tuple[Message, ...], str]:
    """Returns (messages before the answer, text of the answer) for a cell with an answer."""
    if isinstance(value, str):
        before, text = (), value
    else:
        messages = _messages(value, column)
        if not messages or messages[-1].role != "assistant":
            detail = "the last message is not from the assistant."
            raise BadRow("no assistant answer", column, detail)
        before, text = messages[:-1], messages[-1].content
    if not text.strip():
        raise BadRow("empty response", column, "the answer has no text.")
    return before, text


def _join(given: Any, before: tuple[Message, ...], columns: Columns) -> tuple[Message, ...]:
    """Combines the prompt column, if there is one, with the messages that precede the answer."""
    if given is None:
        return before
    if isinstance(given, str):
        if not given.strip():
            raise BadRow("empty prompt", columns.prompt, f"the text is {given!r}.")
        # UltraFeedback's `prompt` repeats one user turn; the conversation has them all.
        agrees = any(m.role == "user" and m.content.strip() == given.strip() for m in before)
        messages = before or (Message("user", given),)
    else:
        messages = _messages(given, columns.prompt or "")
        agrees = messages == before
    if before and not agrees:
        detail = f"this prompt differs from the one in the conversation of {columns.chosen!r}."
        raise BadRow("prompt mismatch", columns.prompt, detail)
    return messages


def _with_system(
    system: Any, messages: tuple[Message, ...], column: str | None
) -> tuple[Message, ...]:
    """Puts the message from the system column, if there is one, before the conversation."""
    if column is None or system is None:
        return messages
    if not isinstance(system, str):
        raise BadRow("wrong type", column, f"{shortened(system)} is not text.")
    if not system.strip():
        return messages
    first = next((m.content for m in messages if m.role == "system"), None)
    if first is None:
        return (Message("system", system), *messages)
    if first.strip() != system.strip():
        detail = f"the conversation already has the system message {shortened(first)}."
        raise BadRow("two system messages", column, detail)
    return messages


def _check_prompt(messages: tuple[Message, ...], column: str | None) -> None:
    if not messages:
        raise BadRow("empty prompt", column, "there is no message.")
    if messages[-1].role != "user":
        detail = f"the last message has the role {messages[-1].role!r}."
        raise BadRow("last message not a user turn", column, detail)
    for number, message in enumerate(messages, start=1):
        if message.role != "system" and not message.content.strip():
            raise BadRow("empty prompt", column, f"message {number} has no text.")


def _identity(values: Mapping[str, Any], column: str | None, messages: Iterable[Message]) -> str:
    if column is None:
        turns = canonical_json([[m.role, m.content] for m in messages])
        return hashlib.sha256(turns).hexdigest()[:16]
    found = _value(values, column, "missing id")
    if isinstance(found, bool) or not isinstance(found, str | int) or not str(found).strip():
        raise BadRow("missing id", column, f"{found!r} is neither text nor a whole number.")
    return str(found)
