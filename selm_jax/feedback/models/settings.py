"""Checks the settings that are common to all rankers with a neural network."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp

from selm_jax.config.kinds import Dtype
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.policy import sizes
from selm_jax.shell.memory import until_it_fits
from selm_jax.shell.ranges import MOST, Range
from selm_jax.shell.words import did_you_mean

T = TypeVar("T")
BATCH = Range(1, MOST, whole=True)  # rows of 512 tokens


def checked_dtype(ranker: str, name: str, on_cpu: bool) -> Any:
    """Converts a dtype's name to a dtype. `auto` is bfloat16, or float32 on CPU (no gain there)."""
    check_choice(ranker, "dtype", name, get_args(Dtype))
    return jnp.dtype(("float32" if on_cpu else "bfloat16") if name == "auto" else name)


@dataclasses.dataclass(frozen=True)
class Needs:
    """The bytes of a device that a ranker takes.

    Attributes:
        held: its weights.
        row: what a row of 512 tokens needs besides.
    """

    held: int
    row: int


def batch_of(ranker: str, batch: int | None, needs: Needs, on_cpu: bool) -> Batch:
    """The batch of `batch_in` for the memory here; it is halved where it does not fit after all."""
    room = sizes.room(jax.local_devices()[0]).bytes
    return Batch(batch_in(ranker, batch, needs, room, on_cpu), batch is not None)


def batch_in(ranker: str, batch: int | None, needs: Needs, room: int, on_cpu: bool) -> int:
    """The batch that is given, or what `room` bytes allow, and no more than is fast.

    Raises:
        FeedbackError: the batch is not a positive whole number.
    """
    most = checked_batch(ranker, batch, on_cpu)
    return sizes.of_ranker(most, needs.held, needs.row, room) if batch is None else most


def checked_batch(ranker: str, batch: int | None, on_cpu: bool) -> int:
    """Checks a batch in rows of 512 tokens; None means at most 16, or 2 on CPU (small caches)."""
    if batch is None:
        return 2 if on_cpu else 16
    if (expected := BATCH.problem(batch)) is not None:
        raise FeedbackError(f"{ranker}: batch is {batch!r}; expected {expected}.")
    return int(batch)


class Batch:
    """The rows of 512 tokens that a device computes at once; fewer after memory has run out."""

    def __init__(self, rows: int, fixed: bool):
        """`fixed` says that the user gave the number, which then stays."""
        self.rows, self.lowered, self._fixed = rows, False, fixed

    def lower(self, rows: int) -> None:
        """Takes no more rows than `rows`, unless the user gave a number."""
        if not self._fixed and rows < self.rows:
            self.rows, self.lowered = rows, True

    def fitting(self, work: Callable[[int], T], counts: Counter[str]) -> T:
        """Calls `work` with the rows; with half of them again whenever memory runs out.

        Args:
          counts: gets the number of such times as `batch_halved`.
        """

        def halve(error: Exception) -> None:
            if self._fixed or self.rows == 1:
                raise error
            self.lower(self.rows // 2)
            counts["batch_halved"] += 1

        return until_it_fits(lambda: work(self.rows), halve)


def reported(counts: Counter[str], keys: Sequence[str]) -> dict[str, float]:
    """The counts of a ranker by key, and how often its batch was halved, if it ever was."""
    halved = ("batch_halved",) if counts["batch_halved"] else ()
    return {key: counts[key] for key in (*keys, *halved)}


def check_choice(ranker: str, name: str, value: str, expected: tuple[str, ...]) -> None:
    """Raises FeedbackError unless the setting has one of the expected values."""
    if value not in expected:
        raise FeedbackError(
            f"{ranker}: {name} is {value!r}{did_you_mean(str(value), expected)} "
            f"Expected one of {', '.join(expected)}."
        )
