"""A parallel map in threads, and a call with a time limit."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def of_each(
    f: Callable[[S], T], items: Iterable[S], done: Callable[[], None] = lambda: None
) -> list[T]:
    """Calls `f` for all items in up to eight threads, and returns the results in order.

    This is for functions that release the GIL, such as tokenizers.

    Args:
      done: called in this thread after each result.

    Raises:
      what `f` raises for the first item, in order, that fails; items not yet started are skipped.
    """
    rest = iter(items)
    workers = min(8, os.cpu_count() or 1)
    # Only a few per worker are submitted ahead: after an error no further item starts.
    begun: deque[Future[T]] = deque()
    found = []
    pool = ThreadPoolExecutor(workers)
    try:
        for first in itertools.islice(rest, 1):  # in this thread: it may build shared objects
            found.append(f(first))
            done()
        begun.extend(pool.submit(f, item) for item in itertools.islice(rest, 4 * workers))
        while begun:
            found.append(begun.popleft().result())
            done()
            begun.extend(pool.submit(f, item) for item in itertools.islice(rest, 1))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def within(seconds: float, work: Callable[[], T]) -> T:
    """Returns `work()`, or raises TimeoutError if it takes longer than `seconds`.

    `work` runs in a thread that can be abandoned: an HTTP client's own time limits do not cover the
    DNS lookup, which can take half a minute to fail.
    """
    box: list[T | Exception] = []

    def run() -> None:
        try:
            box.append(work())
        except Exception as error:  # noqa: BLE001 - raised again below, in the caller's thread
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]
