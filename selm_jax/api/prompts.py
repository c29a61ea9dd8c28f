"""Prompts as a person writes them in Python: texts, or conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from selm_jax.api.errors import ApiError
from selm_jax.text.conversations import Columns, Prompt, parse
from selm_jax.text.tables import BadRow

# A user's turn, or turns such as {"role": "user", "content": "Hello"}, the last of them a user's.
PromptLike: TypeAlias = str | Sequence[Mapping[str, str]]


def read_prompts(prompts: Sequence[PromptLike]) -> list[Prompt]:
    """The prompts as the rest of the program has them, named by their places in the list.

    Raises:
      ApiError: no prompts, one text in place of a list, or a prompt that is no conversation.

    >>> [prompt.messages[-1].content for prompt in read_prompts(["Hello.", "Goodbye."])]
    ['Hello.', 'Goodbye.']
    >>> read_prompts("Hello.")
    Traceback (most recent call last):
    selm_jax.api.errors.ApiError: prompts is one text. Put it into a list: ['Hello.']
    """
    if isinstance(prompts, str):
        raise ApiError(f"prompts is one text. Put it into a list: [{prompts!r}]")
    if len(prompts) == 0:
        raise ApiError("prompts is an empty list. Give at least one prompt")
    return [_read(place, each) for place, each in enumerate(prompts)]


def _read(place: int, prompt: PromptLike) -> Prompt:
    given = prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    try:
        found = parse({"prompt": given}, Columns("prompt", None, None, None))
    except BadRow as error:
        raise ApiError(f"prompt {place}: {error.reason}: {error.detail}") from error
    return dataclasses.replace(found, id=str(place))
