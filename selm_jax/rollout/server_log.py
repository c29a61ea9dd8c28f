"""Finds the lines in a generation server's log that explain why the server ended."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

_LAST = 12  # lines that an error shows
_LONGEST = 300  # characters of one of them
_RAISED = re.compile(r"\b\w*(?:Error|Exception)\b: ")
_CAUSES = {
    # A vLLM bug: for a request with a seed it rewinds the generator, which torch can on GPUs only.
    "CPU Generator does not use offset": (
        "vLLM on a CPU cannot split a prompt if the request has a seed, and all requests here have "
        "one. Start it with --max-num-batched-tokens N, where N is more than the tokens of "
        "rollout.remote.concurrency prompts together (for example 8192), or lower the concurrency"
    ),
    "JAX does not support per-request seed": (
        "vLLM on TPUs refuses seeds. Set rollout.remote.seeds: false; then another run of the same "
        "experiment draws other answers"
    ),
}


def size_of(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def story(log: Path, start: int = 0) -> str:
    """Quotes the first error after `start` bytes of the log, a known remedy, and the last lines."""
    first, last, known = "", deque[str](maxlen=_LAST), ""
    with log.open("rb") as file:
        before = file.read(start).count(b"\n")
        for number, raw in enumerate(file, before + 1):
            line = raw.decode("utf-8", "replace").rstrip()[:_LONGEST]
            if not first and _RAISED.search(line):
                first = f"Its first error is in line {number}: {line.strip()}\n"
            known = known or advice(line)
            last.append(line)
    return f"{first}{known}The end of {log}:\n" + "\n".join(last)


def advice(text: str) -> str:
    """A known remedy for a server's error; "" if there is none."""
    return next((f"{way_out}.\n" for sign, way_out in _CAUSES.items() if sign in text), "")
