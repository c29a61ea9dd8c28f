"""The work of an update: its tokens by role, its operations, and the share of the devices' peak.

    time/tflops = operations / seconds          time/mfu = operations / (seconds * peak)

Only operations that no method can leave out count (PaLM, arXiv 2204.02311, appendix B): no padding,
no recomputation, no scores that the mask hides. The seconds are those of the update without the
time that was spent compiling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from selm_jax.models import flops
from selm_jax.models.config import DecoderConfig
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.examples import Example
from selm_jax.training.laps import PHASES


def useful(config: DecoderConfig, examples: Sequence[Example]) -> flops.Flops:
    """Counts the operations of a forward pass over the examples that no method can leave out.

    Padding, scores that the mask hides, logits of prompts and recomputation do not count. A sliding
    window is not taken off. A reward model computes no logits.
    """
    lengths = [(len(e.prompt), [len(r) for r in e.responses]) for e in examples]
    return flops.passed(
        config,
        tokens=sum(e.tokens for e in examples),
        pairs=sum(flops.visible_pairs(*each) for each in lengths),
        scored=sum(e.scored for e in examples) if config.head is None else 0,
    )


@dataclasses.dataclass(frozen=True)
class Speed:
    """Holds the facts from which an update's operations and speed are computed.

    Attributes:
      config: the model.
      peak: FLOP/s of all devices together, by their data sheet; None if it is unknown.
      adapters: whether adapters are trained, and the model itself has no gradients.
      live: whether a reference model is computed in every update.
    """

    config: DecoderConfig
    peak: float | None
    adapters: bool = False
    live: bool = False

    def operations(self, examples: Sequence[Example]) -> int:
        """Counts the operations of an update.

        The backward pass of a matrix product computes two products: for its input, and for its
        weights. Weights that are frozen need only the first. Adapters' own products are left out.
        """
        found = useful(self.config, examples)
        products = (2 if self.adapters else 3) + self.live
        return products * (found.dense + found.head) + (3 + self.live) * found.attention

    def metrics(self, examples: Sequence[Example], spent: Mapping[str, float]) -> dict[str, float]:
        """The metrics `time/...` of an update; `time/mfu` is there if the peak is known.

        Args:
          spent: the seconds by phase since the update before, from `Laps`.
        """
        seconds = sum(spent[phase] for phase in PHASES)
        rate = self.operations(examples) / (seconds - spent["compile"])
        return {
            "time/seconds": seconds,
            "time/tokens_per_second": sum(e.tokens for e in examples) / seconds,
            "time/tflops": rate / 1e12,
            **({"time/mfu": rate / self.peak} if self.peak else {}),
            **{f"time/{phase}": value for phase, value in spent.items()},
        }


def tokens_of(examples: Sequence[Example], positions: int) -> dict[str, float]:
    """Counts the tokens of an update, by what they are.

    Args:
      positions: number of positions that are computed, padding included.
    """
    tokens = sum(e.tokens for e in examples)
    counted = {"prompt": sum(len(e.prompt) for e in examples)} | {
        role: sum(_of_role(e, role) for e in examples)
        for role in ROLES
        if any(role in e.roles for e in examples)
    }
    return {
        "tokens": tokens,
        **{f"tokens/{name}": count for name, count in counted.items()},
        "padded": positions,
        "padding": 1 - tokens / positions,
    }


def _of_role(example: Example, role: str) -> int:
    if role not in example.roles:
        return 0
    return sum(len(example.responses[i]) for i in set(example.playing(role)))
