"""What a ranker is, how one is built from its name, and the one check of scores.

A ranker gives every candidate response of every prompt one number; higher is better. The unit of
the number belongs to the ranker: only comparisons within one prompt are used for pairs.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64

from selm_jax.preferences.candidates import FeedbackError
from selm_jax.shell.ranges import ranges_of
from selm_jax.shell.user_code import FORM, is_user_code
from selm_jax.shell.words import did_you_mean

# Name -> where its builder stands. Strings, so that building one ranker imports that ranker's
# libraries and no other's.
BUILT_IN: Mapping[str, str] = {
    "sentiment": "selm_jax.feedback.rules:sentiment",
    "length": "selm_jax.feedback.rules:length",
    "regex": "selm_jax.feedback.rules:regex",
    "pairrm": "selm_jax.feedback.models.pairrm:pairrm",
    "reward_model": "selm_jax.feedback.models.reward_model:reward_model",
    "verifiable": "selm_jax.feedback.rules:verifiable",
    "judge": "selm_jax.feedback.judge.ranker:judge",
    "mixture": "selm_jax.feedback.mixture:mixture",
    "human": "selm_jax.feedback.human:human",
}
_USER_FUNCTION = "selm_jax.feedback.workers:user_function"


@dataclass(frozen=True)
class Question:
    """One prompt whose responses are to be judged.

    Attributes:
        prompt: text of the last user turn.
        messages: the whole conversation; objects with `.role` and `.content`.
        row: the dataset row's other columns, by name; lists and objects among them.
        id: names the prompt in files and in errors.
    """

    prompt: str
    messages: tuple[Any, ...]
    row: Mapping[str, Any]
    id: str

    def own_row(self) -> dict[str, Any]:
        """A copy of the row: a rule that adds to it, or to a list in it, reaches no other call."""
        return copy.deepcopy(dict(self.row))


@runtime_checkable  # so that a run-time check of annotations can read it
class Ranker(Protocol):
    """Scores candidate responses. An implementation ends with `return check_scores(...)`.

    It may also have a method `report() -> dict[str, int | float]`: counts of its last `scores`,
    such as requests and cost, which are added up where it is asked in parts; see `reported`. And
    attributes: `relative`, true if its scores compare the candidates that were given together
    (`is_relative`); `together`, of one that reads prompts in groups (`prompts_together`);
    `folders`, of the models that it reads, on whose bytes its scores depend (`folders_of`). And a
    method `check(questions)`, which raises for rows that it will not be able to use (`check_asked`).
    """

    @property
    def name(self) -> str:
        """Names the ranker in reports and errors."""
        ...

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """One array per question, one score per candidate; higher is better. NaN stands where a
        judge was asked and its answer could not be read; nothing else may give it.

        Args:
            questions: the prompts.
            candidates: per prompt its responses; prompts may differ in how many they have.

        Raises:
            FeedbackError: a score is missing, not a number or not finite.
        """
        ...


def build(name: str, /, **settings: Any) -> Ranker:
    """Builds the ranker called `name`.

    Args:
        name: a key of `BUILT_IN`, or `package.module:function` for a function
            `(prompt: str, response: str, row: dict) -> float`.
        settings: the ranker's own settings, such as `target` for `length`. A user's function
            takes those of `workers.user_function`; its own belong in its module.

    Raises:
        FeedbackError: unknown name, unknown or missing setting, or a setting the ranker refuses.
    """
    if not isinstance(name, str):
        raise FeedbackError(f"{name!r} is no name of a ranker; expected a text.")
    path = (name,) if is_user_code(name) else ()
    found = _USER_FUNCTION if path else BUILT_IN.get(name)
    if found is None:
        raise FeedbackError(
            f"unknown ranker {name!r}{did_you_mean(name, BUILT_IN)} Expected one of "
            f"{_listed(BUILT_IN)}, or your own function as {FORM!r}."
        )
    module, _, attribute = found.partition(":")
    builder = getattr(importlib.import_module(module), attribute)
    parameters = inspect.signature(builder).parameters
    _check_settings(
        name, settings, {k: p for k, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY}
    )
    for key, declared in ranges_of(builder).items():
        if key not in settings or (settings[key] is None and parameters[key].default is None):
            continue
        if (expected := declared.problem(settings[key])) is not None:
            raise FeedbackError(
                f"ranker {name!r}: {key} is {settings[key]!r}; expected {expected}."
            )
        settings[key] = declared.converted(settings[key])
    return builder(*path, **settings)


def reported(ranker: Ranker) -> dict[str, int | float]:
    """What a ranker tells of its last `scores`; empty if it tells nothing."""
    report = getattr(ranker, "report", None)
    return {} if report is None else report()


def counted(report: Mapping[str, int | float], what: str) -> int:
    """The sum of one count over the parts of a mixture, which stand in its report under their names."""
    return sum(int(n) for key, n in report.items() if key.rpartition("/")[2] == what)


def is_relative(ranker: Ranker) -> bool:
    """Whether a score says how a candidate stands among the others of its prompt and nothing else,
    so that a mean over prompts is no measure of a policy."""
    return getattr(ranker, "relative", False)


def folders_of(ranker: Ranker) -> tuple[Path, ...]:
    """The folders of the models that a ranker is, if it is any."""
    return getattr(ranker, "folders", ())


def check_asked(ranker: Ranker, questions: Sequence[Question]) -> None:
    """Has a ranker that reads the rows' columns look at them before anything is paid for.

    Raises:
        FeedbackError: it cannot use a row; the message names the prompt.
    """
    check = getattr(ranker, "check", None)
    if check is not None:
        check(questions)


def prompts_together(ranker: Ranker) -> int:
    """How many prompts, from the first on, a ranker reads as a group: asked about a part of a group,
    it gives other scores."""
    return getattr(ranker, "together", 1)


def scores_beside(
    scores: Callable[[Sequence[Question], Sequence[Sequence[str]]], Sequence[np.ndarray]],
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    others: Sequence[str],
) -> list[list[float]]:
    """By prompt, the score of each answer beside the prompt's one text in `others`, and no other: only
    so do the scores that a relative ranker gives two policies measure the same."""
    found = iter(
        scores(
            [q for q, each in zip(questions, answers, strict=True) for _ in each],
            [[text, one] for each, one in zip(answers, others, strict=True) for text in each],
        )
    )
    return [[float(next(found)[0]) for _ in each] for each in answers]


def _check_settings(
    name: str, settings: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    for key in settings:
        if key not in parameters:
            raise FeedbackError(
                f"ranker {name!r}: unknown setting {key!r}{did_you_mean(key, parameters)} "
                f"It takes {_listed(parameters) or 'no settings'}."
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise FeedbackError(
                f"ranker {name!r}: the setting {key!r} is missing and has no default."
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(each) for each in names)


def check_questions(
    name: str, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
) -> None:
    """Refuses questions and candidates that do not belong together.

    Raises:
        FeedbackError: not one list of candidates per question, or a bare string for a list
            (its letters would be scored as responses).
    """
    if len(questions) != len(candidates):
        raise FeedbackError(
            f"ranker {name!r}: found {len(questions)} questions and {len(candidates)} lists of "
            "candidates; expected one list per question."
        )
    for question, texts in zip(questions, candidates, strict=True):
        if isinstance(texts, str):
            raise FeedbackError(
                f"ranker {name!r}, prompt {question.id!r}: the candidates are one string; "
                "expected a list of strings."
            )


def check_scores(
    name: str,
    questions: Sequence[Question],
    candidates: Sequence[Sequence[str]],
    scores: Sequence[Any],
    unread: Sequence[Bool[np.ndarray, " candidates"]] | None = None,
) -> list[Float64[np.ndarray, " candidates"]]:
    """The one check every score passes: one finite real number per candidate.

    Args:
        name: the ranker's name, for the error.
        questions: the prompts.
        candidates: per prompt its responses.
        scores: per prompt a list or array of numbers, as the ranker made them.
        unread: per prompt which candidates a judge said nothing readable about. They get NaN,
            whatever stands in `scores`.

    Returns:
        Per prompt a new float64 array `[candidates]`.

    Raises:
        FeedbackError: wrong shape, or a score that is no finite number; names the ranker, the
            prompt's id and the candidate's index (from 0).
    """
    check_questions(name, questions, candidates)
    if len(scores) != len(questions):
        raise FeedbackError(
            f"ranker {name!r}: {len(questions)} prompts went in, scores for {len(scores)} came "
            "out; expected one row of scores per prompt."
        )
    checked = []
    nowhere = [np.zeros(len(texts), bool) for texts in candidates]
    for question, texts, row, gaps in zip(
        questions, candidates, scores, nowhere if unread is None else unread, strict=True
    ):
        where = f"ranker {name!r}, prompt {question.id!r}"
        values = row_values(row, len(texts))
        if values is None:
            raise FeedbackError(
                f"{where}: found scores {row!r}; expected one number for each of its "
                f"{len(texts)} candidates."
            )
        numbers = [
            np.nan if gap else finite_number(value, f"{where}, candidate {i}")
            for i, (value, gap) in enumerate(zip(values, gaps, strict=True))
        ]
        checked.append(np.array(numbers, dtype=np.float64))
    return checked


def row_values(row: Any, count: int) -> Sequence[Any] | np.ndarray | None:
    """A list or array of scores as `count` values, or None when it is anything else."""
    if hasattr(row, "shape"):
        array = np.asarray(row)  # one transfer for a device array, not one per element
        return array if array.shape[:1] == (count,) else None
    is_list = isinstance(row, Sequence) and not isinstance(row, str)
    return row if is_list and len(row) == count else None


def finite_number(value: Any, where: str) -> float:
    """The score as a float.

    Raises:
        FeedbackError: it is no single finite real number; `where` stands before what was found.
    """
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged nest of lists
        array = None
    # Kinds: bool, signed, unsigned, float. A string that reads like a number is still refused.
    if array is None or array.ndim or array.dtype.kind not in "biuf":
        raise FeedbackError(
            f"{where}: the score is {value!r} ({type(value).__name__}); expected one real number."
        )
    number = float(array)
    if not np.isfinite(number):
        raise FeedbackError(
            f"{where}: the score is {number}; expected a finite number. A response that cannot "
            "be judged needs a low score of your choice."
        )
    return number
