"""Runs threads that take turns line by line, in an order that a seed determines."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Container, Sequence


def run(
    workers: Sequence[Callable[[], None]], files: Container[str], seed: int, longest: int = 5000
) -> None:
    """Runs the workers to their ends, taking turns at the lines of these files.

    Before each such line a worker waits for its turn, which it keeps for a random number of lines,
    often one. So a worker may be stopped anywhere while another one runs, even to its end.

    Raises:
      AssertionError: the workers have not ended after `longest` turns.
      Exception: the first one that a worker raised.
    """
    chance = random.Random(seed)
    turns = [threading.Semaphore(0) for _ in workers]
    given_back = threading.Semaphore(0)
    ended = [False] * len(workers)
    errors: list[Exception] = []

    def begin(i: int) -> None:
        def wait(frame, event, argument):
            if event == "line":
                given_back.release()
                turns[i].acquire()
            return wait

        def of_file(frame, event, argument):
            return wait if frame.f_code.co_filename in files else None

        turns[i].acquire()
        sys.settrace(of_file)
        try:
            workers[i]()
        except Exception as e:  # noqa: BLE001  (it is raised below)
            errors.append(e)
        finally:
            sys.settrace(None)
            ended[i] = True
            given_back.release()

    threads = [threading.Thread(target=begin, args=(i,), daemon=True) for i in range(len(workers))]
    for thread in threads:
        thread.start()
    for _ in range(longest):
        living = [i for i, over in enumerate(ended) if not over]
        if not living:
            break
        i = chance.choice(living)
        for _ in range(chance.choice((1, 1, 1, 2, 4, 16, 64))):
            if not ended[i]:
                turns[i].release()
                given_back.acquire()
    else:
        raise AssertionError(f"seed {seed}: not over after {longest} turns")
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
