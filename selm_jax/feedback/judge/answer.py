"""Parses a chat completion: the reply of an OpenAI-compatible server.

vLLM, SGLang and Ollama send the same format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SAID = ("text", "output_text")  # types of the parts of a message that contain its text


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer, as the server reports them."""

    prompt: int
    completion: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True)
class Completion:
    """One chat completion, as the server returned it.

    Attributes:
        text: the message's content; empty if there was none.
        logprobs: for each token of the answer, a mapping from the text of the most likely tokens to
            their log-probability (nats); None if the server sent none.
        usage: token counts; None if the server did not report them.
        finish: the server's finish_reason, such as `stop` or `length`.
    """

    text: str
    logprobs: tuple[Mapping[str, float], ...] | None
    usage: Usage | None
    finish: str | None

    @staticmethod
    def restore(stored: Mapping[str, Any]) -> Completion:
        """Rebuilds a completion from the JSON of `dataclasses.asdict`."""
        logprobs, usage = stored["logprobs"], stored["usage"]
        return Completion(
            stored["text"],
            None if logprobs is None else tuple(logprobs),
            None if usage is None else Usage(**usage),
            stored["finish"],
        )


def parse_completion(body: str) -> Completion:
    """Parses the body of a successful reply as a chat completion.

    Raises:
        ValueError: the body is not a chat completion; the message says why.
    """
    try:
        tree = json.loads(body)
        choice = tree["choices"][0]
        text = _text(choice["message"].get("content"))
        return Completion(text, _logprobs(choice), _usage(tree), choice.get("finish_reason"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _text(content: Any) -> str:
    """The text of a message's content, without reasoning parts if it is a list of parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] in _SAID)
    if not isinstance(content, str | None):
        raise TypeError(f"content is of type {type(content).__name__}; expected a string")
    return content or ""


def _logprobs(choice: Mapping[str, Any]) -> tuple[dict[str, float], ...] | None:
    content = (choice.get("logprobs") or {}).get("content")
    if content is None:
        return None
    found = tuple(
        {each["token"]: float(each["logprob"]) for each in token.get("top_logprobs") or ()}
        for token in content
    )
    if any(math.isnan(value) for token in found for value in token.values()):
        raise ValueError("a log-probability is not a number")
    return found


def _usage(tree: Mapping[str, Any]) -> Usage | None:
    """The reported token counts, or None if they are missing or malformed."""
    usage: Any = tree.get("usage")
    try:
        found = Usage(int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return found if min(found.prompt, found.completion) >= 0 else None
