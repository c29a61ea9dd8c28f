"""Requests for answers, and the responses that the engine or a server returns."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how many responses to generate for it.

    Attributes:
      index: the number of the prompt in its iteration, which identifies its random numbers.
      draws: identifies the random numbers of a prompt without a fixed number; below 2^31.
      prompt: token ids.
      greedy: 1 for a greedy response, which is then sample 0.
      samples: the number of responses to draw; they are samples 1, 2, ... even without a greedy
        one.
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
    """The token ids of one response, including the stop token if `finish` is "stop".

    If `finish` is "ended", the caller of `Engine.generate` found an end in the text, and tokens may
    follow that end.

    Attributes:
      logps: the log-probability of each token in nats, under the policy at temperature 1 and
        without filters; NaN or None where the sampler did not say. Responses of equal tokens are
        equal, since their log-probabilities may differ by rounding.
      sampled_logps: the same under the distribution that the tokens were drawn from, after
        temperature and filters; 0 for a greedy answer.
    """

    index: int
    sample: int
    tokens: tuple[int, ...]
    finish: str  # "stop", "length" or "ended"
    logps: tuple[float, ...] | None = dataclasses.field(default=None, compare=False)
    sampled_logps: tuple[float, ...] | None = dataclasses.field(default=None, compare=False)

    @property
    def greedy(self) -> bool:
        return self.sample == 0
