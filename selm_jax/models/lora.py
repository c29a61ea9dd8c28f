"""LoRA: low-rank adapters as a second collection of variables (arXiv 2106.09685).

A kernel W of the decoder that an adapter is on gives x W + scale * dropout(x) A B. The base without
the collection is the model that training started from: the reference.

A and B lie beside their kernel: `attention/q` has `attention/q_a` [*in, rank] and `attention/q_b`
[rank, *out]. B starts at zero, so that adapters change nothing until they are trained.
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
    """Adapters that cannot be had as asked."""


# Our kernels by the names that PEFT's users know them by.
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
    """Which kernels have adapters, and of what rank: the settings `lora`, as the decoder reads them.

    `base` says how the kernels themselves are kept, which is no matter of the adapters.

    Raises:
      LoraError: a target that is on no kernel.
      ValidationError: a number out of its range.
    """

    def __post_init__(self) -> None:
        if not any(map(self.adapts, TARGETS)):
            raise LoraError(
                f"LoRA: targets {self.targets!r} is found in none of {', '.join(TARGETS.values())}"
            )

    @property
    def scale(self) -> float:
        """What a product A B is multiplied by. With `rslora` as in arXiv 2312.03732."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, kernel: str) -> bool:
        """Whether a kernel such as `attention/q` has an adapter."""
        return re.search(self.targets, TARGETS[kernel]) is not None


def init(abstract: Params, key: jax.Array) -> Params:
    """Fresh adapters: A uniform in +-1/sqrt(inputs), as PEFT draws it, and B zero.

    `abstract` has shapes, stacked over layers (A is [layers, *in, rank]), and shardings if wanted.
    """
    flat = flatten_dict(abstract)

    def draw(key):
        def one(path, leaf, key):
            if path[-1].endswith("_b"):
                return jnp.zeros(leaf.shape, leaf.dtype)
            bound = math.prod(leaf.shape[1:-1]) ** -0.5
            return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

        keys = jax.random.split(key, len(flat))
        return {p: one(p, flat[p], k) for p, k in zip(sorted(flat), keys, strict=True)}

    return unflatten_dict(
        jax.jit(draw, out_shardings={p: leaf.sharding for p, leaf in flat.items()})(key)
    )


def merge(params: Params, adapters: Params, lora: Lora) -> Params:
    """The parameters with the adapters' products added: the same function without adapters."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)  # pyright: ignore
    extra: dict[tuple[str, ...], Any] = flatten_dict(adapters)  # pyright: ignore
    for path, a in extra.items():
        if path[-1].endswith("_a"):
            kernel = (*path[:-1], path[-1].removesuffix("_a"))
            b, w = extra[(*path[:-1], f"{kernel[-1]}_b")], flat[kernel]
            layers, rank = a.shape[0], a.shape[-1]
            product = jnp.einsum(
                "lir,lro->lio", a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
            )
            flat[kernel] = (w + lora.scale * product.reshape(w.shape)).astype(w.dtype)
    return unflatten_dict(flat)
