"""Finds the Git commit and the package versions of the running code, for what it writes."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from functools import lru_cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_VERSIONS = (
    *("selm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "jinja2"),
)


def versions() -> dict[str, str]:
    """The installed versions of this package and of those that can change its numbers."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS}


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The Git commit of this package, with `-changed` if files differ from it; None if unknown.

    It is that of the checkout which the package is imported from, or the one that pip recorded when
    it installed the package from a repository.
    """
    if (_PACKAGE.parent / ".git").exists():
        found = _git("rev-parse", "HEAD")
        if found:
            changed = _git("status", "--porcelain", "--untracked-files=no", "--", _PACKAGE.name)
            return f"{found}-changed" if changed else found
    try:
        text = importlib.metadata.distribution("selm_jax").read_text("direct_url.json")
        return json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _git(*arguments: str) -> str | None:
    """The output of a git command; None without git or outside a repository."""
    command = ["git", "-C", str(_PACKAGE.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
