"""Sharding rules: tables that map the logical axes of arrays to axes of the mesh.

A rule for a mesh axis of size 1 has no effect, so `fsdp_tensor` on one device is `single`. The
other presets state what you intend, and give an error if the mesh does not match.
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

ROWS = ("data", "fsdp")
_SINGLE: Rules = {
    "rows": ROWS,
    "layers": None,
    "embed": None,
    "vocab": None,
    "heads": None,
    "kv_heads": None,
    "head_dim": None,
    "mlp": None,
    "experts": None,
    "expert_mlp": None,  # the width of one expert
    "norm": None,
    "rank": None,  # of LoRA
}
# Parameters, gradients and moments are sharded over `fsdp`; each layer is gathered when it runs.
_FSDP: Rules = {**_SINGLE, "embed": "fsdp"}
# A mixture is cut between its experts, not inside them, so that each keeps large matrix products.
_TENSOR: Rules = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "experts"), "tensor")

PRESETS: Mapping[str, Rules] = {
    "single": _SINGLE,
    "fsdp": _FSDP,
    "fsdp_tensor": {**_FSDP, **_TENSOR},
}
TRAINING = PRESETS["fsdp_tensor"]

# Generation reads all weights for every token, so gathering them each time would be too slow: each
# copy of the model is on the devices of a `tensor` axis, and the other axes have further slots.
DECODE: Rules = {
    **{axis: None for axis in _SINGLE if axis != "rows"},
    **_TENSOR,
    "slots": ROWS,
}


def check_preset(name: str, mesh: Mesh) -> None:
    """Checks that the preset uses every axis of the mesh.

    Raises:
      MeshError: if the preset is unknown, or devices along an axis would all compute the same.
    """
    if name not in PRESETS:
        raise MeshError(f"compute.preset is {name!r}; expected one of {', '.join(PRESETS)}")
    used: set[str | None] = {"data"} if name != "single" else set()
    for axes in PRESETS[name].values():
        used.update((axes,) if isinstance(axes, str) or axes is None else ())
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            raise MeshError(
                f"compute.preset is {name!r}, but the mesh axis {axis!r} has {size} devices, which "
                f"would all compute the same; set compute.{axis}: 1, or use another preset"
            )


def partition(
    name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> NamedSharding:
    """The sharding of an array with these logical axes.

    Args:
      name: the name of the array, for error messages.
      axes: the logical name of each of its axes; None for an axis that is never sharded.
      shape: its shape.
      mesh: the mesh.
      rules: the table of rules.

    Raises:
      MeshError: if an axis has no rule, two axes are mapped to one mesh axis, or a size is not
        divisible by the mesh axis.
    """
    spec, taken = [], set()
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise MeshError(
                f"{name}: there is no rule for its axis {axis!r}, only for "
                f"{sorted(rules)}. Add a rule"
            )
        on = rules[axis] if axis is not None else None
        on = (on,) if isinstance(on, str) else on or ()
        if unknown := set(on) - set(mesh.axis_names):
            raise MeshError(
                f"{name}: its axis {axis!r} is mapped to {unknown.pop()!r}; the mesh has only "
                f"{', '.join(mesh.axis_names)}"
            )
        on = tuple(a for a in on if mesh.shape[a] > 1)
        if clash := taken.intersection(on):
            raise MeshError(
                f"{name}: more than one of its axes {axes} is mapped to mesh axis "
                f"{clash.pop()!r}; map only one of them"
            )
        parts = math.prod(mesh.shape[a] for a in on)
        if size % parts:
            raise MeshError(
                f"{name}: axis {axis!r} of size {size} is not divisible by {parts}, the devices on "
                f"mesh axes {', '.join(on)}. Use another compute.preset or other mesh sizes"
            )
        taken.update(on)
        spec.append(on if len(on) > 1 else on[0] if on else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(abstract: Any, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of every leaf of an abstract parameter tree, as from `abstract_params`."""

    def of_leaf(path, box):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return partition(name, box.names, box.value.shape, mesh, rules)

    return jax.tree_util.tree_map_with_path(
        of_leaf, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def row_shardings(batch: Any, mesh: Mesh, rules: Rules = TRAINING) -> Any:
    """The sharding of every array of a batch: along its first axis, the rows."""

    def of_array(x):
        axes = ("rows",) + (None,) * (x.ndim - 1)
        return partition("batch", axes, x.shape, mesh, rules)

    return jax.tree.map(of_array, batch)


def row_spec(mesh: Mesh, rows: int) -> PartitionSpec:
    """Cuts rows over the mesh; a batch that does not fill its devices is whole on each of them."""
    ways = math.prod(mesh.shape[axis] for axis in ROWS)
    return PartitionSpec(ROWS) if rows % ways == 0 else PartitionSpec()


def keep_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Tells the compiler that an array within a program is cut by rows, its first axis.

    Without it the compiler may cut the products of a layer along the axis over which weights are
    sharded, and then each device holds the activations of all rows.
    """
    if mesh is None or mesh.size == 1 or not (spec := row_spec(mesh, x.shape[0])):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def place_rows(batch: Any, mesh: Mesh, rules: Rules = TRAINING) -> Any:
    """Puts a batch on the devices, sharded by rows; each process puts its own part."""

    def put(x, where):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda cut: x[cut])

    return jax.tree.map(put, batch, row_shardings(batch, mesh, rules))
