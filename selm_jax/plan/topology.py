"""What a plan is made for: a slice of TPU chips that nobody has yet, or the devices that are here.

    target("v5e:4x8")     32 compile-only devices, from libtpu alone
    local_target()        jax.devices()

Numbers are per *device*, as jax counts them: a chip, but half a chip of TPU7x, which has two.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from selm_jax.bench.clock import PEAKS
from selm_jax.shell.words import did_you_mean

GIB = 2**30


class TopologyError(ValueError):
    """A topology that is not known, or cannot be compiled for here."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPU.

    Attributes:
      hbm: GiB of a device that programs may use. It is the compiler's own bound, a little under the
        data sheet's 32, 16, 95, 32 and 192 / 2 GB: what libtpu 0.0.42 says when it refuses a
        program (`docs/scale.md` shows how to ask it).
      peak: bfloat16 TFLOP/s of a device; bandwidth: GB/s of its HBM. Both from the pages of
        docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x.
      devices_per_chip: how many devices jax sees in a chip.
      shapes: the slices that can be had, smallest first; larger ones exist.
      options: of `get_topology_desc`.
    """

    hbm: float
    peak: float
    bandwidth: float
    shapes: tuple[str, ...]
    devices_per_chip: int = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

GENERATIONS: Mapping[str, Generation] = {
    # Two cores work as one device; asked without this option, libtpu counts them apart.
    "v4": Generation(30.75, 275, 1228, _CUBES, options={"chip_config_name": "megacore"}),
    "v5e": Generation(15.75, 197, 819, _FLAT),
    "v5p": Generation(95.74, 459, 2765, _CUBES),
    "v6e": Generation(31.25, 918, 1638, _FLAT),
    "tpu7x": Generation(94.75, 2307 / 2, 7380 / 2, _CUBES, devices_per_chip=2),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
      name: of the topology, or of the devices.
      chips: what is paid for; devices: what jax counts.
      hbm: bytes of one device that programs may use, and `hbm_from`: who says so.
      peak: FLOP/s of one device in bfloat16; bandwidth: bytes/s of its memory; None if not known.
      larger: names of the next slices of this generation.
    """

    name: str
    devices: Sequence[Any]
    chips: int
    hbm: int
    hbm_from: str
    peak: float | None = None
    bandwidth: float | None = None
    larger: tuple[str, ...] = ()

    @property
    def on_cpu(self) -> bool:
        return self.devices[0].platform == "cpu"


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ


def target(name: str, hbm: float | None = None) -> Target:
    """The devices of a topology such as `v5e:4x8`, of which none need be here.

    Args:
      hbm: GiB of a device that programs may use; None takes the generation's.

    Raises:
      TopologyError: an unknown name (the known ones are listed), or libtpu cannot be loaded.
    """
    generation, shape = _look_up(name)
    options = dict(generation.options)
    if shape == "1x1":  # libtpu counts in hosts of 2 x 2 chips
        options["chips_per_host_bounds"] = [1, 1, 1]
    devices = _compile_only_devices(name, options)
    larger = generation.shapes[generation.shapes.index(shape) + 1 :]
    source = "the compiler's bound" if hbm is None else "--hbm"
    return Target(
        name=name,
        devices=devices,
        chips=len(devices) // generation.devices_per_chip,
        hbm=int((hbm or generation.hbm) * GIB),
        hbm_from=source,
        peak=generation.peak * 1e12,
        bandwidth=generation.bandwidth * 1e9,
        larger=tuple(f"{name.partition(':')[0]}:{each}" for each in larger),
    )


def _look_up(name: str) -> tuple[Generation, str]:
    kind, _, shape = name.partition(":")
    if kind not in GENERATIONS:
        known = "\n  ".join(f"{k}: {', '.join(g.shapes)}" for k, g in GENERATIONS.items())
        raise TopologyError(
            f"topology {name!r}: no TPU is called {kind!r}{did_you_mean(kind, GENERATIONS)} "
            f"Known, as GENERATION:SHAPE:\n  {known}"
        )
    generation = GENERATIONS[kind]
    if shape not in generation.shapes:
        raise TopologyError(
            f"topology {name!r}: {kind} has the shapes {', '.join(generation.shapes)}"
        )
    return generation, shape


def _compile_only_devices(name: str, options: Mapping[str, Any]) -> list[Any]:
    # Of a machine without TPUs libtpu would ask a metadata server, and wait for its silence. Another
    # process may have it loaded: it guards chips with a lock, and here are none.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
    except Exception as e:  # jax raises its runtime's own error, or RuntimeError without libtpu
        raise TopologyError(f"topology {name!r}: libtpu refuses it: {e}") from e
    return list(found.devices)


def local_target(hbm: float | None = None) -> Target:
    """The devices that are here."""
    devices = jax.devices()
    device = devices[0]
    stats = device.memory_stats() or {}
    if hbm is not None:
        limit, source = int(hbm * GIB), "--hbm"
    elif "bytes_limit" in stats:
        limit, source = stats["bytes_limit"], "the device"
    else:
        limit, source = _memory_total() // len(devices), "this machine's memory, shared by all"
    on_cpu = device.platform == "cpu"
    known = next((tflops for name, tflops in PEAKS if name in device.device_kind), None)
    bandwidth = next((x for name, x in _BANDWIDTHS if name in device.device_kind), None)
    halves = any(name in device.device_kind for name in _HALVES)
    return Target(
        name=f"{len(devices)} x {device.device_kind} (local)",
        devices=devices,
        chips=-(-len(devices) // 2) if halves else len(devices),
        hbm=limit,
        hbm_from=source,
        peak=None if on_cpu or known is None else known * 1e12,
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
    )


# GB/s of a device's memory, by what jax calls it; the first that occurs counts, longer names first.
# GPUs from NVIDIA's data sheets: A100 of 40 and of 80 GB, H100 (PCIe, NVL, SXM), H200, and GH200 with
# 96 GB of HBM3.
_BANDWIDTHS = (
    ("TPU v4", GENERATIONS["v4"].bandwidth), ("TPU v5 lite", GENERATIONS["v5e"].bandwidth),
    ("TPU v5", GENERATIONS["v5p"].bandwidth), ("TPU v6 lite", GENERATIONS["v6e"].bandwidth),
    ("TPU7x", GENERATIONS["tpu7x"].bandwidth),
    ("A100-SXM4-40GB", 1555), ("A100-PCIE-40GB", 1555), ("A100-SXM4-80GB", 2039),
    ("A100 80GB PCIe", 1935), ("H100 PCIe", 2000), ("H100 NVL", 3900), ("H100", 3350),
    ("GH200", 4000), ("H200", 4800),
)  # fmt: skip

# Two devices are one chip. A chip of TPU v4 and v5p is one device: its cores work as one.
_HALVES = ("TPU v2", "TPU v3", "TPU7x")


def _memory_total() -> int:
    if Path("/proc/meminfo").exists():
        line = Path("/proc/meminfo").read_text().splitlines()[0]
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
