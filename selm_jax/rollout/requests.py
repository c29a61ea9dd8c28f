"""What is asked of whoever answers, the engine or a server, and what comes back."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and the responses wanted for it.

    Attributes:
      index: the number i of the prompt in its iteration, which names its random numbers.
      draws: names them in its place, where a prompt has no lasting number; below 2^31.
      prompt: token ids.
      greedy: 1 for a greedy response, which is then sample 0.
      samples: how many responses to draw; they are samples 1, 2, ... whether or not there is a
        greedy one.
    """

    index: int
    prompt: tuple[int, ...]
    greedy: int
    samples: int
    draws: int | None = None

    def wanted(self) -> list[int]:
        return list(range(1 - self.greedy, 1 + self.samples))

    @property
    def drawn_by(self) -> int:
        return self.index if self.draws is None else self.draws


@dataclasses.dataclass(frozen=True)
class Response:
    """Token ids of one response; the stop id stands at the end if `finish` is "stop".

    If it is "ended", the caller of `Engine.generate` found an end in the text; more tokens may follow.
    """

    index: int
    sample: int
    tokens: tuple[int, ...]
    finish: str  # "stop", "length" or "ended"

    @property
    def greedy(self) -> bool:
        return self.sample == 0
