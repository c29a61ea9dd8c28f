"""All that a process has started, also what has left its group and session, on Linux.

A program that makes itself a daemon starts a child in a session of its own and ends; the child then
belongs to process 1, and nobody knows whose it was. A process that has `adopt`ed gets such children
itself. On other systems these two do nothing, and daemons are not found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_SET_CHILD_SUBREAPER = 36  # of prctl(2)
_ROUNDS = 50  # what is started while the others are killed is found by the next round


def adopt() -> None:
    """From now on children whose parents have ended are this process's, and so are found."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill(pid: int) -> None:
    """Kills everything that a process has started, and what that has started; not the process itself."""
    for _ in range(_ROUNDS):
        found = _of(pid)
        if not found:
            return
        for each in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        time.sleep(0.001)  # what is dead stays in the table until its parent has looked


def _of(pid: int) -> list[int]:
    """The descendants of a process that are alive."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name stands in brackets and may hold anything; state and parent follow it.
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents.setdefault(int(parent), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found
