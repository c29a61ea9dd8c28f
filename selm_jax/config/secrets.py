"""Finds API keys and passwords in settings, because a run copies settings into its folder.

An experiment gives the name of an environment variable instead (`key_env`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

INSTEAD = (
    "A run writes its settings into its folder and into the README of every model that it exports. "
    "Put the key into an environment variable and give that variable's name as `key_env`, in "
    "rollout.remote or in a judge's settings. Commands that a run starts inherit its environment"
)

_SHAPES = {
    "a key": (
        r"\b(sk|pk|rk|nvapi|xai|pplx|glpat|gsk|r8|hf|tgp|fw)[-_][A-Za-z0-9_-]{16,}",
        r"\b(gh[pousr]_|github_pat_|xox[abeoprs]-|AIza)[A-Za-z0-9_-]{16,}",
        r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
        r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    ),
    "an option with a key": (
        r"(?i)(?:^|\s)--?(?:[a-z]+[-_])*(?:api[-_]?key|secret|password|passwd)(?:\s+|=)(?!-)\S",
        r"(?i)(?:^|\s)--?(?:(?:hf|hub|api|auth|access|bearer)[-_])?token(?:\s+|=)(?!-)\S",
    ),
    "a variable with a key": (
        r"\b(?:[A-Z0-9]+_)*(?:API_?KEY|TOKEN|SECRET|PASSWORD|ACCESS_KEY|ACCESS_KEY_ID)\s*=\s*\S",
    ),
    "a header with a key": (
        r"(?i)\b(?:authorization|x-api-key)\s*[:=]\s*\S",
        r"(?i)\b(?:bearer|basic)\s+(?=\S*[0-9])[A-Za-z0-9._~+/=-]{8,}",
    ),
    "an address with a password": (
        r"\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@",
        r"(?i)[?&](?:api[-_]?key|access[-_]?token|token|sig|signature|x-amz-signature)=[^&\s]{8}",
    ),
}
_NAMES = re.compile(
    r".*(apikey|password|passwd|secret|secretkey|privatekey|authorization)|"
    r"(access|auth|api|hf|hub|bearer)?token"
)


def found(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the paths of settings that look like API keys, each with the reason, not the key."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            here = (*path, str(name))
            if _is_named(str(name), value):
                yield here, "its name suggests that it is a key"
            elif name == "key_env" and isinstance(value, str) and not _is_variable(value):
                yield here, "the name of an environment variable was expected, such as JUDGE_KEY"
            else:
                yield from found(value, here)
            if (kind := _looks_like(str(name))) is not None:
                yield path, f"one of its names looks like {kind}"
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from found(value, (*path, str(i)))
    elif isinstance(tree, str) and (kind := _looks_like(tree)) is not None:
        yield path, f"it contains {kind}"


def _is_named(name: str, value: Any) -> bool:
    """Says whether a setting has a name such as `api_key`, and a value that may be an API key."""
    plain = re.sub("[^a-z0-9]", "", name.lower())
    if not isinstance(value, str) or not _NAMES.fullmatch(plain):
        return False
    return bool(value) and (plain != "token" or re.fullmatch(r"[\w.~+/=-]{8,}", value) is not None)


def _is_variable(text: str) -> bool:
    """Returns whether a text is the name of an environment variable rather than a key."""
    mixed = len(text) >= 20 and re.search("[a-z]", text) and re.search("[0-9]", text)
    return re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", text) is not None and not mixed


def _looks_like(text: str) -> str | None:
    for kind, shapes in _SHAPES.items():
        if any(re.search(shape, text) for shape in shapes):
            return kind
    return None
