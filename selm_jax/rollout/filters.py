"""Imports the user's sampling filter (`rollout.filter`) and checks its output's shape."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from selm_jax.rollout.sampling import NOTHING_LEFT, Filter
from selm_jax.shell.user_code import UserCodeError, described, function_at


class FilterError(ValueError):
    """The user's sampling filter cannot be used."""


def filter_named(name: str, vocabulary: int) -> Filter:
    """Imports the filter `package.module:function`; see `sampling.Filter`.

    Args:
        vocabulary: the size of the vocabulary.

    Raises:
        FilterError: there is no such function, it does not take (logits, t), it cannot be traced,
            or it returns another shape or dtype than it gets.
    """
    try:
        user: Filter = function_at(name, "logits", "t")
    except UserCodeError as error:
        raise FilterError(f"rollout.filter {name!r}: {error}") from error
    logits = jax.ShapeDtypeStruct((1, vocabulary), jnp.float32)
    try:
        found = jax.eval_shape(user, logits, jax.ShapeDtypeStruct((1,), jnp.int32))
    except Exception as error:  # the user's function can raise anything
        raise FilterError(
            f"rollout.filter {described(user)} cannot be traced by JAX: {type(error).__name__}: "
            f"{error}. Use only JAX operations in it"
        ) from error
    same = getattr(found, "shape", None) == logits.shape and found.dtype == logits.dtype
    if not same:
        raise FilterError(
            f"rollout.filter {described(user)} returned {found} for logits {logits}; expected "
            "logits of the same shape and dtype, with -inf for tokens that must not be drawn"
        )
    return user


def check_drawn(user: Filter | None, tokens: Sequence[int], prompt: int, sample: int) -> None:
    """Raises FilterError if the filter left no token to draw for a sample."""
    if user is not None and NOTHING_LEFT in tokens:
        raise FilterError(
            f"rollout.filter {described(user)} leaves no token to draw for sample {sample} of "
            f"prompt {prompt} (counted from 0) after {tokens.index(NOTHING_LEFT)} tokens: all "
            "logits were -inf, or one was NaN or inf. Keep at least one token in each row"
        )
