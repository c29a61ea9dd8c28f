"""The devices of an experiment: their meshes and their compute dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from selm_jax.config import Compute
from selm_jax.parallel import multihost
from selm_jax.parallel.mesh import compute_dtype, count_slices, decode_mesh, make_mesh
from selm_jax.parallel.rules import PRESETS, Rules, check_preset
from selm_jax.run.rows import RunError
from selm_jax.shell import data_sheets


class Devices:
    """The devices of a run, arranged into meshes by the `compute` settings.

    Args:
      chips: the devices to use; None uses all of them.
    """

    def __init__(self, compute: Compute, chips: Sequence[Any] | None = None):
        self.compute, self.chips = compute, chips

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh for training.

        Raises:
          MeshError: the devices cannot be arranged as the settings ask.
          RunError: the preset is `single` but there are several processes.
        """
        c = self.compute
        chips = self.chips or jax.devices()
        if c.preset == "single":
            if multihost.count() > 1:
                raise RunError(
                    "compute.preset 'single' uses one device, but there are "
                    f"{multihost.count()} processes. Choose another preset"
                )
            return make_mesh((1, 1, 1), chips[:1])
        dcn_data = c.dcn_data
        if dcn_data == -1:
            dcn_data = max(1, count_slices(chips) // c.dcn_fsdp)
        mesh = make_mesh((c.data, c.fsdp, c.tensor), self.chips, dcn=(dcn_data, c.dcn_fsdp, 1))
        check_preset(c.preset, mesh)
        return mesh

    @property
    def row_ways(self) -> int:
        """The number of parts into which the mesh splits the rows of a batch."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @cached_property
    def decode_mesh(self) -> Mesh:
        """The mesh for generation: copies of the model, each on a few neighbouring devices."""
        return decode_mesh(self.mesh, self.compute.decode_tensor or self.mesh.shape["tensor"])

    @property
    def rules(self) -> Rules:
        """The sharding rules: the mesh axes over which each logical axis of an array is sharded."""
        return PRESETS[self.compute.preset]

    @property
    def dtype(self) -> Any:
        return compute_dtype(self.compute.dtype, self.mesh.devices.flat[0].platform)

    @property
    def peak(self) -> float | None:
        """FLOP/s of all devices by their data sheet; None if it has none for the dtype."""
        if self.dtype != jnp.bfloat16:
            return None
        rate = data_sheets.known(data_sheets.PEAKS, self.mesh.devices.flat[0].device_kind)
        return None if rate is None else rate * 1e12 * self.mesh.size

    def described(self) -> dict[str, Any]:
        """A description of the devices and their meshes, for a run's manifest."""
        device = jax.devices()[0]
        return {
            "device": f"{self.mesh.size} x {device.device_kind} ({device.platform})",
            "mesh": dict(self.mesh.shape),
            "decode_mesh": dict(self.decode_mesh.shape),
            "processes": multihost.count(),
        }
