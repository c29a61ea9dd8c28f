"""Measures how much device memory a program needs, by compiling it for devices that may be absent.

Compiling a large model takes minutes, so the result is cached under a digest of the program, the
devices and the compiler. A second plan, for example with another price, compiles nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from selm_jax.plan.loops import in_loops
from selm_jax.plan.topology import Target
from selm_jax.shell import artifacts
from selm_jax.shell.memory import gib
from selm_jax.weights.sources import cache_root


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes that a program needs on one device, as the compiler counts them.

    Attributes:
      arguments, temporaries, output: their sizes; output excludes arrays that reuse the memory of
        donated arguments.
      peak: the most bytes in use at one time, including arguments. If the compiler refuses the
        program, this is what the program needs, if the compiler says so, and the other sizes are
        unknown (-1).
      refused: the compiler's message, if the program alone does not fit on the device.
      seconds: how long the compilation took.
      cached: whether the result comes from an earlier compilation.
      in_loops: number of collectives of large arrays in the program's loops (`plan.loops`).
      again: those that every turn of a loop does with the same array, in words.
    """

    arguments: int
    temporaries: int
    output: int
    peak: int
    seconds: float
    refused: str | None = None
    cached: bool = False
    in_loops: int = 0
    again: Sequence[str] = ()


def measure(lowered: jax.stages.Lowered, target: Target) -> Memory:
    """Returns the memory that a program needs, from the cache or by compiling the program.

    Raises:
      jax.errors.JaxRuntimeError: if the compiler fails for a reason other than memory.
    """
    file = cache_root() / "plans" / f"{_digest(lowered, target)}.json"
    if file.exists():
        return Memory(**json.loads(file.read_text()) | {"cached": True})
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        words = str(e).splitlines()[0]
        found = Memory(-1, -1, -1, wanted(words), time.perf_counter() - began, words)
    else:
        seconds = time.perf_counter() - began
        stats: Any = compiled.memory_analysis()
        moved = in_loops(compiled.as_text() or "")
        again = [
            f"{each.kind} of {each.array}, {gib(each.bytes)} GiB" for each in moved if each.same
        ]
        fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
        arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
        # Only the TPU compiler reports a peak that includes arguments. For others, the sum of all
        # sizes is the best estimate.
        on_tpu = target.devices[0].platform == "tpu"
        peak = stats.peak_memory_in_bytes if on_tpu else arguments + temporaries + fresh
        found = Memory(
            arguments, temporaries, fresh, peak, seconds, in_loops=len(moved), again=again
        )  # fmt: skip
    artifacts.write_json(file, dataclasses.asdict(found))
    return found


def wanted(words: str) -> int:
    """Reads from the compiler's message how many bytes a refused program needs; -1 if unknown."""
    sizes = re.search(r"(?:required[^()]*\(|Used )([\d.]+)([KMGT])", words)
    if sizes is None:
        return -1
    return int(float(sizes[1]) * 1024 ** ("KMGT".index(sizes[2]) + 1))


def _digest(lowered: jax.stages.Lowered, target: Target) -> str:
    """The cache key: a digest of everything that a program's memory depends on."""
    what: Mapping[str, Any] = {
        "fields": [field.name for field in dataclasses.fields(Memory)],
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        "devices": f"{target.name} {len(target.devices)} {target.devices[0].device_kind}",
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """The versions of JAX and its compilers, without packages that are not installed."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
