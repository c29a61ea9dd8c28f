"""Counts a judge's requests, computes their cost, and limits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from selm_jax.feedback.judge.answer import Usage
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.shell.endpoint import Tries
from selm_jax.shell.ranges import NonNegative, Range, ranges_of

Tokens = Annotated[int, Range(0, 2**63 - 1, whole=True)]  # of a budget
Timeout = Annotated[float, Range(1e-3)]  # seconds


class JudgeError(FeedbackError):
    """A judge cannot be asked, or its answers cannot be used."""


class BudgetExceeded(JudgeError):
    """The next request could exceed the budget. All answers that were paid for are in the cache."""


def check_numbers(declared: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Checks settings against the ranges that a function or class declares for them.

    Raises:
        JudgeError: a setting is out of range; the message names it.
    """
    for name, numbers in ranges_of(declared).items():
        value = settings.get(name)
        if value is not None and (expected := numbers.problem(value)) is not None:
            raise JudgeError(f"judge: {name} is {value!r}; expected {expected}.")


@dataclass
class Calls(Tries):
    """Counts of a client's requests and answers since it was opened.

    Attributes:
        asked: calls for an answer; each is served from the cache, shared, paid for, or fails.
        cache_hits: answers found on disk.
        shared: calls made while the same request was under way; paid once.
        answers: complete answers of the server, paid for and stored.
        without_usage: answers for which the server reported no token counts.
        prompt_tokens, completion_tokens: tokens of the paid answers, as reported by the server.
    """

    asked: int = 0
    cache_hits: int = 0
    shared: int = 0
    answers: int = 0
    without_usage: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_dict(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)


@dataclass
class Budget:
    """Optional limits on a judge's tokens and cost, and the amounts spent.

    The budget is for one process: answers from the cache are free, and a resumed run starts with
    the whole budget again. For each request under way it reserves the size of the largest answer so
    far. So the limit can be exceeded only by requests sent before the first answer arrived, or by
    an answer larger than all before it.

    Attributes:
        max_total_tokens: limit on prompt and completion tokens together; None is no limit.
        max_cost: limit on the cost, in the currency of the prices; None is no limit.
        price_prompt, price_completion: price per million tokens; None if unknown.

    Raises:
        JudgeError: a limit or price is out of range, or there is a limit on cost without prices.
    """

    max_total_tokens: Tokens | None = None
    max_cost: NonNegative | None = None
    price_prompt: NonNegative | None = None
    price_completion: NonNegative | None = None

    def __post_init__(self) -> None:
        self.tokens, self.cost = 0, 0.0
        self._under_way, self._most_tokens, self._most_cost = 0, 0, 0.0
        check_numbers(Budget, vars(self))
        if (self.price_prompt is None) != (self.price_completion is None):
            raise JudgeError("judge: give both price_prompt and price_completion, or neither.")
        if self.max_cost is not None and not self.priced:
            raise JudgeError(
                "judge: max_cost needs prices. Set price_prompt and price_completion, per million "
                "tokens."
            )

    @property
    def priced(self) -> bool:
        return self.price_prompt is not None

    @property
    def limited(self) -> bool:
        return self.max_total_tokens is not None or self.max_cost is not None

    def cost_of(self, usage: Usage) -> float:
        """The cost of an answer in the currency of the prices; 0 without prices."""
        if self.price_prompt is None or self.price_completion is None:
            return 0.0
        millions = usage.prompt * self.price_prompt + usage.completion * self.price_completion
        return millions / 1e6

    def reserve(self) -> None:
        """Reserves budget for the next request. Call this method before sending the request.

        Raises:
            BudgetExceeded: the request might exceed the budget.
        """
        for name, limit, spent, most in (
            ("max_total_tokens", self.max_total_tokens, self.tokens, self._most_tokens),
            ("max_cost", self.max_cost, self.cost, self._most_cost),
        ):
            aside = (self._under_way + 1) * most
            if limit is not None and (spent >= limit or spent + aside > limit):
                raise BudgetExceeded(
                    f"judge: the budget ({name}: {limit:g}) does not allow another request "
                    f"({spent:.6g} is spent, {aside:.6g} reserved for the requests under way and "
                    "the next one). All answers paid for are in the cache. Raise the limit and run "
                    "again to continue from there."
                )
        self._under_way += 1

    def release(self, usage: Usage | None) -> None:
        """Frees the budget reserved for a request, and records the token `usage` if known."""
        self._under_way -= 1
        if usage is not None:
            cost = self.cost_of(usage)
            self.tokens += usage.total
            self.cost += cost
            self._most_tokens = max(self._most_tokens, usage.total)
            self._most_cost = max(self._most_cost, cost)
