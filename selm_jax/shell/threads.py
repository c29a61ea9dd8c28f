"""The same work for many things, in threads: for calls that let other threads work, as tokenizers' do."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def of_each(
    f: Callable[[S], T], items: Iterable[S], done: Callable[[], None] = lambda: None
) -> list[T]:
    """What `f` gives for each, in their order, worked out on as many as eight cores at a time.

    Args:
      done: is called in this thread when one more result is there.

    Raises:
      whatever `f` raises first, in the order of the items; what has not begun is then left.
    """
    rest = iter(items)
    workers = min(8, os.cpu_count() or 1)
    begun: deque[Future[T]] = (
        deque()
    )  # a few for each worker: what comes after an error never begins
    found = []
    pool = ThreadPoolExecutor(workers)
    try:
        for first in itertools.islice(rest, 1):  # here: it may build what serves all of them
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
