"""Defines ApiError, the error that the public API raises for wrong arguments."""

from collections.abc import Mapping
from typing import Any


class ApiError(ValueError):
    """An argument is wrong, or arguments do not fit together.

    The message says what is wrong and what to do.
    """


def refuse_settings(settings: Mapping[str, Any]) -> None:
    """Raises ApiError if a user's own function was given settings."""
    if settings:
        raise ApiError(
            f"settings cannot be given with your own function (found {', '.join(settings)}). Leave "
            "them out"
        )
