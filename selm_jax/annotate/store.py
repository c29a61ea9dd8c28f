"""Stores questions for annotators, and their rankings, in one SQLite file.

Nothing that a person does is changed or deleted: every ranking, skip and undo is a row of a log,
and a person's last row for a question counts. Methods that write return after the row is on disk
(write-ahead log, synchronous=FULL). The file must be on a local disk, because the write-ahead log
uses memory shared between processes, which network file systems do not support.

Questions are identified by the digest of their texts. So a run that asks the same question again
finds the existing rankings, and a run whose texts have changed does not find old ones.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from selm_jax.annotate.checks import (
    AnnotationError,
    check_comment,
    check_minimum,
    check_name,
    is_ranking,
)
from selm_jax.shell.paths import make_private

_SCHEMA = """
create table if not exists questions (
    digest text primary key,
    prompt_id text not null,
    messages text not null,
    answers text not null
) strict;
create table if not exists batches (
    batch text not null,
    position integer not null,
    question text not null references questions,
    minimum integer not null,
    primary key (batch, question)
) strict;
create table if not exists events (
    id integer primary key autoincrement,
    request text not null unique,
    question text not null references questions,
    annotator text not null,
    kind text not null check (kind in ('rank', 'skip', 'undo')),
    ranks text,
    shown text,
    seconds real,
    at text not null,
    comment text
) strict;
create index if not exists events_of on events (question, annotator, id);
create view if not exists judgements as
    select * from events as e
    where kind != 'undo' and not exists (
        select 1 from events as later
        where later.question = e.question and later.annotator = e.annotator and later.id > e.id
    );
"""
# A question is closed when `minimum` people have ranked it, or `minimum` people have skipped it.
_OPEN = """
select b.question, b.position, count(j.id) as judged from batches as b
left join judgements as j on j.question = b.question
where b.batch = :batch group by b.question
having coalesce(sum(j.kind = 'rank'), 0) < b.minimum
    and coalesce(sum(j.kind = 'skip'), 0) < b.minimum
"""


@dataclass(frozen=True)
class Item:
    """A question for annotators: a conversation, and distinct answers to its last turn.

    Attributes:
        prompt_id: the id of the prompt for people; the digest identifies the question.
        messages: role and content of every turn.
        answers: at least two different texts.
    """

    prompt_id: str
    messages: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.answers) < 2 or len(set(self.answers)) < len(self.answers):
            raise AnnotationError(
                f"prompt {self.prompt_id!r}: answers: {len(self.answers)}, distinct: "
                f"{len(set(self.answers))}; expected at least two answers, all distinct."
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the question's texts, in hex; depends on the order of the answers."""
        return hashlib.sha256(_texts(self.messages, self.answers)).hexdigest()


@dataclass(frozen=True)
class Judgement:
    """One person's ranking or skip of one question.

    Attributes:
        question: digest of the question.
        annotator: the person's name.
        ranks: for each answer, 1 + the number of better ones; None for a skipped question.
        seconds: how long the question was on the person's page; None if unknown.
        comment: the person's comment; None if there is none.
    """

    question: str
    annotator: str
    ranks: tuple[int, ...] | None
    seconds: float | None
    comment: str | None = None


@dataclass(frozen=True)
class Progress:
    """The numbers of done and open questions in a batch, in total and for one annotator.

    Attributes:
        questions: number of questions in the batch.
        closed: questions that enough people have ranked or skipped.
        mine: questions that this person has ranked or skipped.
        left: open questions that this person has not ranked or skipped.
        seconds: median time of this person per question; None before the first one.
    """

    questions: int
    closed: int
    mine: int
    left: int
    seconds: float | None


class Annotations:
    """An SQLite file of questions and people's rankings. Several processes may open it at once."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            make_private(self.path)
            with self._open() as database:
                database.execute("pragma journal_mode = wal")
                database.executescript(_SCHEMA)
                _add_comments(database)
        except (OSError, sqlite3.Error) as error:
            raise AnnotationError(
                f"{self.path}: cannot be opened as a file of annotations: {error}. Name a file "
                "that `selm annotate` made, or a new file, on a local disk."
            ) from error

    # Questions

    def put(self, batch: str, items: Sequence[Item], minimum: int = 1) -> None:
        """Stores questions as a batch, in this order, and replaces an older batch of the same name.

        Args:
            minimum: the number of people who should rank each question.
        """
        check_minimum(minimum)
        with self._open() as database:
            database.execute("begin immediate")
            database.executemany(
                "insert or ignore into questions values (?, ?, ?, ?)",
                [(i.digest, i.prompt_id, _json(i.messages), _json(i.answers)) for i in items],
            )
            database.execute("delete from batches where batch = ?", (batch,))
            database.executemany(  # a question that occurs twice is asked once
                "insert or ignore into batches values (?, ?, ?, ?)",
                [(batch, n, item.digest, minimum) for n, item in enumerate(items)],
            )
            database.execute("commit")

    def batches(self) -> dict[str, int]:
        """The number of questions in each batch, by the batch's name."""
        with self._open() as database:
            return dict(database.execute("select batch, count(*) from batches group by batch"))

    def items(self, batch: str) -> list[Item]:
        with self._open() as database:
            rows = database.execute(
                "select q.* from batches join questions as q on q.digest = question "
                "where batch = ? order by position",
                (batch,),
            )
            return [_item(row) for row in rows]

    def item(self, question: str) -> Item:
        """Reads the question that has this digest. Raises AnnotationError if there is none."""
        with self._open() as database:
            return _item(self._row(database, question))

    def open_questions(self, batch: str, annotator: str) -> list[str]:
        """Digests of an annotator's open questions; questions answered by others come first."""
        with self._open() as database:
            rows = database.execute(
                f"select question from ({_OPEN}) as o where not exists (select 1 from judgements "
                "as j where j.question = o.question and j.annotator = :annotator) "
                "order by judged desc, position",
                {"batch": batch, "annotator": annotator},
            )
            return [row["question"] for row in rows]

    def _row(self, database: sqlite3.Connection, question: str) -> sqlite3.Row:
        row = database.execute("select * from questions where digest = ?", (question,)).fetchone()
        if row is None:
            raise AnnotationError(
                f"{self.path}: there is no question {question!r}. Reload the page, or use the "
                "annotations file that has this question."
            )
        return row

    # Rankings

    def judge(
        self,
        question: str,
        annotator: str,
        ranks: Sequence[int] | None,
        *,
        request: str,
        shown: Sequence[int] | None = None,
        seconds: float | None = None,
        comment: str | None = None,
    ) -> bool:
        """Stores one person's ranking of a question's answers, or a skip if `ranks` is None.

        Args:
            question: digest of the question.
            ranks: for each answer, 1 + the number of better ones.
            request: unique id of this action; a repeated request is not stored again.
            shown: the order in which the person saw the answers.
            seconds: how long the person took.
            comment: the person's comment, at most `LONGEST_COMMENT` characters.

        Returns:
            Whether the action is new.

        Raises:
            AnnotationError: the question is unknown, or the name, comment or ranks are not valid.
        """
        name, comment = check_name(annotator), check_comment(comment)
        with self._open() as database:
            row = self._row(database, question)
            count = len(json.loads(row["answers"]))
            if ranks is not None and (len(ranks) != count or not is_ranking(ranks)):
                raise AnnotationError(
                    f"prompt {row['prompt_id']!r}: found the ranks {list(ranks)!r}; expected one "
                    f"for each of {count} answers, namely 1 + the number of better ones (two tied "
                    "for first place are followed by rank 3)."
                )
            kind = "skip" if ranks is None else "rank"
            values = (_json(ranks), _json(shown), seconds, comment)
            return _note(database, request, question, name, kind, *values)

    def undo(self, batch: str, annotator: str, *, request: str) -> tuple[Item, Judgement] | None:
        """Undoes a person's last ranking or skip in a batch.

        Returns:
            The question and the undone judgement; None if there is nothing to undo. A repeated
            request undoes nothing more and returns the same.
        """
        name = check_name(annotator)
        with self._open() as database:
            database.execute("begin immediate")
            done = database.execute(
                "select question from events where request = ?", (request,)
            ).fetchone()
            row = database.execute(
                "select e.*, q.* from events as e join questions as q on q.digest = e.question "
                + (
                    "where e.question = :question and e.annotator = :annotator and kind != 'undo' "
                    if done
                    else "where e.annotator = :annotator and e.id in (select id from judgements) "
                    "and e.question in (select question from batches where batch = :batch) "
                )
                + "order by e.id desc limit 1",
                {"annotator": name, "batch": batch, "question": done and done["question"]},
            ).fetchone()
            if row is not None:
                _note(database, request, row["question"], name, "undo", *[None] * 4)
            database.execute("commit")
            return None if row is None else (_item(row), _judgement(row))

    def judgements(self, batch: str) -> list[Judgement]:
        """Each annotator's latest ranking or skip of every question in a batch, oldest first."""
        with self._open() as database:
            rows = database.execute(
                "select * from judgements where question in "
                "(select question from batches where batch = ?) order by id",
                (batch,),
            )
            return [_judgement(row) for row in rows]

    def progress(self, batch: str, annotator: str = "") -> Progress:
        """Counts the closed questions of a batch, and one annotator's done and open questions."""
        with self._open() as database:
            names = {"batch": batch, "annotator": annotator}
            (questions,) = database.execute(
                "select count(*) from batches where batch = :batch", names
            ).fetchone()
            still_open = {row["question"] for row in database.execute(_OPEN, names)}
            mine = database.execute(
                "select question, seconds from judgements where annotator = :annotator and "
                "question in (select question from batches where batch = :batch)",
                names,
            ).fetchall()
        times = sorted(row["seconds"] for row in mine if row["seconds"] is not None)
        return Progress(
            questions=questions,
            closed=questions - len(still_open),
            mine=len(mine),
            left=len(still_open - {row["question"] for row in mine}),
            seconds=times[len(times) // 2] if times else None,
        )

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # Each call opens a connection: one belongs to a single thread, and the server has several.
        database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            database.row_factory = sqlite3.Row
            database.execute("pragma synchronous = full")
            database.execute("pragma foreign_keys = on")
            yield database
        finally:
            database.close()


def _note(database: sqlite3.Connection, request: str, *values: Any) -> bool:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    done = database.execute(
        "insert or ignore into events (request, question, annotator, kind, ranks, shown, seconds, "
        "comment, at) values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (request, *values, now),
    )
    return done.rowcount == 1


def _texts(*texts: Any) -> bytes:
    return json.dumps(texts).encode()  # ASCII, because a lone surrogate has no UTF-8 encoding


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _item(row: Mapping[str, Any] | sqlite3.Row) -> Item:
    messages = tuple((role, content) for role, content in json.loads(row["messages"]))
    return Item(row["prompt_id"], messages, tuple(json.loads(row["answers"])))


def _judgement(row: sqlite3.Row) -> Judgement:
    ranks = None if row["ranks"] is None else tuple(json.loads(row["ranks"]))
    return Judgement(row["question"], row["annotator"], ranks, row["seconds"], row["comment"])


def _add_comments(database: sqlite3.Connection) -> None:
    """Adds the column `comment` to a file that an earlier version made."""
    if not _has_comments(database):
        try:
            database.execute("alter table events add column comment text")
        except sqlite3.OperationalError:
            if not _has_comments(database):  # else another process has added it meanwhile
                raise


def _has_comments(database: sqlite3.Connection) -> bool:
    return "comment" in {row["name"] for row in database.execute("pragma table_info(events)")}
