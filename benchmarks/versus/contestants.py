"""The comparisons of the benchmark: their contestants and their goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    key: str
    title: str
    environment: str  # which Python runs it: ours, torch, tunix
    script: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Contestants whose steps take turns; their speed is counted in `unit` per second.

    `prompts` is how many prompts a step of generation answers; 0 in training.
    """

    kind: str
    unit: str
    contestants: tuple[str, ...]
    prompts: int = 0

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.prompts} prompts" if self.prompts else self.kind


ALL = {
    c.key: c
    for c in (
        Contestant(
            "selm", "SELM update, three distinct responses", "ours", "selm_train", ("distinct",)
        ),
        Contestant("selm_shared", "SELM update, shared roles", "ours", "selm_train", ("shared",)),
        Contestant("selm_dpo", "our update, DPO on pairs", "ours", "selm_train", ("dpo",)),
        Contestant("authors", "the authors' recipe, torch", "torch", "authors_train"),
        Contestant(
            "trl_cached", "TRL DPO, reference precomputed", "torch", "trl_train", ("cached",)
        ),
        Contestant("trl_live", "TRL DPO, reference live", "torch", "trl_train", ("live",)),
        Contestant("tunix_live", "Tunix DPO, reference live", "tunix", "tunix_train", ("live",)),
        Contestant("tunix_none", "Tunix DPO, no reference", "tunix", "tunix_train", ("none",)),
        Contestant("engine", "our engine", "ours", "selm_generate"),
        Contestant("transformers", "transformers generate", "torch", "transformers_generate"),
        Contestant("tunix_sampler", "Tunix Sampler", "tunix", "tunix_generate"),
    )
}  # fmt: skip

TRAINING = (
    Comparison("SELM", "examples", ("selm", "selm_shared", "authors")),
    Comparison("DPO", "examples", ("selm", "selm_dpo", "trl_cached", "trl_live")),
    Comparison("Tunix", "examples", ("selm_dpo", "tunix_none", "tunix_live")),
)
KINDS = (*(c.title for c in TRAINING), "generation")


def comparisons(kinds: Sequence[str] | None, prompts: Sequence[int]) -> list[Comparison]:
    """The comparisons of these kinds (None: all), with generation for each number of prompts."""
    contestants = ("engine", "transformers", "tunix_sampler")
    generation = [Comparison("generation", "tokens", contestants, n) for n in prompts]
    return [c for c in (*TRAINING, *generation) if kinds is None or c.kind in kinds]


@dataclass(frozen=True)
class Bar:
    """A goal: the ratio of `ours` to `theirs` is at least (for memory: at most) `wanted`."""

    title: str
    kind: str  # of the comparison
    quantity: str  # speed or memory
    ours: str
    theirs: str
    wanted: float


BARS = (
    Bar(
        "examples/s, three distinct responses, against the authors' recipe", "SELM", "speed",
        "selm", "authors", 2.0,
    ),
    Bar(
        "examples/s, shared roles, against the authors' recipe", "SELM", "speed",
        "selm_shared", "authors", 2.5,
    ),
    Bar(
        "SELM on 4 examples against TRL DPO on 4 pairs, cached reference", "DPO", "speed",
        "selm", "trl_cached", 1.0,
    ),
    Bar("peak memory against the authors' recipe", "SELM", "memory", "selm", "authors", 0.6),
    Bar(
        "peak memory against TRL DPO, cached reference", "DPO", "memory", "selm", "trl_cached", 0.6
    ),
    Bar("peak memory against TRL DPO, live reference", "DPO", "memory", "selm", "trl_live", 0.6),
    Bar(
        "tokens/s against transformers generate", "generation", "speed",
        "engine", "transformers", 1.7,
    ),
    Bar("tokens/s against Tunix Sampler", "generation", "speed", "engine", "tunix_sampler", 1.0),
)  # fmt: skip
