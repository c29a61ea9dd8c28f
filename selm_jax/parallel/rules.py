"""Which logical axis of an array lies on which axis of the mesh: one table for each purpose.

A rule for an axis of size 1 does nothing, so `fsdp_tensor` on one device is `single`. The other
presets are for saying what is meant, and for being told where the mesh says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selm_jax.parallel.mesh import MeshError

Rules = Mapping[str, str | tuple[str, ...] | None]

_SINGLE: Rules = {
    "rows": ("data", "fsdp"),
    "layers": None,
    "embed": None,
    "vocab": None,
    "heads": None,
    "kv_heads": None,
    "head_dim": None,
    "mlp": None,
    "norm": None,
    "rank": None,  # of LoRA
}
# Parameters, gradients and moments are cut over `fsdp`; each layer is gathered when it is its turn.
_FSDP: Rules = {**_SINGLE, "embed": "fsdp"}
_TENSOR: Rules = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}

PRESETS: Mapping[str, Rules] = {
    "single": _SINGLE,
    "fsdp": _FSDP,
    "fsdp_tensor": {**_FSDP, **_TENSOR},
}
TRAINING = PRESETS["fsdp_tensor"]

# Generation reads all weights for every token, so gathering them each time is out of the question:
# a copy of the model lies on the devices of a `tensor` axis, and the others have further slots.
DECODE: Rules = {
    **{axis: None for axis in _SINGLE if axis != "rows"},
    **_TENSOR,
    "slots": ("data", "fsdp"),
}


def check_preset(name: str, mesh: Mesh) -> None:
    """Refuses a mesh with an axis on which this preset would put nothing.

    Raises:
      MeshError: the preset is not known, or the axis would hold copies that compute the same.
    """
    if name not in PRESETS:
        raise MeshError(f"compute.preset is {name!r}; there are {', '.join(PRESETS)}")
    used: set[str | None] = {"data"} if name != "single" else set()
    for axes in PRESETS[name].values():
        used.update((axes,) if isinstance(axes, str) or axes is None else ())
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            raise MeshError(
                f"compute.preset is {name!r}, but the mesh axis {axis!r} has {size} devices, which "
                f"would all do the same; set compute.{axis}: 1, or another preset"
            )


def partition(
    name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> NamedSharding:
    """Where an array with these logical axes lies.

    Raises:
      MeshError: an axis that the table does not know, two axes on one mesh axis, or a dimension
        that the mesh axis does not divide. `name` says which array.
    """
    spec, taken = [], set()
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise MeshError(f"{name}: no rule for its axis {axis!r}; there are {sorted(rules)}")
        on = rules[axis] if axis is not None else None
        on = (on,) if isinstance(on, str) else on or ()
        if unknown := set(on) - set(mesh.axis_names):
            raise MeshError(
                f"{name}: its axis {axis!r} is to lie on {unknown.pop()!r}; the mesh has "
                f"{', '.join(mesh.axis_names)}"
            )
        on = tuple(a for a in on if mesh.shape[a] > 1)
        if clash := taken.intersection(on):
            raise MeshError(f"{name}: two of its axes {axes} fall on mesh axis {clash.pop()!r}")
        parts = math.prod(mesh.shape[a] for a in on)
        if size % parts:
            raise MeshError(f"{name}: axis {axis!r} of size {size} cannot be cut in {parts} ({on})")
        taken.update(on)
        spec.append(on if len(on) > 1 else on[0] if on else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(abstract: Any, mesh: Mesh, rules: Rules) -> Any:
    """A sharding for every leaf of an abstract parameter tree (`models.decoder.abstract_params`)."""

    def of_leaf(path, box):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return partition(name, box.names, box.value.shape, mesh, rules)

    return jax.tree_util.tree_map_with_path(
        of_leaf, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def row_shardings(batch: Any, mesh: Mesh, rules: Rules = TRAINING) -> Any:
    """Where every array of a batch lies: cut along its first axis, the rows."""

    def of_array(x):
        axes = ("rows",) + (None,) * (x.ndim - 1)
        return partition("batch", axes, x.shape, mesh, rules)

    return jax.tree.map(of_array, batch)


def place_rows(batch: Any, mesh: Mesh, rules: Rules = TRAINING) -> Any:
    """Puts a batch on the devices, cut by rows; each process its own."""

    def put(x, where):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda cut: x[cut])

    return jax.tree.map(put, batch, row_shardings(batch, mesh, rules))
