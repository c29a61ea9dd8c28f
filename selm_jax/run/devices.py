"""The devices of an experiment: its meshes, and the dtype that they compute in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh

from selm_jax.config import Compute
from selm_jax.parallel import multihost
from selm_jax.parallel.mesh import compute_dtype, count_slices, decode_mesh, make_mesh
from selm_jax.parallel.rules import PRESETS, Rules, check_preset
from selm_jax.run.rows import RunError


class Devices:
    """The devices as the settings of `compute` arrange them.

    Args:
      chips: those to use; None uses all there are.
    """

    def __init__(self, compute: Compute, chips: Sequence[Any] | None = None):
        self.compute, self.chips = compute, chips

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of training.

        Raises:
          MeshError: the devices cannot be arranged like this.
          RunError: preset `single` in several processes.
        """
        c = self.compute
        chips = self.chips or jax.devices()
        if c.preset == "single":
            if multihost.count() > 1:
                raise RunError("compute.preset is 'single': one device; there are processes beside")
            return make_mesh((1, 1, 1), chips[:1])
        dcn_data = c.dcn_data
        if dcn_data == -1:
            dcn_data = max(1, count_slices(chips) // c.dcn_fsdp)
        mesh = make_mesh((c.data, c.fsdp, c.tensor), self.chips, dcn=(dcn_data, c.dcn_fsdp, 1))
        check_preset(c.preset, mesh)
        return mesh

    @cached_property
    def decode_mesh(self) -> Mesh:
        """The mesh as generation sees it: copies of the model, each on a few neighbours."""
        return decode_mesh(self.mesh, self.compute.decode_tensor or self.mesh.shape["tensor"])

    @property
    def rules(self) -> Rules:
        """Which axes of the mesh each named axis of a parameter or batch is cut over."""
        return PRESETS[self.compute.preset]

    @property
    def dtype(self) -> Any:
        return compute_dtype(self.compute.dtype, self.mesh.devices.flat[0].platform)

    def described(self) -> dict[str, Any]:
        """The devices and their meshes, for a run's manifest."""
        device = jax.devices()[0]
        return {
            "device": f"{self.mesh.size} x {device.device_kind} ({device.platform})",
            "mesh": dict(self.mesh.shape),
            "decode_mesh": dict(self.decode_mesh.shape),
            "processes": multihost.count(),
        }
