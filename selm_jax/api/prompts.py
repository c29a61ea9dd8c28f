"""Reads prompts that a user writes in Python, as texts or as conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from selm_jax.api.errors import ApiError
from selm_jax.text.conversations import Columns, Prompt, parse
from selm_jax.text.tables import BadRow

# The text of a user's turn, or a list of turns such as {"role": "user", "content": "Hello"} that
# ends with a user's turn.
PromptLike: TypeAlias = str | Sequence[Mapping[str, str]]


def read_prompts(prompts: Sequence[PromptLike]) -> list[Prompt]:
    """Converts texts or conversations to `Prompt`s, whose ids are their indices in the list.

    Raises:
      ApiError: there are no prompts, there is one text instead of a list, or a prompt is not a
        conversation.

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
