"""SHA-256 of files, and of JSON that carries its own: what was written is told from what was damaged.

What it costs: every byte that is written is read once more, from memory as a rule, and every byte
that a run goes on from is read twice. One thread does about 1 GB a second where the processor has
instructions for SHA-256, and a third of that where it has none; as many files are hashed at a time as
there are cores, up to eight. For a checkpoint of 84 GB (7B parameters and their moments) that is some
ten seconds of eight cores, beside the updates, or 84 of one, and less where several hosts share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_KEY = "sha256"


def sha256(file: Path) -> str:
    """Of a file's bytes, in hex."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of(files: Iterable[Path]) -> list[str]:
    """Of each file, several at a time: hashing lets other threads work."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256, files))


def seal(value: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """The same JSON with its digest in it, which is also of the name that it goes by."""
    return dict(value) | {_KEY: _of(value, name)}


def is_sealed(value: Any, name: str = "") -> bool:
    """Whether this is JSON as `seal` has given it back."""
    return isinstance(value, dict) and value.get(_KEY) == _of(value, name)


def fits(value: Mapping[str, Any], name: str = "") -> bool:
    """Whether the digest that JSON carries is its own; what carries none, fits."""
    return _KEY not in value or is_sealed(value, name)


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON without its digest."""
    return {k: v for k, v in value.items() if k != _KEY}


def _of(value: Mapping[str, Any], name: str) -> str:
    as_read = json.loads(
        json.dumps([name, unsealed(value)])
    )  # its keys are texts, tuples are lists
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
