"""Checks the settings that are common to all rankers with a neural network."""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp

from selm_jax.config.kinds import Dtype
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.shell.ranges import MOST, Range
from selm_jax.shell.words import did_you_mean

BATCH = Range(1, MOST, whole=True)  # rows of 512 tokens


def checked_dtype(ranker: str, name: str, on_cpu: bool) -> Any:
    """Converts a dtype's name to a dtype. `auto` is bfloat16, or float32 on CPU (no gain there)."""
    check_choice(ranker, "dtype", name, get_args(Dtype))
    return jnp.dtype(("float32" if on_cpu else "bfloat16") if name == "auto" else name)


def checked_batch(ranker: str, batch: int | None, on_cpu: bool) -> int:
    """Checks a batch size in rows of 512 tokens; None means 16, or 2 on CPU (small caches)."""
    if batch is None:
        return 2 if on_cpu else 16
    if (expected := BATCH.problem(batch)) is not None:
        raise FeedbackError(f"{ranker}: batch is {batch!r}; expected {expected}.")
    return int(batch)


def check_choice(ranker: str, name: str, value: str, expected: tuple[str, ...]) -> None:
    """Raises FeedbackError unless the setting has one of the expected values."""
    if value not in expected:
        raise FeedbackError(
            f"{ranker}: {name} is {value!r}{did_you_mean(str(value), expected)} "
            f"Expected one of {', '.join(expected)}."
        )
