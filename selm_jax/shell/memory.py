"""Measures memory: the limit of a device, the peak of a process, and the size of arrays."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.errors import JaxRuntimeError

T = TypeVar("T")
GIB = 2**30


def device_limit(device: Any) -> tuple[int, str]:
    """The memory of a device that programs may use, in bytes, and the source of that figure.

    Local devices that report no limit, such as a CPU, share the memory of this process equally.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"], "the device"
    limit, source = min(_limits_of_this_process())
    return limit // len(jax.local_devices()), source


def _limits_of_this_process() -> Iterator[tuple[int, str]]:
    """Yields the limits, in bytes, on the memory of this process, each with its source."""
    yield _of_machine("MemTotal"), "this machine's memory, shared by all"
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft, "this process's limit (ulimit -v)"
    for file in _of_cgroups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")):
        yield int(file.read_text()), "the limit of this container (cgroup)"


def _of_cgroups(root: Path, own: Path) -> Iterator[Path]:
    """Yields the files under `root` that limit this process, its own group's and those above.

    Args:
      root: where the control groups are mounted, version 1 or 2.
      own: the file that names the groups of this process.
    """
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        version_2 = not controllers
        if not version_2 and "memory" not in controllers.split(","):
            continue
        top = root if version_2 else root / "memory"
        name = "memory.max" if version_2 else "memory.limit_in_bytes"
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            file = folder / name
            within = folder.is_relative_to(top) and file.is_file()
            if within and file.read_text().strip() != "max":
                yield file


def free_memory() -> int | None:
    """The bytes that this machine can give without swapping; None if it does not say."""
    return _of_machine("MemAvailable") if Path("/proc/meminfo").exists() else None


def ran_out(error: Exception) -> bool:
    """Says whether an error means that a device or this process has too little memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error).partition("\n")[0]


def until_it_fits(work: Callable[[], T], lower: Callable[[Exception], None]) -> T:
    """Does the work; whenever memory runs out, once more after `lower` has made it need less.

    Args:
      lower: gets the error, which it raises, itself or in other words, if nothing can be given up.
    """
    while True:
        try:
            return work()
        except (JaxRuntimeError, MemoryError) as e:
            if not ran_out(e):
                raise
            lower(e)
        keep_freed(False)
        release()  # what the frames of the failed work held


def left_of_limit() -> int | None:
    """The bytes that are left of this process's limit (ulimit -v), if there is one.

    The limit counts addresses: a process with JAX has 2 GiB of them before it does anything.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or (sizes := _of_process()) is None:
        return None
    return max(0, soft - sizes[0])


def held_now() -> int:
    """The bytes that this process holds now; 0 if the system does not say."""
    sizes = _of_process()
    return 0 if sizes is None else sizes[1]


def _of_process() -> tuple[int, int] | None:
    """The bytes of this process's addresses, and of those in memory; None if unknown."""
    if not (file := Path("/proc/self/statm")).exists():
        return None
    addresses, held = map(int, file.read_text().split()[:2])
    return addresses * resource.getpagesize(), held * resource.getpagesize()


def _of_machine(name: str) -> int:
    if (file := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
        return int(lines[name].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shard_bytes(tree: Any) -> int:
    """The bytes of a tree of (abstract) arrays on one device; other leaves count as 0 bytes."""
    return sum(_shard_bytes(x) for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))


def _shard_bytes(x: Any) -> int:
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def gib(count: float) -> str:
    """A number of bytes in GiB, in words: two decimals below 99.5."""
    return f"{count / GIB:.2f}" if count < 99.5 * GIB else f"{count / GIB:,.0f}"


def peak_mib() -> float:
    """The peak memory, in MiB, of the fullest device, or of this process if devices report none."""
    of_devices = device_peak()
    return (process_peak() if of_devices is None else of_devices) / 2**20


def device_peak() -> int | None:
    """The most bytes that this process's fullest device has held; None if devices do not tell."""
    held = [device.memory_stats() for device in jax.local_devices()]
    if all(stats and "peak_bytes_in_use" in stats for stats in held):
        return max(stats["peak_bytes_in_use"] for stats in held if stats)
    return None


def process_peak() -> int:
    """The most bytes that this process has held; on Linux, since the last `release`."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peaks() -> dict[str, float]:
    """The metrics `memory/...`: peaks of this process and of its fullest device, in GiB."""
    found = {"memory/process": process_peak(), "memory/device": device_peak()}
    return {name: size / GIB for name, size in found.items() if size is not None}


def release() -> None:
    """Returns freed memory to the system and resets the process's peak (Linux only).

    The C library keeps freed blocks of a few megabytes, such as one layer's weights: about 0.75 GB
    after generating on CPU with a model of 0.5 GB.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    except PermissionError:  # in some sandboxes; the peak then counts from the process's start
        return


# Parameters of mallopt(3), and the last two's values at the start of a program.
_ARENA_MAX, _TRIM_THRESHOLD, _MMAP_MAX = -8, -1, -4
_TRIM_AT, _MAPPED = 128 * 1024, 65536


def share_one_heap() -> None:
    """Lets all threads allocate from one heap, the only one that `keep_freed` reaches (glibc only).

    It must be called before JAX starts its threads: a thread keeps the heap that it has.
    """
    if (set_to := _of_glibc("mallopt")) is not None:
        set_to(_ARENA_MAX, 1)


def keep_freed(keep: bool = True) -> None:
    """Keeps freed memory in this process until `release`, or returns it at once (glibc only).

    XLA allocates the temporary arrays of a program anew each time it runs. The system clears every
    page of them, which takes about a seventh of the time of an update of SmolLM2-135M.
    """
    if (set_to := _of_glibc("mallopt")) is not None:
        set_to(_TRIM_THRESHOLD, -1 if keep else _TRIM_AT)
        set_to(_MMAP_MAX, 0 if keep else _MAPPED)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None if it is not glibc."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return None
    return getattr(libc, name)
