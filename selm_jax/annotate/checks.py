"""Checks of the data that people and their browsers send: names, rankings, comments."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

LONGEST_NAME = 64
LONGEST_COMMENT = 4000


class AnnotationError(ValueError):
    """Annotation data cannot be used, or the page cannot be served. The message says why."""


def check_minimum(minimum: Any) -> None:
    """Raises AnnotationError unless `minimum` is a whole number of at least 1."""
    if not isinstance(minimum, int) or isinstance(minimum, bool) or minimum < 1:
        raise AnnotationError(
            f"minimum is {minimum!r}; expected the number of people who rank each prompt, at "
            "least 1."
        )


def check_name(name: Any) -> str:
    """Checks an annotator's name and returns it in Unicode NFC, without surrounding spaces.

    Raises:
        AnnotationError: the name is empty, too long, or not printable.
    """
    text = unicodedata.normalize("NFC", name).strip() if isinstance(name, str) else ""
    if not text or len(text) > LONGEST_NAME or not text.isprintable():
        raise AnnotationError(
            f"the name is {name!r}; expected 1 to {LONGEST_NAME} printable characters."
        )
    return text


def check_comment(comment: Any) -> str | None:
    """Checks an annotator's comment; strips surrounding spaces and turns "" into None.

    Raises:
        AnnotationError: the comment is not text, or is too long.
    """
    if comment is not None and not (isinstance(comment, str) and len(comment) <= LONGEST_COMMENT):
        raise AnnotationError(
            f"the comment is {str(comment)[:40]!r}; expected a text of at most {LONGEST_COMMENT} "
            "characters."
        )
    # A lone surrogate has no UTF-8 encoding, so the database could not store it.
    text = (comment or "").encode("utf-8", "replace").decode().strip()
    return text or None


def is_ranking(ranks: Sequence[Any]) -> bool:
    """Returns whether the ranks are valid: each rank is 1 + the number of smaller ranks."""
    numbers = all(type(r) is int for r in ranks)
    return numbers and all(r == 1 + sum(s < r for s in ranks) for r in ranks)
