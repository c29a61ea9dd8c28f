"""LoRA: low-rank adapters as a second collection of variables (arXiv 2106.09685).

A kernel W of the decoder with an adapter computes x W + scale * dropout(x) A B. Without the
collection, the decoder is the model that training started from: the reference.

A and B are named after their kernel: `attention/q` has `attention/q_a` [*in, rank] and
`attention/q_b` [rank, *out]. B starts at zero, so adapters change nothing until they are trained.
In a mixture of experts each expert has adapters of its own, stacked as its kernels are.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from pydantic.dataclasses import dataclass

from selm_jax.config import settings

Params = dict[str, Any]


class LoraError(ValueError):
    """The settings of LoRA adapters cannot be used."""


# Our kernels and their names in PEFT.
TARGETS = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Lora(settings.Lora):
    """The settings `lora` for the decoder: which kernels have adapters, and their rank.

    `base`, the precision of the kernels themselves, does not affect the adapters.

    Raises:
      LoraError: if `targets` matches no kernel, or experts' adapters are to have dropout.
      ValidationError: if a number is out of its range.
    """

    def __post_init__(self) -> None:
        if not any(map(self.adapts, TARGETS)):
            raise LoraError(
                f"lora.targets is {self.targets!r}, which matches none of the kernels "
                f"{', '.join(TARGETS.values())}; name one of them, or write a regular expression"
            )
        if self.experts and self.dropout:
            raise LoraError(
                f"lora.dropout is {self.dropout:g}, but adapters of experts have no dropout, since "
                "each device would have to draw that of all experts. Set it to 0"
            )

    @property
    def scale(self) -> float:
        """The factor of the product A B: alpha / rank, or with `rslora` alpha / sqrt(rank).

        rsLoRA: arXiv 2312.03732.
        """
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, kernel: str) -> bool:
        """Returns whether a kernel such as `attention/q` or `experts/up` has an adapter.

        The kernels of experts have the names of the MLP whose place they take.
        """
        if kernel.startswith("experts/"):
            return self.experts and self.adapts(kernel.replace("experts", "mlp"))
        return kernel in TARGETS and re.search(self.targets, TARGETS[kernel]) is not None


def init(abstract: Params, key: jax.Array) -> Params:
    """New adapters: A is drawn uniformly from +-1/sqrt(inputs), as in PEFT, and B is zero.

    `abstract` has shapes, stacked over layers (A is [layers, *in, rank], of experts [layers,
    experts, in, rank]), and optional shardings.
    """
    flat = flatten_dict(abstract)

    def draw(key):
        def one(path, leaf, key):
            if path[-1].endswith("_b"):
                return jnp.zeros(leaf.shape, leaf.dtype)
            bound = math.prod(leaf.shape[_stacked(path) : -1]) ** -0.5
            return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

        keys = jax.random.split(key, len(flat))
        return {p: one(p, flat[p], k) for p, k in zip(sorted(flat), keys, strict=True)}

    return unflatten_dict(
        jax.jit(draw, out_shardings={p: leaf.sharding for p, leaf in flat.items()})(key)
    )


def merge(params: Params, adapters: Params, lora: Lora) -> Params:
    """Adds the adapters' products to the parameters, which then need no adapters."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)  # pyright: ignore
    extra: dict[tuple[str, ...], Any] = flatten_dict(adapters)  # pyright: ignore
    for path, a in extra.items():
        if path[-1].endswith("_a"):
            kernel = (*path[:-1], path[-1].removesuffix("_a"))
            b, w = extra[(*path[:-1], f"{kernel[-1]}_b")], flat[kernel]
            stack, rank = a.shape[: _stacked(path)], a.shape[-1]
            product = jnp.einsum(
                "...ir,...ro->...io", a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1)
            )
            flat[kernel] = (w + lora.scale * product.reshape(w.shape)).astype(w.dtype)
    return unflatten_dict(flat)


def _stacked(path: tuple[str, ...]) -> int:
    """How many leading axes of a parameter are stacked: layers, and of experts also the experts."""
    return 2 if path[-2] == "experts" else 1
