"""Asks a server which models it serves, and how long their context is."""

from __future__ import annotations

from collections.abc import Mapping

import httpx2

from selm_jax.config import Remote
from selm_jax.rollout.dialects import DIALECTS, Served
from selm_jax.shell.endpoint import ServerError, api_key, authorization, is_here


def served(settings: Remote, root: str) -> dict[str, Served] | None:
    """The models that the server at the URL `root` serves, by name.

    It is None if the server does not answer yet, and empty if it does not know the URL.

    Raises:
        ServerError: the server is of another kind, or needs a key.
    """
    dialect = DIALECTS[settings.engine]
    answer = get(settings, root + dialect.model)
    if answer is None or answer.status_code >= 500:  # it is loading
        return None
    if answer.status_code == 404:
        for name in DIALECTS.keys() - {settings.engine}:
            there = get(settings, root + DIALECTS[name].model)
            if there is not None and there.status_code == 200:
                raise ServerError(
                    f"{root} is a server of {name}, but rollout.remote.engine is "
                    f"{settings.engine}. Set the engine to {name}"
                )
        return {}
    if answer.status_code != 200:
        raise ServerError(
            f"{root}{dialect.model} answered with HTTP status {answer.status_code}. If the server "
            "needs an API key, set rollout.remote.key_env to the environment variable that "
            "contains it"
        )
    try:
        return dialect.served(answer.json())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ServerError(
            f"{root}{dialect.model} does not answer like {settings.engine}. Check "
            "rollout.remote.engine and rollout.remote.url"
        ) from None


def get(settings: Remote, url: str) -> httpx2.Response | None:
    """The answer of the server to a GET request; None if it cannot be reached."""
    headers = authorization(api_key(settings.key_env))
    try:
        return httpx2.get(url, headers=headers, timeout=10, trust_env=not is_here(url))
    except httpx2.RequestError:
        return None


def check_context(root: str, model: Served, tokens: int) -> None:
    """Raises ServerError if a model's context has fewer than `tokens` tokens."""
    if model.longest is not None and model.longest < tokens:
        raise ServerError(
            f"{root} serves {model.folder} with a context of {model.longest:,} tokens "
            f"(max_model_len), but the longest prompt and rollout.max_new_tokens together are "
            f"{tokens:,}. Start the server with --max-model-len {tokens} or more, or lower "
            "rollout.max_new_tokens"
        )


def listed(models: Mapping[str, Served]) -> str:
    """The folders of served models, for a message."""
    folders = [each.folder for each in models.values()]
    return ", ".join(folders) or "no model in the form of rollout.remote.engine"
