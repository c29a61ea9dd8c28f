"""Handles Ctrl-C: the first one ends the program or asks it to stop; the second one kills it.

Python raises KeyboardInterrupt wherever the program is. In a garbage collection, in a `__del__` or
in a library callback no code can catch it: it is printed as ignored, and the program continues.
Other code catches and drops it. So a thread watches the main one from the first Ctrl-C on, and
raises KeyboardInterrupt again as long as no code handles one. Where something must be saved first,
nothing is raised: the code that checks `asked` stops the program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_PATIENCE = 0.1  # seconds between two looks; two in a row that see nobody handle it raise it again
_asked = threading.Event()
_anew = threading.Event()  # the next signal is our own
_deferred = False


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Keeps libraries from swallowing Ctrl-C in a `with` block. Works only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a shell's `command &`: Ctrl-C is not for this process
        yield
        return
    hook = sys.unraisablehook

    def unraisable(lost: Any) -> None:
        if not (issubclass(lost.exc_type, KeyboardInterrupt) and _asked.is_set()):
            hook(lost)  # the other is raised again, so it need not be printed

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
    """Returns whether the user has pressed Ctrl-C."""
    return _asked.is_set()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Keeps the first Ctrl-C in a `with` block from raising: the block has to check `asked`."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def _watch() -> None:
    """Raises KeyboardInterrupt in the main thread again and again until some code handles it."""
    unseen = 0
    pause = threading.Event()
    while not pause.wait(_PATIENCE) and _asked.is_set():
        # An exception on its way between two handlers is not seen either: so look twice.
        unseen = 0 if _deferred or _is_handled() else unseen + 1
        if unseen >= 2 and not _anew.is_set():
            unseen = 0
            _anew.set()
            os.kill(os.getpid(), signal.SIGINT)


def _is_handled() -> bool:
    """Says whether an `except`, `finally` or `__exit__` of the main thread handles a Ctrl-C now."""
    found: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    error = found[1] if isinstance(found, tuple) else found  # a tuple before Python 3.12
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _on_sigint(*_: Any) -> None:
    if _anew.is_set():
        _anew.clear()
    elif _asked.is_set():  # the system kills it, even where Python gets no turn
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    else:
        _asked.set()
        threading.Thread(target=_watch, daemon=True).start()
    if not _deferred:
        raise KeyboardInterrupt
    # Not through sys.stderr, which may be in the middle of a line.
    os.write(2, b"\nstopping as soon as this update is saved; Ctrl-C again kills the program\n")
