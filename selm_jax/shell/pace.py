"""Notes how the work of this process goes on: other processes of a run may be waiting for it.

Code that has finished a small piece of a long work calls `here.sign()`: a bar that advances, an
answer of a server, another look at whether people have answered.
`selm_jax.parallel.watch` tells these signs to the other processes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

_RECENT = 50  # signs whose intervals say how fast a stage is; the first may include compilation


class Pace:
    """The signs that a process has given, and the intervals between them in its present stage.

    Attributes:
      stage: what the process is doing, for messages.
      signs: how many signs it has given.
      steps: how many of these were at a point that all processes of the run pass in the same order.
      waits: whether it waits for other processes, so that it cannot go on by itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()  # threads that ask a server give signs, too
        self._intervals: deque[float] = deque(maxlen=_RECENT)
        self._last = clock()
        self.stage, self.signs, self.steps, self.waits = "the start", 0, 0, False

    def enter(self, stage: str) -> None:
        """Begins a stage, whose pace is not known yet."""
        with self._lock:
            self.stage, self._last = stage, self._clock()
            self._intervals.clear()
            self.signs += 1

    def sign(self, *, step: bool = False) -> None:
        """Notes that a piece of work is done. `step`: all processes pass this point, in order."""
        with self._lock:
            now = self._clock()
            if not self.waits:
                self._intervals.append(now - self._last)
            self._last = now
            self.signs += 1
            self.steps += step

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which this process waits for others; the wait does not count as its pace."""
        self.waits = True
        try:
            yield
        finally:
            with self._lock:
                self.waits, self._last = False, self._clock()
                self.signs += 1

    @property
    def longest(self) -> float:
        """The longest of the recent intervals between two signs of this stage, in seconds."""
        with self._lock:
            return max(self._intervals, default=0.0)


here = Pace()
