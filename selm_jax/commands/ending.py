"""How the program ends: what it says, and with which status.

Exit status 1 is an error, 130 is Ctrl-C, 75 a run that was told to stop and saved (that one ends
itself), and 76 a run of several processes whose others are gone.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from selm_jax.shell import interrupt

_INTERRUPTED = 130  # what typer returns after Ctrl-C


def carried_out(work: Callable[[], Any]) -> None:
    """Does the work, which returns an exit status, and ends the program with it. An error whose
    message was written for the user is that message and no trace; $SELM_TRACEBACK shows the trace."""
    try:
        with interrupt.heard():
            status = work()
    except Exception as e:
        if _others_are_gone(e):
            _leave_the_others(
                f"selm: another process of this run is gone; start all again\n{e}", 76
            )
        if os.environ.get("SELM_TRACEBACK") or not is_for_the_user(e):
            _leave_the_others(traceback.format_exc())
            raise
        message = f"selm: {getattr(e, 'format_message', e.__str__)()}"
        _leave_the_others(message)
        print(message, file=sys.stderr)
        sys.exit(1)
    if status == _INTERRUPTED:
        message = "\nstopped; the same command goes on from here"
        _leave_the_others(message, _INTERRUPTED)
        print(message, file=sys.stderr)
    if status:
        sys.exit(status)


def is_for_the_user(error: Exception) -> bool:
    """Whether its message was written for the user: ours, the system's, or a wrong option's."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or package in ("selm_jax", "typer", "click")


def _leave_the_others(message: str, status: int = 1) -> None:
    """Beside other processes of this run, ends at once: an orderly exit would wait for them, and
    they for this one. They are told by the coordinator."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        print(message, file=sys.stderr, flush=True)
        os._exit(status)


def _others_are_gone(error: Exception) -> bool:
    multihost = sys.modules.get("selm_jax.parallel.multihost")  # not loaded: there are no others
    return multihost is not None and multihost.others_are_gone(error)
