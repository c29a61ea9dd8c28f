"""A preference example: a prompt, its distinct responses, and the role of each response."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

from selm_jax.objectives.roles import PAIR, ROLES

Ids: TypeAlias = tuple[int, ...]


class ExampleError(ValueError):
    """An example cannot be used for training. The message names the example."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt with its responses, as token ids.

    Attributes:
      prompt_id: the id of the prompt in the data.
      prompt: token ids of the prompt, including the generation header.
      responses: token ids of each distinct response, including its end token if it has one. A
        response that plays two roles is listed once.
      roles: role -> index into `responses`.
      reference_logps: log-probability of each response under the reference, once it is scored.
      scores: each response's score in the data, if the data has scores.
      explored: indices of all responses that explore, if there are several: the optimism term is
        their mean, and a response that was sampled twice is listed twice. If empty, only the
        response with the role `explore` explores.
      importance: the weight of each token of each response (`rollout.importance`); None if all
        tokens count the same.
      bonus: the count bonus of what explores, from the data or from counts (`novelty`); None if
        there is none.
      shared_logps: the reference's log-probability of each response's first `shared` tokens; None
        if nothing asked for it.
    """

    prompt_id: str
    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    roles: Mapping[str, int]
    reference_logps: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    explored: tuple[int, ...] = ()
    importance: tuple[tuple[float, ...], ...] | None = None
    bonus: float | None = None
    shared_logps: tuple[float, ...] | None = None

    def __post_init__(self):
        if not self.prompt:
            raise ExampleError(f"example {self.prompt_id}: the prompt has no tokens")
        if not self.responses:
            raise ExampleError(f"example {self.prompt_id} has no responses")
        for i, response in enumerate(self.responses):
            if not response:
                raise ExampleError(f"example {self.prompt_id}: response {i} has no tokens")
        for role, i in self.roles.items():
            if role not in ROLES or not 0 <= i < len(self.responses):
                raise ExampleError(
                    f"example {self.prompt_id}: role {role!r} has response {i}; expected a role of "
                    f"{', '.join(ROLES)} and a response from 0 to {len(self.responses) - 1}"
                )
        if not all(0 <= i < len(self.responses) for i in self.explored):
            raise ExampleError(
                f"example {self.prompt_id}: the explored responses are {self.explored}; expected "
                f"numbers from 0 to {len(self.responses) - 1}"
            )
        lengths = [len(response) for response in self.responses]
        if self.importance is not None and [len(each) for each in self.importance] != lengths:
            raise ExampleError(
                f"example {self.prompt_id}: the responses have {lengths} tokens, but there are "
                f"{[len(each) for each in self.importance]} importance weights; expected one each"
            )
        given = {
            "reference log-probabilities": self.reference_logps, "scores": self.scores,
            "reference log-probabilities of the shared length": self.shared_logps,
        }  # fmt: skip
        for what, numbers in given.items():
            if numbers is not None and len(numbers) != len(self.responses):
                raise ExampleError(
                    f"example {self.prompt_id} has {len(numbers)} {what} for "
                    f"{len(self.responses)} responses; expected one for each"
                )

    @classmethod
    def of(cls, prompt_id: str, prompt: Ids, responses: Mapping[str, Ids]) -> Example:
        """Makes an example from the response of each role; equal responses are stored once.

        Further responses that explore are named `explore/2`, `explore/3`, ...

        >>> pair = {"chosen": (7, 2), "rejected": (8, 2), "explore": (7, 2)}
        >>> example = Example.of("p0", (1, 5), pair)
        >>> example.responses, dict(example.roles)
        (((7, 2), (8, 2)), {'chosen': 0, 'rejected': 1, 'explore': 0})
        """
        distinct = tuple(dict.fromkeys(responses.values()))
        places = {name: distinct.index(ids) for name, ids in responses.items()}
        roles = {name: i for name, i in places.items() if not name.startswith("explore/")}
        explored = tuple(i for name, i in places.items() if name.startswith("explore"))
        several = explored if len(explored) > 1 else ()
        return cls(prompt_id, prompt, distinct, roles, explored=several)

    def playing(self, role: str) -> tuple[int, ...]:
        """Indices of the responses that play a role; (0,) if none does."""
        several = role == "explore" and self.explored
        return self.explored if several else (self.roles.get(role, 0),)

    @property
    def shared(self) -> int:
        """The number of tokens that both answers of the pair have: the length of the shorter one.

        >>> Example.of("p0", (1,), {"chosen": (5, 6, 2), "rejected": (7, 2)}).shared
        2
        """
        return min(len(self.responses[i]) for role in PAIR for i in self.playing(role))

    @property
    def tokens(self) -> int:
        """The number of positions that the example takes in a row: prompt plus responses."""
        return len(self.prompt) + self.scored

    @property
    def scored(self) -> int:
        return sum(map(len, self.responses))
