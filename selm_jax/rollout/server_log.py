"""What a server that was started here has said: of a long log the lines that tell why it ended."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

_LAST = 12  # lines that an error shows
_LONGEST = 300  # characters of one of them
_RAISED = re.compile(r"\b\w*(?:Error|Exception)\b: ")
_CAUSES = {
    # Its bug: for a request with a seed it winds the generator back, which torch can on GPUs alone.
    "CPU Generator does not use offset": (
        "vLLM on a CPU cannot cut a prompt in two where the request has a seed, and all requests here "
        "have one. Start it with --max-num-batched-tokens N, where N is more than the tokens of "
        "rollout.remote.concurrency prompts together (8192, say), or lower the concurrency"
    ),
}


def size_of(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def story(log: Path, start: int = 0) -> str:
    """The first error that a server told since the log had `start` bytes, its last lines, and what is
    known to help."""
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
    """What is known to help against an error of a server; "" if nothing is."""
    return next((f"{way_out}.\n" for sign, way_out in _CAUSES.items() if sign in text), "")
