"""The candidates of a prompt, and what becomes of them: a pair, or a drop with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selm_jax.objectives.roles import ROLES
from selm_jax.shell.words import did_you_mean

SOURCES = ("greedy", "sample", "chosen", "rejected")
FINISHES = ("stop", "length", "dataset")
REASONS = (
    *("not_asked", "not_answered", "unusable_answer"),
    *("malformed", "rule", "tie", "equal_text", "empty", "cut_off", "margin"),
)


class FeedbackError(Exception):
    """A ranker, its scores or the rules that make pairs of them cannot be used as asked."""


def check_choice(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise FeedbackError(
            f"{name} is {value!r}{did_you_mean(str(value), expected)} "
            f"Expected one of {', '.join(expected)}."
        )


@dataclass(frozen=True)
class Candidate:
    """One response to one prompt.

    Attributes:
        source: `greedy` and `sample` are the model's own; `chosen` and `rejected` the dataset's.
        text: the response as people and rankers read it.
        token_ids: the ids that are trained on, an end token included; None for text that is not
            tokenised yet.
        finish: `stop` ended by itself, `length` was cut off, `dataset` was not generated here.
        sample: the number of the sample within its prompt.
        explored: whether the optimism term takes it; set by `select`, for a rule to look at.

    Raises:
        FeedbackError: unknown source or finish, or token ids that are no tuple.
    """

    source: str
    text: str
    token_ids: tuple[int, ...] | None
    finish: str
    sample: int
    explored: bool = False

    def __post_init__(self) -> None:
        check_choice("a candidate's source", self.source, SOURCES)
        check_choice("a candidate's finish", self.finish, FINISHES)
        if self.token_ids is not None and not isinstance(self.token_ids, tuple):
            raise FeedbackError(
                f"a candidate's token_ids are a {type(self.token_ids).__name__}; expected a tuple "
                "of ints or None (an array would compare element by element)."
            )

    @property
    def identity(self) -> tuple[str, object]:
        """Equal for two candidates of a prompt exactly when they are the same response.

        Ids are compared with ids and text with text, never one with the other: a text can have
        several tokenisations, and then "the same" would not be transitive.
        """
        return ("text", self.text) if self.token_ids is None else ("ids", self.token_ids)

    @property
    def is_empty(self) -> bool:
        """Nothing but white space."""
        return not self.text.strip()


@dataclass(frozen=True)
class Pair:
    """What is trained on for one prompt, as indices into its candidates.

    `explored` are the responses over which the optimism term takes its mean, where they are
    several; `explore` is then the first of them. A rule that picks a pair leaves both to `select`.
    """

    chosen: int
    rejected: int
    explore: int = -1
    explored: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A prompt that gives no pair, and why: one of `REASONS`.

    `select` gives all but four: `rule`, which a rule of yours gives for reasons of its own;
    `not_asked`, of a prompt beyond the budget; `not_answered`, of one that too few people have
    ranked; `unusable_answer`, of one with an answer in the data that does not become token ids.

    Raises:
        FeedbackError: unknown reason (the report would lose the prompt).
    """

    reason: str

    def __post_init__(self) -> None:
        check_choice("the reason of a drop", self.reason, REASONS)


def distinct(candidates: Sequence[Candidate], pair: Pair) -> tuple[list[int], dict[str, int]]:
    """The pair's responses without repeats, so that none is computed twice.

    Two candidates are the same response when their token ids are equal, or, without ids, their
    texts (`Candidate.identity`).

    Returns:
        keep: indices into the candidates, one to three, in the order chosen, rejected, explore.
        roles: for each role, its index into `keep`.
    """
    keep: list[int] = []
    seen: dict[object, int] = {}
    roles: dict[str, int] = {}
    for role, index in zip(ROLES, (pair.chosen, pair.rejected, pair.explore), strict=True):
        identity = candidates[index].identity
        if identity not in seen:
            seen[identity] = len(keep)
            keep.append(index)
        roles[role] = seen[identity]
    return keep, roles
