"""Computes SHA-256 of files, and adds digests to JSON objects, to detect damage and changes.

The cost: every byte written is read once more, usually from memory, and every byte that a run
resumes from is read twice. One thread hashes about 1 GB/s if the processor has instructions for
SHA-256, and a third of that if not. Up to eight files are hashed in parallel, one per core. A
checkpoint of 84 GB (7B parameters and their moments) takes about 84 seconds of one core or ten
seconds of eight, in parallel with the updates, and less if several hosts share it.
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
    """SHA-256 of a file's bytes, in hex."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of(files: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file, computed in parallel threads (hashing releases the GIL)."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256, files))


def seal(value: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """A copy of a JSON object, with a digest of its content and its name added."""
    return dict(value) | {_KEY: _of(value, name)}


def is_sealed(value: Any, name: str = "") -> bool:
    """Says whether a value is a JSON object whose digest, added by `seal`, matches its content."""
    return isinstance(value, dict) and value.get(_KEY) == _of(value, name)


def fits(value: Mapping[str, Any], name: str = "") -> bool:
    """Returns whether a JSON object has no digest, or has a digest that matches its content."""
    return _KEY not in value or is_sealed(value, name)


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object without its digest."""
    return {k: v for k, v in value.items() if k != _KEY}


def _of(value: Mapping[str, Any], name: str) -> str:
    # As it would be read from a file: keys become texts, tuples become lists.
    as_read = json.loads(json.dumps([name, unsealed(value)]))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
