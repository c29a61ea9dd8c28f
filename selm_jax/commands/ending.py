"""Ends a command of `selm` with a message and an exit status.

Exit status 1 is an error, 130 is Ctrl-C, 75 is a run that was told to stop and saved (it ends by
itself), and 76 is a process of a run whose other processes are gone or stuck (`parallel.watch`).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from selm_jax.parallel.watch import STATUS
from selm_jax.shell import interrupt
from selm_jax.shell.mirror import in_words
from selm_jax.shell.progress import talks

_INTERRUPTED = 130  # what typer returns after Ctrl-C


def carried_out(work: Callable[[], Any]) -> None:
    """Runs a command, and ends the program with the exit status that `work` returns.

    An error whose message was written for the user is shown without a traceback, unless `--verbose`
    or $SELM_TRACEBACK asks for it.
    """
    try:
        with interrupt.heard():
            status = work()
    except Exception as e:
        if _others_are_gone(e):
            _leave_the_others(
                f"selm: another process of this run is gone; start all of them again\n{e}", STATUS
            )
        if os.environ.get("SELM_TRACEBACK") or talks().verbose or not is_for_the_user(e):
            _leave_the_others(traceback.format_exc())
            raise
        message = in_words(f"selm: {getattr(e, 'format_message', e.__str__)()}")
        _leave_the_others(message)
        print(message, file=sys.stderr)
        sys.exit(1)
    if status == _INTERRUPTED:
        message = "\nstopped; the same command continues from here"
        _leave_the_others(message, _INTERRUPTED)
        print(message, file=sys.stderr)
    if status:
        sys.exit(status)


def is_for_the_user(error: Exception) -> bool:
    """Says whether an error is meant for the user: from this package, the system or the options."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, MemoryError)) or package in ("selm_jax", "typer", "click")


def _leave_the_others(message: str, status: int = 1) -> None:
    """Ends this process at once if it is one of several processes of a run.

    An orderly exit would wait for the others, and they for this one. The coordinator tells them.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        print(message, file=sys.stderr, flush=True)
        os._exit(status)


def _others_are_gone(error: Exception) -> bool:
    multihost = sys.modules.get("selm_jax.parallel.multihost")  # not loaded: there are no others
    return multihost is not None and multihost.others_are_gone(error)
