"""Where the seconds of training go: `Laps` splits a clock's time into phases."""

from __future__ import annotations

import time
from collections.abc import Callable

from selm_jax.shell import compiling

# The phases of an update, then what follows it.
PHASES: tuple[str, ...] = ("data", "gradients", "apply", "compile")
AFTER: tuple[str, ...] = ("checkpoint", "log")


class Laps:
    """Charges the time since the last call to the phase that has just ended.

    Time that JAX spent on building programs (tracing, lowering, compiling) is charged to the phase
    `compile` instead, so the phases add up to the whole time.

    Args:
      clock: tells the time in seconds.
      built: tells how many seconds were spent on building programs so far.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        built: Callable[[], float] = compiling.spent,
    ):
        self._clock, self._built = clock, built
        self._last = clock(), built()
        self._seconds = dict.fromkeys((*PHASES, *AFTER), 0.0)

    def __call__(self, phase: str) -> None:
        """Ends a phase of the work."""
        now = self._clock(), self._built()
        whole, built = (a - b for a, b in zip(now, self._last, strict=True))
        built = min(built, whole)
        self._seconds[phase] += whole - built
        self._seconds["compile"] += built
        self._last = now

    def taken(self) -> dict[str, float]:
        """Returns the seconds by phase since the last call of this method, and starts at 0."""
        found, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return found
