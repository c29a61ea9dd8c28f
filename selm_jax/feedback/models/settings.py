"""Checks the settings that are common to all rankers with a neural network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from selm_jax.config.kinds import Dtype
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.shell.memory import ran_out
from selm_jax.shell.ranges import MOST, Range
from selm_jax.shell.words import did_you_mean

T = TypeVar("T")
BATCH = Range(1, MOST, whole=True)  # rows of 512 tokens


def checked_dtype(ranker: str, name: str, on_cpu: bool) -> Any:
    """Converts a dtype's name to a dtype. `auto` is bfloat16, or float32 on CPU (no gain there)."""
    check_choice(ranker, "dtype", name, get_args(Dtype))
    return jnp.dtype(("float32" if on_cpu else "bfloat16") if name == "auto" else name)


def batch_of(ranker: str, batch: int | None, on_cpu: bool) -> Batch:
    """The batch of `checked_batch`, which is halved where it does not fit if none was given."""
    return Batch(checked_batch(ranker, batch, on_cpu), batch is not None)


def checked_batch(ranker: str, batch: int | None, on_cpu: bool) -> int:
    """Checks a batch size in rows of 512 tokens; None means 16, or 2 on CPU (small caches)."""
    if batch is None:
        return 2 if on_cpu else 16
    if (expected := BATCH.problem(batch)) is not None:
        raise FeedbackError(f"{ranker}: batch is {batch!r}; expected {expected}.")
    return int(batch)


class Batch:
    """The rows of 512 tokens that a device computes at once; fewer after memory has run out."""

    def __init__(self, rows: int, fixed: bool):
        """`fixed` says that the user gave the number, which then stays."""
        self.rows, self._fixed = rows, fixed

    def fitting(self, work: Callable[[int], T], counts: Counter[str]) -> T:
        """Calls `work` with the rows; with half of them again whenever memory runs out.

        Args:
          counts: gets the number of such times as `batch_halved`.
        """
        while True:
            try:
                return work(self.rows)
            except (JaxRuntimeError, MemoryError) as e:
                if self._fixed or self.rows == 1 or not ran_out(e):
                    raise
            self.rows //= 2
            counts["batch_halved"] += 1


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
