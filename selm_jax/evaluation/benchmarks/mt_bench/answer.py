"""Generates answers to MT-Bench, 80 questions of two turns, in FastChat's format.

    FOLDER/                                  same layout as FastChat's data/mt_bench
      model_answer/MODEL.jsonl               answers, one line per question
      model_judgment/JUDGE_single.jsonl      judgments of any number of models (`judge`)
      model_judgment/JUDGE_pair.jsonl
      JUDGE_MODEL.json                       scores (`score`) and the files they are based on

The questions, the judge's prompts and the reference answers belong to FastChat and are not included
here (`question.jsonl`, `judge_prompts.jsonl`, `reference_answer/gpt-4.jsonl`). Their digests are,
so that other texts are not mistaken for MT-Bench.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.files import (
    TOGETHER,
    Journal,
    chunks,
    file_name,
    pinned,
    read_rows,
)
from selm_jax.evaluation.cost import Cost
from selm_jax.evaluation.model import Model
from selm_jax.policy.policy import PolicyError
from selm_jax.shell import artifacts
from selm_jax.shell.progress import Advance
from selm_jax.text.chat import ChatError
from selm_jax.text.conversations import Message

# Temperature by category, as in FastChat's temperature_config; 0 is greedy.
TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE = 0.7
TURNS = 2
# SHA-256 of the JSON list of [question_id, category, turns], in the order of the ids.
QUESTIONS_SHA256 = "a74770fe8520f4621ca7c4e8326c11a2044fec00499d0178602136fbcfaba1c2"
# SHA-256 of the published reference answers: of the JSON list of [question_id, first turn, second
# turn], in the order of the ids.
REFERENCES_SHA256 = "606194b8a0ba525f9b3dfcc67f330b267ebd820e01ac786fffa5fd14bd98ecea"
ACCEPT = "To use them anyway, add --unpublished; the record will say so"


@dataclasses.dataclass(frozen=True)
class Question:
    id: int
    category: str
    turns: tuple[str, str]

    @property
    def temperature(self) -> float:
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Settings for generating answers: FastChat's token limit and the seed."""

    max_new_tokens: int = 1024
    seed: int = 0


def read_questions(file: Path, unpublished: bool = False) -> list[Question]:
    """Reads MT-Bench's questions, sorted by id.

    Args:
        unpublished: accept other questions than MT-Bench's 80.

    Raises:
        EvaluationError: a row is not a question of two turns, an id appears twice, or the questions
            differ from the published ones.
    """
    found: dict[int, Question] = {}
    for i, row in enumerate(read_rows(file)):
        number, category, turns = (row.get(k) for k in ("question_id", "category", "turns"))
        if not (isinstance(number, int) and isinstance(category, str) and _are_texts(turns)):
            raise EvaluationError(
                f"{file}, row {i}: expected question_id, category and {TURNS} `turns` (text)."
            )
        if number in found:
            raise EvaluationError(
                f"{file}, row {i}: question {number} appears twice. Delete one of them."
            )
        found[number] = Question(number, category, (turns[0], turns[1]))
    questions = sorted(found.values(), key=lambda q: q.id)
    listed = json.dumps([[q.id, q.category, list(q.turns)] for q in questions])
    if hashlib.sha256(listed.encode()).hexdigest() != QUESTIONS_SHA256 and not unpublished:
        raise EvaluationError(
            f"{file}: its {len(questions)} questions are not the 80 of MT-Bench, or were changed. "
            f"{ACCEPT}."
        )
    return questions


def answer_file(folder: Path, name: str) -> Path:
    return folder / "model_answer" / f"{file_name(name)}.jsonl"


def answer(
    model: Model,
    questions: Sequence[Question],
    folder: Path,
    decoding: Decoding,
    name: str | None = None,
    progress: Advance = lambda answers, tokens=0: None,
) -> Path:
    """Generates answers to the questions that lack one; writes one JSON line per question.

    Questions are answered in batches; after both turns of a batch its lines are written to disk. At
    the end the lines are sorted by question.

    Raises:
        EvaluationError, ArtifactError, ChatError: the model cannot answer, or the existing file
            belongs to another model or other settings.
    """
    name = name or model.name
    file = answer_file(folder, name)
    stages, stage = artifacts.Stages(folder), f"answer {name}"
    listed = [[q.id, q.category, *q.turns] for q in questions]
    inputs = {
        "model": pinned(model),
        "questions": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
    }
    settings = dataclasses.asdict(decoding) | {"dtype": np.dtype(model.dtype).name}
    if stages.is_done(stage, inputs, settings):
        return file
    began = time.monotonic()
    stages.begin(stage, inputs, settings)
    journal = _answers(file)
    progress(TURNS * len(journal.rows), 0)
    for temperature in sorted({q.temperature for q in questions}):
        left = [q for q in questions if q.temperature == temperature and q.id not in journal.rows]
        for chunk in chunks(left, model.batches.slots or TOGETHER):
            journal.add(_both_turns(model, chunk, name, temperature, decoding, progress))
    rows = sorted(journal.rows.values(), key=lambda row: row["question_id"])
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    artifacts.write_text(file, "".join(lines))
    outputs = {str(file.relative_to(folder)): file}
    stages.finish(stage, inputs, settings, outputs, counts(rows), time.monotonic() - began)
    return file


def _both_turns(
    model: Model,
    questions: Sequence[Question],
    name: str,
    temperature: float,
    decoding: Decoding,
    progress: Advance,
) -> list[dict[str, Any]]:
    """Answers both turns; returns FastChat's rows plus `finish` and `tokens` of each turn."""
    conversations: list[list[Message]] = [[] for _ in questions]
    said: list[list[Any]] = [[] for _ in questions]
    for turn in range(TURNS):
        for conversation, question in zip(conversations, questions, strict=True):
            conversation.append(Message("user", question.turns[turn]))
        try:
            found = model.reply(
                conversations, temperature=temperature, progress=progress,
                **dataclasses.asdict(decoding),
            )  # fmt: skip
        except (PolicyError, ChatError) as error:  # it numbers the conversations of this batch
            ids = ", ".join(str(question.id) for question in questions)
            raise EvaluationError(f"turn {turn + 1} of the questions {ids}: {error}") from error
        for conversation, answers, (each,) in zip(conversations, said, found, strict=True):
            conversation.append(Message("assistant", each.text.strip()))
            answers.append(each)
    rows = []
    for question, conversation, answers in zip(questions, conversations, said, strict=True):
        turns = [m.content for m in conversation if m.role == "assistant"]
        choice = {
            "index": 0, "turns": turns, "finish": [a.finish for a in answers],
            "tokens": [len(a.token_ids) for a in answers],
        }  # fmt: skip
        rows.append(
            {
                "question_id": question.id,
                "answer_id": _answer_id(name, question.id, turns),
                "model_id": name,
                "choices": [choice],
                "tstamp": time.time(),
            }
        )
    return rows


def counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    choices = [row["choices"][0] for row in rows]
    return {
        "answers": TURNS * len(rows),
        "tokens": sum(sum(choice["tokens"]) for choice in choices),
        "cut_off": sum(choice["finish"].count("length") for choice in choices),
        "empty": sum(choice["turns"].count("") for choice in choices),
    }


def read_answers(
    file: Path, questions: Sequence[Question], what: str = "answers"
) -> tuple[str, dict[int, tuple[str, str]]]:
    """Reads a model's answers in FastChat's format: its name, and two answers per question.

    Args:
        questions: the questions that must be answered.

    Raises:
        EvaluationError: a question is missing or appears twice, a row is not an answer, or there
            are several models.
    """
    found: dict[int, tuple[str, str]] = {}
    names = set()
    for i, row in enumerate(read_rows(file)):
        try:
            number, turns = row["question_id"], row["choices"][0]["turns"]
            names.add(row["model_id"])
        except (LookupError, TypeError) as error:
            raise EvaluationError(
                f"{file}, row {i}: not an answer in FastChat's format: {error!r}. Correct the row."
            ) from error
        if not _are_texts(turns):
            raise EvaluationError(f"{file}, row {i}: `turns` must be {TURNS} strings. Correct it.")
        if number in found:
            raise EvaluationError(
                f"{file}, row {i}: question {number} is answered twice. Delete one of the answers."
            )
        found[number] = (turns[0], turns[1])
    missing = [q.id for q in questions if q.id not in found]
    if missing:
        raise EvaluationError(
            f"{file}: {what} to {len(missing)} questions are missing, such as "
            f"{', '.join(map(str, missing[:5]))}. Give a file with all of them."
        )
    if len(names) > 1:
        raise EvaluationError(
            f"{file} has {what} of several models: {', '.join(sorted(names))}; expected one model."
        )
    return names.pop(), found


def read_references(
    file: Path, questions: Sequence[Question], unpublished: bool = False
) -> dict[int, tuple[str, str]]:
    """Reads MT-Bench's reference answers, by question.

    Args:
        questions: the questions that are judged with a reference.
        unpublished: accept other answers than MT-Bench's.

    Raises:
        EvaluationError: the file is malformed (see `read_answers`), or the answers differ from the
            published ones.
    """
    _, found = read_answers(file, questions, "reference answers")
    listed = json.dumps([[q.id, *found[q.id]] for q in sorted(questions, key=lambda q: q.id)])
    if hashlib.sha256(listed.encode()).hexdigest() != REFERENCES_SHA256 and not unpublished:
        raise EvaluationError(
            f"{file}: these are not MT-Bench's reference answers, or they were changed. With other "
            f"references the judge's verdicts would differ. {ACCEPT}."
        )
    return found


def cost_of_answers(
    model: Model, questions: Sequence[Question], folder: Path, decoding: Decoding, name: str
) -> Cost:
    """An upper bound of the cost of the missing answers, at their maximum length."""
    done = _answers(answer_file(folder, name)).rows
    left = [q for q in questions if q.id not in done]
    first = model.prompt_ids([[Message("user", q.turns[0])] for q in left])
    both = model.prompt_ids(
        [[Message("user", q.turns[0]), Message("assistant", ""), Message("user", q.turns[1])]
         for q in left]
    )  # fmt: skip
    read = sum(map(len, first)) + sum(map(len, both)) + len(left) * decoding.max_new_tokens
    new = TURNS * len(left) * decoding.max_new_tokens
    return Cost(name, answers=TURNS * len(left), prompt_tokens=read, new_tokens=new)


def _answers(file: Path) -> Journal:
    return Journal(file, lambda row: row["question_id"])


def _are_texts(turns: Any) -> TypeGuard[list[str]]:
    return (
        isinstance(turns, list)
        and len(turns) == TURNS
        and all(isinstance(turn, str) for turn in turns)
    )


def _answer_id(name: str, question: int, turns: Sequence[str]) -> str:
    """An id that depends only on the answer; FastChat's ids are random."""
    text = json.dumps([name, question, *turns])
    return hashlib.sha256(text.encode()).hexdigest()[:22]
