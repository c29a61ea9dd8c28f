"""Asks MT-Bench's judge with FastChat's prompts, through any OpenAI-compatible server.

`single` rates each turn's answer from 1 to 10; `pair` compares two models in both orders. Questions
of math, reasoning and coding are judged with a reference answer. Unlike FastChat's parser, this one
never guesses: two different verdicts, a rating outside 1 to 10, or a number in single brackets
without "rating" before it (such as a citation) are malformed, and get FastChat's marks for that:
score -1 or winner "error". They are counted, and left out of every mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import string
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.files import Journal, read_rows, text_of
from selm_jax.evaluation.benchmarks.mt_bench.answer import ACCEPT, TURNS, Question
from selm_jax.evaluation.benchmarks.mt_bench.judgments import is_malformed, unread
from selm_jax.evaluation.cost import CHARACTERS_PER_TOKEN, Cost
from selm_jax.feedback.judge.answer import Completion
from selm_jax.feedback.judge.client import Client, Messages
from selm_jax.feedback.judge.prompts import read_rating, read_verdict
from selm_jax.shell.progress import Advance

WITH_REFERENCE = ("math", "reasoning", "coding")
# SHA-256 of the JSON list of [name, system_prompt, prompt_template], sorted by name.
PROMPTS_SHA256 = "03f3288b54a93131039a987cb8b2bc724c260b43b5ace8f02b5be6681b96b087"
# (mode, with reference, turn) -> name in judge_prompts.jsonl
PROMPTS: Mapping[tuple[str, bool, int], str] = {
    ("single", False, 1): "single-v1",
    ("single", True, 1): "single-math-v1",
    ("single", False, 2): "single-v1-multi-turn",
    ("single", True, 2): "single-math-v1-multi-turn",
    ("pair", False, 1): "pair-v2",
    ("pair", True, 1): "pair-math-v1",
    ("pair", False, 2): "pair-v2-multi-turn",
    ("pair", True, 2): "pair-math-v1-multi-turn",
}
_GIVE_UP = 20  # give up on a judge whose first 20 verdicts are all malformed

Answers = Mapping[int, tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of the judge. The defaults are FastChat's values.

    Attributes:
        extra: more fields of each request; see `Client.complete`.
    """

    temperature: float = 0.0
    max_tokens: int = 2048
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The arguments for `Client.complete`, which are also recorded with each verdict."""
        named = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return named | ({"extra": dict(self.extra)} if self.extra else {})


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    name: str
    system: str
    template: str


@dataclasses.dataclass(frozen=True)
class Match:
    """One judgment to request: on a turn of a question, for one model or for two.

    Attributes:
        prompt: the name of the judge's prompt.
        system, asked: the system message, and the user message of each call (a pair has two).
    """

    question: int
    turn: int
    models: tuple[str, ...]
    prompt: str
    system: str
    asked: tuple[str, ...]

    def conversations(self) -> list[Messages]:
        return [
            [{"role": "system", "content": self.system}, {"role": "user", "content": text}]
            for text in self.asked
        ]


def read_prompts(file: Path, unpublished: bool = False) -> dict[str, JudgePrompt]:
    """Reads the judge's prompts from FastChat's judge_prompts.jsonl; returns them by name.

    Raises:
        EvaluationError: a prompt is missing, has wrong placeholders, or differs from the published
            one.
    """
    rows = read_rows(file)
    keys = ("name", "system_prompt", "prompt_template")
    listed = sorted([text_of(row, key, file, i) for key in keys] for i, row in enumerate(rows))
    prompts = {name: JudgePrompt(name, system, template) for name, system, template in listed}
    for (mode, with_reference, turn), name in PROMPTS.items():
        if name not in prompts:
            raise EvaluationError(f"{file}: the prompt {name!r} is missing. Use FastChat's file.")
        wanted = _fields(mode, with_reference, turn)
        found = {field for _, field, _, _ in string.Formatter().parse(prompts[name].template)}
        if found - {None} != wanted:
            raise EvaluationError(
                f"{file}, prompt {name!r}: expected the placeholders {', '.join(sorted(wanted))}."
            )
    if (
        hashlib.sha256(json.dumps(listed).encode()).hexdigest() != PROMPTS_SHA256
        and not unpublished
    ):
        raise EvaluationError(
            f"{file}: these are not MT-Bench's prompts, or they were changed. {ACCEPT}."
        )
    return prompts


def matches(
    mode: str,
    questions: Sequence[Question],
    answers: Sequence[tuple[str, Answers]],
    references: Answers,
    prompts: Mapping[str, JudgePrompt],
) -> list[Match]:
    """Lists the judgments to request, of one model or of two compared, in FastChat's order.

    Args:
        answers: (name, answers) of each model.
        references: reference answers, at least for the categories `WITH_REFERENCE`.
    """
    models = tuple(name for name, _ in answers)
    found = []
    for turn in (1, 2):
        for question in questions:
            with_reference = question.category in WITH_REFERENCE
            prompt = prompts[PROMPTS[mode, with_reference, turn]]
            orders = [answers] if mode == "single" else [answers, answers[::-1]]
            values = [
                _values(question, [each[question.id] for _, each in order], references)
                for order in orders
            ]
            asked = tuple(prompt.template.format(**each) for each in values)
            found.append(Match(question.id, turn, models, prompt.name, prompt.system, asked))
    return found


async def ask(
    mode: str,
    todo: Sequence[Match],
    repeats: int,
    client: Client,
    journal: Journal,
    sampling: Sampling,
    progress: Advance = lambda judgments, tokens=0: None,
) -> list[dict[str, Any]]:
    """Asks the judge for every verdict that is missing; returns the rows of all verdicts.

    Verdicts are written to the file. Malformed ones are held back until one can be read: if none
    can, nothing is kept, and a repaired judge is asked again.

    Raises:
        EvaluationError: a verdict in the file is about other answers or settings, or all of the
            first verdicts are malformed.
        selm_jax.feedback.judge.budget.JudgeError: the server gave no answer.
    """
    watch = _Watch()
    try:
        async with client:
            for repeat in range(repeats):
                left = [
                    m
                    for m in todo
                    if not _is_there(m, mode, repeat, client.model, sampling, journal)
                ]
                progress(len(todo) - len(left), 0)
                if left:
                    await _ask_once(mode, left, repeat, client, journal, sampling, watch, progress)
        if watch.held:  # only a few were left to judge: look at the earlier verdicts as well
            if all(is_malformed(row) for row in journal.rows.values()):
                raise watch.given_up()
            journal.add(watch.held)
    except _GivenUp:
        # Only now, when the answers that were under way have arrived in the cache.
        for repeat in range(repeats):
            left = [m for m in todo if (m.question, m.turn, m.models, repeat) not in journal.rows]
            client.forget(
                (messages for match in left for messages in match.conversations()),
                _is_unreadable_single if mode == "single" else _is_unreadable_game,
                draw=repeat, **sampling.fields(),
            )  # fmt: skip
        raise
    return [
        journal.rows[match.question, match.turn, match.models, repeat]
        for repeat in range(repeats)
        for match in todo
    ]


async def _ask_once(
    mode: str,
    todo: Sequence[Match],
    repeat: int,
    client: Client,
    journal: Journal,
    sampling: Sampling,
    watch: _Watch,
    progress: Advance,
) -> None:
    calls = [(match, messages) for match in todo for messages in match.conversations()]
    each = len(todo[0].asked)
    answers: dict[int, Completion] = {}
    to_row = _single if mode == "single" else _pair

    def read(number: int, answer: Completion) -> None:
        answers[number] = answer
        first = number - number % each
        if all(i in answers for i in range(first, first + each)):
            match = calls[number][0]
            whole = [answers[i] for i in range(first, first + each)]
            row = to_row(match, client.model, whole) | {
                "turn": match.turn, "tstamp": time.time(), "repeat": repeat,
                "sampling": sampling.fields(),
            }  # fmt: skip
            if ready := watch.whole(row):
                journal.add(ready)
            progress(1, sum(a.usage.total for a in whole if a.usage))

    await client.complete_all(
        (messages for _, messages in calls), read=read, draw=repeat, **sampling.fields()
    )


class _GivenUp(EvaluationError):
    pass


@dataclasses.dataclass
class _Watch:
    """Holds back a judge's verdicts until one is readable; raises if the first ones all are not."""

    understood: bool = False
    held: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def whole(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Adds a verdict; returns the verdicts that can be written to the file now."""
        if len(self.held) >= _GIVE_UP:  # already given up; this one was under way
            return []
        self.understood |= not is_malformed(row)
        self.held.append(row)
        if self.understood:
            ready, self.held = self.held, []
            return ready
        if len(self.held) >= _GIVE_UP:
            raise self.given_up()
        return []

    def given_up(self) -> _GivenUp:
        return _GivenUp(
            f"the judge's first {len(self.held)} verdicts cannot be read, such as the one "
            f"{unread(self.held[-1])}. Expected [[rating]], or [[A]], [[B]] or [[C]]. They are not "
            "kept. Use another judge, or run again when this one is repaired."
        )


def score_of(answer: Completion) -> float:
    """Parses the judge's rating in [[ ]], or in [ ] after "rating"; -1 if there is none."""
    found = read_rating(answer)
    if found is None and "[[" not in answer.text:
        values = {float(x) for x in _SINGLE.findall(answer.text)}
        found = values.pop() if len(values) == 1 and 1 <= min(values) <= 10 else None
    if found is None:
        return -1
    return int(found) if found == int(found) else found  # 7 and 7.5, like FastChat


def _is_unreadable_single(answer: Completion) -> bool:
    return score_of(answer) == -1


def _is_unreadable_game(answer: Completion) -> bool:
    return winner_of(answer, "model_1", "model_2") == "error"


_SINGLE = re.compile(r"rating\W{0,4}\[(\d+(?:\.\d+)?)\]", re.IGNORECASE)


def winner_of(answer: Completion, first: str, second: str) -> str:
    verdict = read_verdict(answer)
    if verdict is None:
        return "error"
    return "tie" if verdict == 0.5 else first if verdict == 1 else second


def cost(todo: Sequence[Match], judge: str, left: int, longest: int) -> Cost:
    """Estimates the cost of the judgments that are still missing.

    Args:
        left: number of judgments that are not in the file yet.
        longest: tokens of the judge's answer, plus an allowance for answers not generated yet.
    """
    calls = len(todo[0].asked)
    characters = sum(len(m.system) + len(text) for m in todo for text in m.asked)
    tokens = characters // CHARACTERS_PER_TOKEN + len(todo) * calls * longest
    return Cost(judge, judge_calls=left * calls, judge_tokens=tokens * left // len(todo))


def left_of(todo: Sequence[Match], repeats: int, journal: Journal) -> int:
    return sum(
        (m.question, m.turn, m.models, repeat) not in journal.rows
        for m in todo
        for repeat in range(repeats)
    )


def _single(match: Match, judge: str, answers: Sequence[Completion]) -> dict[str, Any]:
    return {
        "question_id": match.question,
        "model": match.models[0],
        "judge": [judge, match.prompt],
        "user_prompt": match.asked[0],
        "judgment": answers[0].text,
        "score": score_of(answers[0]),
    }


def _pair(match: Match, judge: str, answers: Sequence[Completion]) -> dict[str, Any]:
    first, second = answers
    return {
        "question_id": match.question,
        "model_1": match.models[0],
        "model_2": match.models[1],
        "g1_winner": winner_of(first, "model_1", "model_2"),
        "g2_winner": winner_of(second, "model_2", "model_1"),
        "judge": [judge, match.prompt],
        "g1_user_prompt": match.asked[0],
        "g1_judgment": first.text,
        "g2_user_prompt": match.asked[1],
        "g2_judgment": second.text,
    }


def _is_there(
    match: Match, mode: str, repeat: int, judge: str, sampling: Sampling, journal: Journal
) -> bool:
    row = journal.rows.get((match.question, match.turn, match.models, repeat))
    if row is None:
        return False
    keys = ("user_prompt",) if mode == "single" else ("g1_user_prompt", "g2_user_prompt")
    where = f"{journal.file}: question {match.question}, turn {match.turn}, of {match.models}"
    if tuple(row.get(key) for key in keys) != match.asked or row["judge"] != [judge, match.prompt]:
        raise EvaluationError(
            f"{where}: this judgment is about other texts or by another judge. Delete the file, or "
            "choose another folder with --out."
        )
    if row.get("sampling", Sampling().fields()) != sampling.fields():
        raise EvaluationError(
            f"{where}: the file's judgment used the settings {row['sampling']}, not the present "
            f"{sampling.fields()}. Delete the file, or choose another folder with --out."
        )
    return True


def _values(
    question: Question, answers: Sequence[tuple[str, str]], references: Answers
) -> dict[str, str]:
    """The values of all placeholders that a judge's prompt may contain."""
    values = {"question": question.turns[0]}
    named = {"a": 0, "b": 1}
    for turn in range(TURNS):
        values[f"question_{turn + 1}"] = question.turns[turn]
        values[f"answer_{turn + 1}"] = answers[0][turn]
        if question.id in references:
            values[f"ref_answer_{turn + 1}"] = references[question.id][turn]
        for letter, i in named.items():
            if i < len(answers):
                values[f"answer_{letter}_{turn + 1}"] = answers[i][turn]
    values["answer"] = answers[0][0]
    for letter, i in named.items():
        if i < len(answers):
            values[f"answer_{letter}"] = answers[i][0]
    return values


def _fields(mode: str, with_reference: bool, turn: int) -> set[str]:
    answers = ["answer"] if mode == "single" else ["answer_a", "answer_b"]
    if turn == 1:
        return {"question", *answers} | ({"ref_answer_1"} if with_reference else set())
    fields = {f"{name}_{i}" for name in ("question", *answers) for i in (1, 2)}
    return fields | ({"ref_answer_1", "ref_answer_2"} if with_reference else set())
