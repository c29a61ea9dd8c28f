"""Held-out pairs of the data, as what a model scores."""

from __future__ import annotations

from selm_jax.preferences.examples import Example
from selm_jax.text.answers import answer_ids
from selm_jax.text.chat import Chat, UnusableAnswer
from selm_jax.text.prompts import Prompt


def answered_pair(chat: Chat, prompt: Prompt) -> Example | None:
    """The prompt with its chosen and its rejected answer; None if one of them cannot follow it."""
    try:
        ids = {role: answer_ids(chat, prompt, role) for role in ("chosen", "rejected")}
    except UnusableAnswer:
        return None
    if ids["chosen"] == ids["rejected"]:  # they differ in what the template takes away
        return None
    return Example.of(prompt.id, chat.prompt_ids(prompt.messages), ids)
