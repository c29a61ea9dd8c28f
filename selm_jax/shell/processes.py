"""Processes that end with the one that started them, however that ends, and all that they have started.

`start` puts this file, run as a program, between the two: it starts the command in a session of its own
and ends all of it when its standard input does, which is so when `stop` says it, and when whoever started
it was killed.

A program that makes itself a daemon leaves group, session and parent: its child belongs to process 1
then, and nobody knows whose it was. On Linux a process that has called `adopt` gets such children
itself, and `kill_descendants` finds them. On other systems these two do nothing, and daemons stay.
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
_ROUNDS = 50  # what is started while the others are killed is found by the next round


def start(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the command; what it says goes to `log`. The process returned ends when the command does,
    with its status."""
    return subprocess.Popen(
        [sys.executable, "-P", __file__, *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,  # a Ctrl-C at the terminal is for the run, which then stops this
    )


def stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ends the command and all it started: it is asked to, and after so many seconds made to."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{seconds}\n".encode())
        process.stdin.close()
    process.wait()


def adopt() -> None:
    """From now on children whose parents have ended are this process's, and so are found."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants(pid: int) -> None:
    """Kills all that a process has started, and what that has started; not the process itself."""
    for _ in range(_ROUNDS):
        found = _descendants(pid)
        if not found:
            return
        for each in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        time.sleep(0.001)  # what is dead stays in the table until its parent has looked


def _descendants(pid: int) -> list[int]:
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


def _keep(command: Sequence[str]) -> int:
    adopt()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    threading.Thread(target=_end_when_told, args=(process,), daemon=True).start()
    status = process.wait()
    _signal(process, signal.SIGKILL)  # whoever it left behind
    kill_descendants(os.getpid())
    return status if status >= 0 else 128 - status


def _end_when_told(process: subprocess.Popen[bytes]) -> None:
    # Not by sys.stdin, whose lock would be held when this process ends.
    told = os.read(0, 64)  # empty: the one who started us is gone
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
