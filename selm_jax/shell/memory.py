"""How much memory was needed, and giving back what is not needed any more."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import jax


def peak_mib() -> float:
    """The most that any device ever held, in MiB; where devices do not say, this process.

    On Linux the process's peak is counted from the last `release` on.
    """
    held = [device.memory_stats() for device in jax.local_devices()]
    if all(stats and "peak_bytes_in_use" in stats for stats in held):
        return max(stats["peak_bytes_in_use"] for stats in held if stats) / 2**20
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def release() -> None:
    """Gives freed memory back to the system, and lets the process's peak start anew (Linux).

    The C library keeps freed blocks of some megabytes, such as one layer's weights, for itself:
    after a generation on CPU these are three quarters of a gigabyte for a model of half a one.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # not in musl
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    except PermissionError:  # some sandboxes; the peak then goes on counting from the start
        return
