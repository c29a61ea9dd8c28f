"""Layers' parameters are stacked for training and separate for decoding; this converts the two.

Usually all layers have parameters of the same shapes, and `layers/attention/q` is one array
[layers, ...]. If layers differ in their heads (`DecoderConfig.cycle` is more than 1), the layers at
the same place of each cycle are a stack: `layers/2_of_6/attention/q` are layers 2, 8, 14 and so on.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def stack_names(cycle: int) -> list[str]:
    """The names under `layers` of the stacks of a cycle of more than one layer, in order."""
    return [f"{place}_of_{cycle}" for place in range(cycle)]


def stacks(layers: Params) -> list[Params]:
    """The stacks under `layers`, in order: with n of them, layer i belongs to stack i % n."""
    names = stack_names(len(layers))
    return [layers[name] for name in names] if set(names) == set(layers) else [layers]


def unstack(params: Params) -> Params:
    """Converts stacked layers into one parameter tree per layer, `layer_0` and so on."""
    rest = {k: v for k, v in params.items() if k != "layers"}
    found = stacks(params["layers"])
    cycle = len(found)
    layers = cycle * jax.tree.leaves(found[0])[0].shape[0]
    each = {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i // cycle], found[i % cycle])
        for i in range(layers)
    }
    return rest | each


def stack(params: Params, cycle: int) -> Params:
    """Converts one parameter tree per layer into stacks for a cycle of this many layers."""
    rest = {k: v for k, v in params.items() if not k.startswith("layer_")}
    each = [params[f"layer_{i}"] for i in range(len(params) - len(rest))]
    found = [jax.tree.map(lambda *x: jnp.stack(x), *each[i::cycle]) for i in range(cycle)]
    layers = found[0] if cycle == 1 else dict(zip(stack_names(cycle), found, strict=True))
    return rest | {"layers": layers}
