"""A command that ends with the process that started it, however that process ends.

`start` puts this file, run as a program, between the two: it starts the command in a session of its own
and ends all of it when its standard input does, which is so when `stop` says it, and when whoever started
it was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO


def start(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the command; what it says goes to `log`. The process returned ends when the command does,
    with its status."""
    return subprocess.Popen(
        [sys.executable, __file__, *command],
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


def _keep(command: Sequence[str]) -> int:
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    threading.Thread(target=_end_when_told, args=(process,), daemon=True).start()
    status = process.wait()
    _signal(process, signal.SIGKILL)  # whoever it left behind
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
