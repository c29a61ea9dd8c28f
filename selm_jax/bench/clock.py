"""Times repeated work, and compares its speed with the peak speed of the devices."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from selm_jax.models.flops import Flops

# Peak bfloat16 TFLOP/s of one device, without sparsity, from the makers' data sheets. The first
# entry that occurs in the device's kind counts. A device of TPU v2, v3 and 7x is half a chip.
PEAKS = (
    ("TPU v2", 22.5), ("TPU v3", 61.5), ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197),
    ("TPU v5", 459), ("TPU v6 lite", 918), ("TPU v6e", 918), ("TPU7x", 2307 / 2),
    ("H100 PCIe", 756), ("H100 NVL", 835),
    ("H100", 989), ("H200", 989), ("GH200", 989), ("B200", 2250),
    ("A100", 312), ("A10G", 70), ("A10", 125), ("L40S", 362), ("L40", 181), ("L4", 121),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per repetition, and the devices' peak TFLOP/s during each, or None if unknown."""

    seconds: list[float]
    peak: list[float | None]

    def __add__(self, more: Times) -> Times:
        return Times(self.seconds + more.seconds, self.peak + more.peak)

    def against(self, work: Flops) -> dict[str, Any]:
        tflop = work.total / 1e12
        shares = [tflop / s / peak for s, peak in zip(self.seconds, self.peak, strict=True) if peak]
        return {
            "seconds": self.seconds,
            "tflop": tflop,
            "tflop_parts": {k: v / 1e12 for k, v in dataclasses.asdict(work).items()},
            "tflops": tflop / statistics.median(self.seconds),
            "share_of_peak": statistics.median(shares) if shares else None,
            "peak_tflops": self.peak,
        }


@dataclasses.dataclass(frozen=True)
class Clock:
    """Times repeated calls of a function.

    Attributes:
      peak: TFLOP/s of all devices together; None if it is unknown.
      source: where the peak is from, in words.
      matmul: measures the peak if it is unknown.
    """

    peak: float | None
    source: str
    matmul: Callable[[], float] | None

    @classmethod
    def make(cls, peak: float | None, dtype: str) -> Clock:
        count, kind = jax.device_count(), jax.devices()[0].device_kind
        if peak is not None:
            return cls(peak * count, f"{peak:g} TFLOP/s per device, as given", None)
        if jax.default_backend() == "cpu":
            return cls(
                None, "a 2048^3 float32 matrix product before and after each step", _matmul()
            )
        known = next((tflops for name, tflops in PEAKS if name in kind), None)
        if known is None or dtype != "bfloat16":
            return cls(None, f"unknown for {kind} in {dtype}; give it with --peak", None)
        return cls(
            known * count, f"{known:g} bfloat16 TFLOP/s per {kind}, from its data sheet", None
        )

    def measure(self, step: Callable[[], Any], count: int) -> Times:
        seconds, peaks = [], []
        for _ in range(count):
            before = self.matmul() if self.matmul else self.peak
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
            after = self.matmul() if self.matmul else self.peak
            peaks.append((before + after) / 2 if before and after else None)
        return Times(seconds, peaks)


def _matmul() -> Callable[[], float]:
    """Makes a function that measures the TFLOP/s of a 2048^3 float32 matrix product.

    A virtual core is not always a whole one, so the peak of a CPU is measured.
    """
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()

    def measure() -> float:
        best = float("inf")
        for _ in range(2):  # the first may pay for memory that a step gave back
            began = time.perf_counter()
            product(x).block_until_ready()
            best = min(best, time.perf_counter() - began)
        return 2e-12 * 2048**3 / best

    return measure
