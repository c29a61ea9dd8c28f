"""The settings of `rollout`: how answers are sampled, by which server, and how they are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from selm_jax.config.kinds import (
    AutoSize,
    Command,
    Engine,
    MixtureKind,
    RolloutWeights,
    Size,
    Yours,
    agree,
)
from selm_jax.shell.ranges import MOST, Count, Natural, Positive, Range, ranges_of

_STRICT = ConfigDict(extra="forbid")
_GREEDY = "for greedy answers only, set candidates.greedy: 1 and candidates.samples: 0"


@dataclass(frozen=True, config=_STRICT)
class Remote:
    """A server that generates answers in place of this program's own engine; see docs/run.md."""

    engine: Engine  # The software that the server runs.
    url: str = "http://127.0.0.1:8000"  # The server's address.
    # Command that starts the server, with {model} for the policy's folder; null: you start it.
    command: Command | None = None
    start_seconds: Positive = 1800.0  # Seconds to wait until the server has loaded that folder.
    concurrency: Count = 256  # Number of answers requested at the same time.
    timeout: Positive = 600.0  # Seconds to wait for one answer.
    retries: Natural = 6  # How many times a failed request is sent again.
    key_env: str | None = None  # Name of the environment variable that contains the API key.
    # Whether vLLM gets a seed with each answer; false: none, as vLLM on TPUs refuses seeds.
    seeds: bool = True


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How the tokens of sampled answers are drawn; greedy answers do not use these settings.

    Raises:
        ValueError: a number is out of its range.
    """

    # Divides the logits: above 1 flattens the sampling distribution, below 1 sharpens it.
    temperature: Annotated[float, Range(1e-3, advice=_GREEDY)] = 1.0
    # Samples only from this many of the most probable tokens; 0 keeps all.
    top_k: Annotated[int, Range(0, MOST, whole=True, advice="0 keeps all tokens")] = 0
    # Samples only from the most probable tokens whose total probability reaches this value.
    top_p: Annotated[float, Range(0, 1, above=True, advice="1 keeps all tokens")] = 1.0
    # Samples only from tokens that have at least this fraction of the top token's probability.
    min_p: Annotated[float, Range(0, 1, advice="0 keeps all tokens")] = 0.0

    def __post_init__(self):
        for name, declared in ranges_of(SamplingSettings).items():
            value = getattr(self, name)
            if (expected := declared.problem(value)) is not None:
                raise ValueError(f"{name} is {value}; expected {expected}")


@dataclass(frozen=True, config=_STRICT)
class Gap:
    """Sets what a run does if the sampler's log-probabilities differ from the scorer's.

    Both are limits of the mean absolute difference in nats per token; see docs/run.md.
    """

    warn: Positive | None = 0.1  # Above this difference a warning is printed; null: never.
    # Above this difference the run stops before it trains on such answers; null: never.
    stop: Positive | None = 0.5

    @agree
    def _agrees(self) -> Iterator[str]:
        if self.warn is not None and self.stop is not None and self.warn > self.stop:
            yield (
                f"warn: {self.warn:g} is more than rollout.gap.stop: {self.stop:g}, so the run "
                "would stop without a warning; give a smaller number"
            )


@dataclass(frozen=True, config=_STRICT)
class Mixture:
    """Draws samples from mixtures of the policy and its reference; see docs/methods.md."""

    kind: MixtureKind  # Which samples of a prompt are drawn from which mixture.
    # The mixture is policy^(1 - weight) reference^weight; policy_reference has no weight.
    weight: Annotated[float, Range(-10, 10)] | None = None

    @agree
    def _agrees(self) -> Iterator[str]:
        if self.kind == "policy_reference" and self.weight is not None:
            yield (
                f"weight: {self.weight:g}; kind: policy_reference draws from the policy and the "
                "reference alone. Remove the weight, or set kind: nash"
            )
        if self.kind != "policy_reference" and self.weight is None:
            yield f"weight: missing; kind: {self.kind} needs a number, such as 0.5"


@dataclass(frozen=True, config=_STRICT)
class Rollout(SamplingSettings):
    filter: Yours | None = None  # Your package.module:function that changes logits before sampling.
    max_new_tokens: Size = 1024  # Maximum number of tokens of an answer; longer ones are cut off.
    # Number of answers decoded together, rounded up so that the devices can share them evenly.
    # `auto` takes what the devices' memory allows and the number of answers needs (docs/memory.md).
    slots: AutoSize = "auto"
    # Number of prompts prefilled together, rounded up so that the devices can share them evenly.
    prefill_rows: AutoSize = "auto"
    max_prompt_tokens: Size = 512  # Maximum number of tokens of a prompt; longer is a bad row.
    # Number of prompts whose answers are saved together; a killed run loses at most one such part.
    prompts_per_part: Count = 256
    gap: Gap = Gap()
    # Mixtures of the policy and its reference that samples are drawn from; null: the policy alone.
    mixture: Mixture | None = None
    # Precision of the copy of the policy that generates answers: `full`, or the layers' matrices in
    # 8 bits. `gap` says how far it is from the policy that is trained.
    weights: RolloutWeights = "full"
    # A vLLM or SGLang server that generates the answers; null generates them in this program.
    remote: Remote | None = None

    @agree
    def _agrees(self) -> Iterator[str]:
        if self.remote is not None and self.filter is not None:
            yield (
                f"filter: {self.filter}; the server of rollout.remote samples the tokens and "
                "cannot run your own function. Remove one of the two settings"
            )
        if self.remote is not None and self.mixture is not None:
            yield (
                f"mixture: {self.mixture.kind}; a server has one model only and cannot mix two. "
                "Set rollout.mixture: null, or rollout.remote: null to generate in this program"
            )
        if self.remote is not None and self.weights != "full":
            yield (
                f"weights: {self.weights}; the server of rollout.remote reads the model folder "
                "itself. Set rollout.weights: full, and the server's own option for quantisation"
            )
