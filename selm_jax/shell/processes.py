"""Child processes that end, with all their descendants, whenever their parent ends.

`start` runs this file as a program between the parent and the command. It starts the command in a
new session, and ends everything in it when its standard input closes: `stop` closes it, and the
system does if the parent is killed.

A program that turns itself into a daemon leaves its group, session and parent: process 1 becomes
its parent, and its origin is lost. On Linux a process that has called `adopt` becomes the parent
instead, and `kill_descendants` finds such daemons. On other systems these two functions do nothing
and daemons survive.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_SET_CHILD_SUBREAPER = 36  # of prctl(2)
_ROUNDS = 50  # a process that is started while others are killed is found in the next round


def start(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the command with its output going to `log`.

    The returned process ends when the command does, with the command's status.
    """
    return subprocess.Popen(
        [sys.executable, "-P", __file__, *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C at the terminal reaches only the run, which stops this
    )


def stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ends the command and all its descendants: SIGTERM, and SIGKILL after `seconds`."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{seconds}\n".encode())
        process.stdin.close()
    process.wait()


def adopt() -> None:
    """Makes this process the new parent of descendants whose own parent has ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants(pid: int) -> None:
    """Kills all descendants of a process, but not the process itself (Linux)."""
    for _ in range(_ROUNDS):
        found = _descendants(pid)
        if not found:
            return
        for each in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        time.sleep(0.001)  # a dead process stays in the table until its parent has waited for it


def _descendants(pid: int) -> list[int]:
    """The process IDs of all living descendants of a process."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The program's name is in brackets and may contain anything; state and parent follow.
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents.setdefault(int(parent), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def _keep(command: Sequence[str]) -> int:
    """Runs the command, ends all its descendants, and returns the command's status."""
    adopt()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    threading.Thread(target=_end_when_told, args=(process,), daemon=True).start()
    status = process.wait()
    _signal(process, signal.SIGKILL)  # the processes that it left behind
    kill_descendants(os.getpid())
    return status if status >= 0 else 128 - status


def _end_when_told(process: subprocess.Popen[bytes]) -> None:
    # Not with sys.stdin, whose lock would be held when this process ends.
    told = os.read(0, 64)  # empty if the parent is gone
    _signal(process, signal.SIGTERM)
    try:
        process.wait(float(told or 30))
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1:]))
