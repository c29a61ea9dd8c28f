"""Scoring: what fixed parameters say of every response of examples, without training anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from selm_jax.models.decoder import Params
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import PreferenceBatch, Shape, common_shape, pack, unpack
from selm_jax.training.update import Update

Report = Callable[[int], None]  # takes the number of examples scored since the last call


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores responses in batches of one shape, so that each function compiles once per shape.

    Attributes:
      update: whose compiled `logps` and `rewards` score.
      place: puts a batch on the devices.
      rows: rows of a batch.
      row_length: tokens of a row.
    """

    update: Update
    place: Callable[[PreferenceBatch], PreferenceBatch]
    rows: int
    row_length: int

    def logps(
        self, params: Params, examples: Sequence[Example], report: Report = lambda done: None
    ) -> list[tuple[float, ...]]:
        """log pi(response | prompt) in nats, float32: a tuple per example, a number per response.

        Raises:
          ExampleError: an example that does not fit a row.
        """
        return self._of_responses(self.update.logps, params, examples, report)

    def rewards(
        self, params: Params, examples: Sequence[Example], report: Report = lambda done: None
    ) -> list[tuple[float, ...]]:
        """The same of a reward model's rewards."""
        return self._of_responses(self.update.rewards, params, examples, report)

    def _of_responses(
        self,
        compiled: Callable[..., Any],
        params: Params,
        examples: Sequence[Example],
        report: Report,
    ) -> list[tuple[float, ...]]:
        if not examples:
            return []
        shape = common_shape([examples], rows=self.rows, time=self.row_length)
        return score(examples, shape, lambda batch: compiled(params, self.place(batch)), report)


def score(
    examples: Sequence[Example],
    shape: Shape,
    of_batch: Callable[[PreferenceBatch], Any],
    report: Report = lambda done: None,
) -> list[tuple[float, ...]]:
    """One number for every response of every example, float32, from a function of packed batches.

    Args:
      of_batch: from a batch of this shape to [rows, segments, branches].
    """
    out = []
    for batch in pack(examples, shape):
        out.append(np.asarray(of_batch(batch)))
        report(int(batch.weight.sum()))
    return unpack(examples, shape, out)
