"""Candidates of a prompt, and the result of selection: a pair, or a reason to drop the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from selm_jax.shell.words import did_you_mean

SOURCES = ("greedy", "sample", "chosen", "rejected")
FINISHES = ("stop", "length", "dataset")
REASONS = (
    *("not_asked", "not_answered", "unusable_answer"),
    *("malformed", "rule", "tie", "equal_text", "empty", "cut_off", "margin"),
)


class FeedbackError(Exception):
    """A ranker, its scores, or a rule that picks pairs from them cannot be used."""


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
        source: `greedy` or `sample` for the model's own response, `chosen` or `rejected` for one
            from the dataset.
        text: the response as people and rankers read it.
        token_ids: the ids used in training, including an end token; None if the text has not been
            tokenised yet.
        finish: `stop` if it ended by itself, `length` if it was cut off, `dataset` if it was not
            generated here.
        sample: the number of the sample within its prompt.
        explored: whether it is in the optimism term; `select` sets it, so that a rule can use it.

    Raises:
        FeedbackError: if the source or finish is unknown, or `token_ids` is not a tuple.
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
                f"a candidate's token_ids have type {type(self.token_ids).__name__}; expected a "
                "tuple of ints or None (arrays are compared element by element)."
            )

    @property
    def identity(self) -> tuple[str, object]:
        """A key that is equal for two candidates of a prompt if they are the same response.

        Token ids are compared with ids and text with text, never ids with text: a text can have
        several tokenisations, so that equality would not be transitive.
        """
        return ("text", self.text) if self.token_ids is None else ("ids", self.token_ids)

    @property
    def is_empty(self) -> bool:
        """Returns whether the text contains only white space."""
        return not self.text.strip()


@dataclass(frozen=True)
class Pair:
    """A prompt's responses for training, as indices into its candidates.

    If several responses explore, `explored` lists them all: the optimism term is their mean, and
    `explore` is the first of them. A rule that picks a pair leaves both fields to `select`.
    """

    chosen: int
    rejected: int
    explore: int = -1
    explored: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """The reason, one of `REASONS`, why a prompt gives no pair.

    `select` uses all reasons but four: `rule` is for a user's own rule; `not_asked` for a prompt
    beyond the budget; `not_answered` for a prompt that too few people have ranked; and
    `unusable_answer` for an answer in the data that cannot be turned into token ids.

    Raises:
        FeedbackError: if the reason is unknown (the report would lose the prompt).
    """

    reason: str

    def __post_init__(self) -> None:
        check_choice("the reason of a drop", self.reason, REASONS)
