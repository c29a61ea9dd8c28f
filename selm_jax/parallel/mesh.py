"""Makes the device mesh for training, and the mesh of the same devices for generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")
# Auto: the compiler propagates shardings. With jax's default they would be part of array types.
_TYPES = (AxisType.Auto,) * len(AXES)


class MeshError(ValueError):
    """The mesh axes do not fit the devices, or an array does not fit the axes."""


def make_mesh(
    sizes: Sequence[int],
    devices: Sequence[Any] | None = None,
    *,
    dcn: Sequence[int] = (1, 1, 1),
) -> Mesh:
    """A mesh with the axes data, fsdp and tensor; one size may be -1 for all remaining devices.

    Args:
      sizes: of the axes within a slice, whose chips have their own network (ICI).
      devices: the devices; by default all devices of all processes.
      dcn: sizes of the axes between slices, which are connected by the data centre's network. An
        axis has `sizes * dcn` devices in total. All are 1 for a single slice.

    Raises:
      MeshError: if there is more than one -1, or a product is not the number of devices or slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, dcn = list(sizes), list(dcn)
    named = dict(zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes) or min(dcn) < 1:
        raise MeshError(
            f"mesh axes {named} in each of {math.prod(dcn)} slices: sizes must be at least 1; one "
            "of those within a slice may be -1"
        )
    slices = math.prod(dcn)
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s != -1) * slices
        sizes[sizes.index(-1)] = len(devices) // rest
    if math.prod(sizes) * slices != len(devices):
        raise MeshError(
            f"mesh axes {named} in {slices} slice{'s' * (slices > 1)} do not cover the "
            f"{len(devices)} devices exactly; the product of all sizes must be their number"
        )
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=_TYPES, devices=devices)
    found = count_slices(devices)
    if found != slices:
        raise MeshError(
            f"mesh axes between slices {dict(zip(AXES, dcn, strict=True))} need {slices} slices; "
            f"the {len(devices)} devices form {found}. Make the product of compute.dcn_data and "
            "compute.dcn_fsdp the number of slices"
        )
    return Mesh(create_hybrid_device_mesh(sizes, dcn, devices), AXES, axis_types=_TYPES)


def platform_of(mesh: Mesh | None) -> str:
    """`cpu`, `gpu` or `tpu`: the platform of the mesh, or of JAX's default devices."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def count_slices(devices: Sequence[Any]) -> int:
    """The number of TPU slices (or, for GPUs, NVLink domains) to which the devices belong."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def decode_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """A mesh of the same devices in the same order, with `tensor` devices per copy of the model.

    The order must be the same so that one program can move parameters from one mesh to the other.

    Raises:
      MeshError: if the devices cannot be divided into groups of `tensor`.
    """
    devices = mesh.devices.reshape(-1)
    if tensor < 1 or len(devices) % tensor:
        raise MeshError(
            f"compute.decode_tensor is {tensor}, but the mesh's {len(devices)} devices cannot be "
            "divided into groups of that size; choose a divisor of their number"
        )
    return Mesh(np.reshape(devices, (-1, 1, tensor)), AXES, axis_types=_TYPES)


def compute_dtype(name: str, platform: str) -> Any:
    """The dtype that `float32`, `bfloat16` or `auto` stands for.

    `auto` is float32 on CPU, where bfloat16 is no faster, and bfloat16 elsewhere.
    """
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)
