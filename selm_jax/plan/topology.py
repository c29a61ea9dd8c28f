"""The devices that a plan is for: a slice of TPU chips, which may be absent, or local devices.

    target("v5e:4x8")     32 compile-only devices, which need only libtpu
    local_target()        jax.devices()

Numbers are per *device*, as JAX counts them: a device is a chip, except that a TPU7x chip has two.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from selm_jax.shell import data_sheets
from selm_jax.shell.memory import GIB, device_limit
from selm_jax.shell.words import did_you_mean


class TopologyError(ValueError):
    """A topology is unknown, or this machine cannot compile for it."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """The properties of one generation of TPU: memory, speed, and known slices.

    Attributes:
      hbm: memory of a device that programs may use, in GiB. This is the compiler's own bound, which
        libtpu 0.0.42 states when it refuses a program (`docs/scale.md` shows how to find it). It is
        slightly below the data sheet's 32, 16, 95, 32 and 192 / 2 GB.
      peak: bfloat16 TFLOP/s of a device; bandwidth: GB/s of its HBM. Both are from the pages of
        docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x.
      devices_per_chip: how many devices JAX sees in a chip.
      shapes: the known slices, smallest first; larger ones exist.
      options: arguments of `get_topology_desc`.
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
    # The two cores of a chip work as one device; without this option, libtpu counts two devices.
    "v4": Generation(30.75, 275, 1228, _CUBES, options={"chip_config_name": "megacore"}),
    "v5e": Generation(15.75, 197, 819, _FLAT),
    "v5p": Generation(95.74, 459, 2765, _CUBES),
    "v6e": Generation(31.25, 918, 1638, _FLAT),
    "tpu7x": Generation(94.75, 2307 / 2, 7380 / 2, _CUBES, devices_per_chip=2),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a plan is for.

    Attributes:
      name: the name of the topology, or of the devices.
      chips: number of chips, which prices refer to; devices: the devices that JAX counts.
      hbm: memory of one device that programs may use, in bytes; hbm_from: the source of this value.
      peak: FLOP/s of one device in bfloat16; bandwidth: bytes/s of its memory; None if unknown.
      larger: names of the larger slices of this generation.
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
    """Returns the devices of a topology such as `v5e:4x8`, which this machine need not have.

    Args:
      hbm: memory of a device that programs may use, in GiB; None takes the generation's value.

    Raises:
      TopologyError: if the name is unknown (the message lists the known names), or libtpu
        refuses it.
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
            f"Known topologies (GENERATION:SHAPE):\n  {known}"
        )
    generation = GENERATIONS[kind]
    if shape not in generation.shapes:
        raise TopologyError(
            f"topology {name!r}: the shape is unknown; {kind} has the shapes "
            f"{', '.join(generation.shapes)}"
        )
    return generation, shape


def _compile_only_devices(name: str, options: Mapping[str, Any]) -> list[Any]:
    # On a machine without TPUs, libtpu would wait for a metadata server that does not answer. Its
    # lock, which allows one process per machine, protects chips, and compiling uses none.
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
        raise TopologyError(
            f"topology {name!r}: libtpu cannot compile for it: {e}. Update libtpu, or choose "
            "another topology"
        ) from e
    return list(found.devices)


def local_target(hbm: float | None = None) -> Target:
    """Returns the local devices as a target."""
    devices = jax.devices()
    device = devices[0]
    limit, source = device_limit(device) if hbm is None else (int(hbm * GIB), "--hbm")
    on_cpu = device.platform == "cpu"
    peak = data_sheets.known(data_sheets.PEAKS, device.device_kind)
    bandwidth = data_sheets.known(data_sheets.BANDWIDTHS, device.device_kind)
    halves = any(name in device.device_kind for name in _HALVES)
    return Target(
        name=f"{len(devices)} x {device.device_kind} (local)",
        devices=devices,
        chips=-(-len(devices) // 2) if halves else len(devices),
        hbm=limit,
        hbm_from=source,
        peak=None if on_cpu or peak is None else peak * 1e12,
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
    )


# On these TPUs two devices are one chip. A TPU v4 or v5p chip is one device: its cores work as one.
_HALVES = ("TPU v2", "TPU v3", "TPU7x")
