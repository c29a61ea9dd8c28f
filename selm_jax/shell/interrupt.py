"""Ctrl-C: the first one ends the program or has it stop at the next safe place, the second ends it at once.

Python raises KeyboardInterrupt wherever the program is. In a garbage collection, in a `__del__` or in a
callback of a library, nobody can take it: it is printed as ignored, and the program goes on. Here it is
remembered, and raised anew a moment later. Where something has to be saved first it is not raised at
all: whoever asks `asked` stops the program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_LATER = 0.05  # seconds until it is raised anew
_asked = threading.Event()
_anew = threading.Event()  # the next signal is our own
_deferred = False


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Inside, Ctrl-C is not lost. In a thread that is not the main one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a shell's `command &`: this process is not meant
        yield
        return
    hook = sys.unraisablehook

    def unraisable(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt) and _asked.is_set():
            again = threading.Timer(_LATER, _send)
            again.daemon = True
            again.start()
        else:
            hook(lost)

    signal.signal(signal.SIGINT, _on_sigint)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)
        _asked.clear()
        _anew.clear()


def asked() -> bool:
    """Whether Ctrl-C was pressed."""
    return _asked.is_set()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first Ctrl-C raises nothing: the work asks `asked` where it can stop."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def _send() -> None:
    if _asked.is_set():
        _anew.set()
        os.kill(os.getpid(), signal.SIGINT)


def _on_sigint(*_: Any) -> None:
    if _anew.is_set():
        _anew.clear()
    elif _asked.is_set():  # the system ends it, also where Python has no turn
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    _asked.set()
    if not _deferred:
        raise KeyboardInterrupt
    # Not through sys.stderr, which may be in the midst of a line.
    os.write(2, b"\nstopping when this update is saved; Ctrl-C once more ends at once\n")
