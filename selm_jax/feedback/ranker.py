"""Defines the protocol of rankers, builds rankers by name, and checks their scores.

A ranker gives every candidate response of every prompt one number; higher is better. Each ranker
has its own scale: pairs are made only from comparisons within one prompt.
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

# Name -> its builder. These are strings, so that building a ranker imports only its own libraries.
BUILT_IN: Mapping[str, str] = {
    "sentiment": "selm_jax.feedback.rules:sentiment",
    "length": "selm_jax.feedback.rules:length",
    "regex": "selm_jax.feedback.rules:regex",
    "pairrm": "selm_jax.feedback.models.pairrm:pairrm",
    "reward_model": "selm_jax.feedback.models.reward_model:reward_model",
    "implicit_reward": "selm_jax.feedback.models.implicit_reward:implicit_reward",
    "verifiable": "selm_jax.feedback.rules:verifiable",
    "judge": "selm_jax.feedback.judge.ranker:judge",
    "mixture": "selm_jax.feedback.mixture:mixture",
    "human": "selm_jax.feedback.human:human",
}
_USER_FUNCTION = "selm_jax.feedback.workers:user_function"


@dataclass(frozen=True)
class Question:
    """One prompt whose responses are to be scored.

    Attributes:
        prompt: text of the last user turn.
        messages: the whole conversation; objects with `.role` and `.content`.
        row: the dataset row's other columns, by name; values may be lists and objects.
        id: the prompt's ID in files and errors.
    """

    prompt: str
    messages: tuple[Any, ...]
    row: Mapping[str, Any]
    id: str

    def own_row(self) -> dict[str, Any]:
        """A deep copy of the dataset row, so that changes to the copy affect no other call."""
        return copy.deepcopy(dict(self.row))


@runtime_checkable  # so that a run-time check of annotations can read it
class Ranker(Protocol):
    """Scores candidate responses. An implementation ends with `return check_scores(...)`.

    A ranker may also have these members:

    * `report() -> dict[str, int | float]`: counts of its last `scores`, such as requests and cost.
      The counts of several calls are added up (`reported`).
    * `relative`: true if a score depends on the other candidates of the call (`is_relative`).
    * `together`: the group size of a ranker that reads prompts in groups (`prompts_together`).
    * `batches`: the batches of its models, which are halved where memory runs out (`batches_of`).
    * `folders`: the folders of its models, whose bytes determine its scores (`folders_of`).
    * `for_policy(policy, reference)`: the ranker of an iteration, if it reads the iteration's
      policy (`judged_by_policy`).
    * `check(questions)`: raises for rows that the ranker cannot use (`check_asked`).
    """

    @property
    def name(self) -> str:
        """The ranker's name in reports and errors."""
        ...

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """Returns one array per question with one score per candidate; higher is better.

        A score is NaN only if a judge was asked and its answer could not be read.

        Args:
            questions: the prompts.
            candidates: the responses to each prompt; their number may differ between prompts.

        Raises:
            FeedbackError: a score is missing, not a number or not finite.
        """
        ...


def build_ranker(name: str, /, **settings: Any) -> Ranker:
    """Builds the ranker called `name`.

    Args:
        name: a key of `BUILT_IN`, or `package.module:function` for a function
            `(prompt: str, response: str, row: dict) -> float`.
        settings: the ranker's own settings, such as `target` for `length`. A user's function has
            those of `workers.user_function`; put further settings into your module.

    Raises:
        FeedbackError: the name or a setting is unknown, or a setting is missing or invalid.
    """
    if not isinstance(name, str):
        raise FeedbackError(f"{name!r} is not the name of a ranker; expected a string.")
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
    """A ranker's counts of its last `scores`; empty if it has no method `report`."""
    report = getattr(ranker, "report", None)
    return {} if report is None else report()


def counted(report: Mapping[str, int | float], what: str) -> int:
    """Reads one count from a ranker's report; for a mixture, adds the counts of all parts."""
    return sum(int(n) for key, n in report.items() if key.rpartition("/")[2] == what)


def is_relative(ranker: Ranker) -> bool:
    """Returns whether a score only compares a candidate with the others of its prompt.

    Then a mean over prompts does not measure a policy.
    """
    return getattr(ranker, "relative", False)


def folders_of(ranker: Ranker) -> tuple[Path, ...]:
    """The folders of the models that a ranker uses; empty for a ranker without models."""
    return getattr(ranker, "folders", ())


def batches_of(ranker: Ranker) -> tuple[Any, ...]:
    """The `models.settings.Batch` of each model of a ranker; empty for a ranker without models."""
    return getattr(ranker, "batches", ())


def judged_by_policy(name: str, settings: Mapping[str, Any]) -> bool:
    """Returns whether a ranker, or a part of a mixture, asks the policy of the iteration itself.

    Then its scores cannot compare policies.
    """
    if name == "mixture":
        parts = settings.get("parts", [])
        return any(judged_by_policy(p["ranker"], p.get("settings", {})) for p in parts)
    return name == "implicit_reward" and settings.get("policy") is None


def for_policy(ranker: Ranker, policy: Path, reference: Path | None) -> Ranker:
    """The ranker of an iteration; the same ranker if it does not read the iteration's policy.

    Args:
        policy: the model folder of the policy that the iteration starts from.
        reference: that of the reference which it was trained against; None in iteration 1.
    """
    bind = getattr(ranker, "for_policy", None)
    return ranker if bind is None else bind(policy, reference)


def check_asked(ranker: Ranker, questions: Sequence[Question]) -> None:
    """Lets a ranker that uses dataset columns check the rows before any expensive work.

    Raises:
        FeedbackError: the ranker cannot use a row; the message names the prompt.
    """
    check = getattr(ranker, "check", None)
    if check is not None:
        check(questions)


def prompts_together(ranker: Ranker) -> int:
    """The number of consecutive prompts to score in one batch; other batches change the scores."""
    return getattr(ranker, "together", 1)


def scores_beside(
    scores: Callable[[Sequence[Question], Sequence[Sequence[str]]], Sequence[np.ndarray]],
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    others: Sequence[str],
) -> list[list[float]]:
    """Scores each answer together with the text in `others` for the same prompt.

    A relative ranker's scores are comparable across policies only if every answer is compared with
    the same text.

    Returns:
        For each prompt, the scores of its answers.
    """
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
                f"Expected {'one of ' + _listed(parameters) if parameters else 'no settings'}."
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise FeedbackError(
                f"ranker {name!r}: the setting {key!r} is missing and has no default. Add it."
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(each) for each in names)


def check_questions(
    name: str, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
) -> None:
    """Checks that there is one list of candidates for each question.

    Raises:
        FeedbackError: the lengths differ, or a string was given in place of a list (its letters
            would be scored as responses).
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
    """Checks a ranker's scores: one finite real number per candidate.

    Args:
        name: the ranker's name, for errors.
        questions: the prompts.
        candidates: the responses to each prompt.
        scores: for each prompt, the ranker's list or array of numbers.
        unread: for each prompt, which candidates a judge gave no readable answer about. Their
            scores become NaN.

    Returns:
        For each prompt, a new float64 array `[candidates]`.

    Raises:
        FeedbackError: the shape is wrong, or a score is not a finite number; the message names the
            ranker, the prompt's ID and the candidate's index (from 0).
    """
    check_questions(name, questions, candidates)
    if len(scores) != len(questions):
        raise FeedbackError(
            f"ranker {name!r}: returned scores for {len(scores)} of {len(questions)} prompts; "
            "expected one row of scores per prompt."
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
    """Returns `row` if it is a list or array of `count` scores, and None if it is anything else."""
    if hasattr(row, "shape"):
        array = np.asarray(row)  # one transfer for a device array, not one per element
        return array if array.shape[:1] == (count,) else None
    is_list = isinstance(row, Sequence) and not isinstance(row, str)
    return row if is_list and len(row) == count else None


def finite_number(value: Any, where: str) -> float:
    """Converts a score to a float.

    Raises:
        FeedbackError: the score is not one finite real number; the message begins with `where`.
    """
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged nest of lists
        array = None
    # Kinds: bool, signed, unsigned, float. A string that looks like a number is still refused.
    if array is None or array.ndim or array.dtype.kind not in "biuf":
        raise FeedbackError(
            f"{where}: the score is {value!r} ({type(value).__name__}); expected one real number."
        )
    number = float(array)
    if not np.isfinite(number):
        raise FeedbackError(
            f"{where}: the score is {number}; expected a finite number. Give a response that "
            "cannot be judged a low score of your choice."
        )
    return number
