"""Times repeated work, and compares its speed with the limits of the devices."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from selm_jax.bench.limits import Limit
from selm_jax.models.flops import Flops

Rates = list[float | None]


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per repetition, and the devices' peak compute and memory rates during each one.

    Attributes:
      peak: the devices' peak TFLOP/s; bandwidth: the GB/s of their memory.
    """

    seconds: list[float]
    peak: Rates
    bandwidth: Rates

    def __add__(self, more: Times) -> Times:
        return Times(
            self.seconds + more.seconds, self.peak + more.peak, self.bandwidth + more.bandwidth
        )

    def against(self, work: Flops) -> dict[str, Any]:
        """Compares the times with the peak; `mfu` is the median share of it (None if unknown)."""
        tflop = work.total / 1e12
        return {
            "seconds": self.seconds,
            "tflop": tflop,
            "tflop_parts": {k: v / 1e12 for k, v in dataclasses.asdict(work).items()},
            "tflops": tflop / statistics.median(self.seconds),
            "mfu": _share(tflop, self.seconds, self.peak),
            "peak_tflops": self.peak,
        }

    def reading(self, read: int, steps: int) -> dict[str, Any]:
        """Compares the times with the time for reading `read` bytes in each of `steps` steps."""
        return {
            "bytes_per_step": read,
            "share_of_bandwidth": _share(1e-9 * read * steps, self.seconds, self.bandwidth),
            "bandwidth_gb": self.bandwidth,
        }


def _share(work: float, seconds: Sequence[float], limits: Rates) -> float | None:
    shares = [work / s / limit for s, limit in zip(seconds, limits, strict=True) if limit]
    return statistics.median(shares) if shares else None


@dataclasses.dataclass(frozen=True)
class Clock:
    """Times repeated calls of a function, and notes the limits before and after each."""

    peak: Limit
    bandwidth: Limit

    def measure(self, step: Callable[[], Any], count: int) -> Times:
        times = Times([], [], [])
        for _ in range(count):
            before = self._limits()
            seconds = self._seconds(step)
            peak, bandwidth = map(_mean, before, self._limits())
            times += Times([seconds], [peak], [bandwidth])
        return times

    @staticmethod
    def _seconds(step: Callable[[], Any]) -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    def _limits(self) -> tuple[float | None, float | None]:
        return self.peak.now(), self.bandwidth.now()


def _mean(before: float | None, after: float | None) -> float | None:
    return (before + after) / 2 if before and after else None
