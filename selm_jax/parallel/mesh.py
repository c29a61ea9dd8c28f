"""The device mesh of an experiment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


class MeshError(ValueError):
    """Axes that do not fit the devices, or an array that does not fit the axes."""


def make_mesh(sizes: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor; one size may be -1 and takes the devices left.

    Raises:
      MeshError: more than one -1, or a product that is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = list(sizes)
    named = dict(zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise MeshError(f"mesh axes {named}: sizes are 1 or more, and -1 at most once")
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = len(devices) // rest
    if math.prod(sizes) != len(devices):
        raise MeshError(f"mesh axes {named} do not cover the {len(devices)} devices exactly")
    # Auto: the compiler propagates shardings; jax's own default would make them part of types.
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def compute_dtype(name: str) -> Any:
    """The dtype called `float32` or `bfloat16`; `auto` is float32 on CPU, where XLA gains nothing
    from bfloat16, and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
