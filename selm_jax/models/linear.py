"""Kernels of the decoder: their parameters, their product with activations, and their adapters.

`project` has a hand-written gradient that is faster on CPU. Its result is that of `x @ w`. But JAX
derives a transposed gradient for `w`, for which XLA's CPU backend copies the incoming gradient and
does not use its fast matrix product. This makes an MLP's forward and backward pass much slower.
"""

from __future__ import annotations

import math
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selm_jax.models.config import DecoderConfig
from selm_jax.models.lora import Lora


class Adapted(nn.Module):
    """A module whose kernels may have adapters."""

    config: DecoderConfig
    lora: Lora | None


def weight(
    module: nn.Module, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], fan_in: int
) -> Array:
    """A parameter with logical axis names, which determine how it is sharded on a mesh."""
    init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)
    return cast(Array, module.param(name, init, shape))


def linear(
    module: Adapted,
    name: str,
    x: Array,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    inputs: int = 1,
    bias: bool = False,
) -> Array:
    """Multiplies x by the kernel `name`, and adds the kernel's bias and adapter, if any.

    Args:
      x: [rows, time, *in].
      axes, shape: logical axes and shape of the kernel, [*in, *out].
      inputs: number of axes in *in.
    """
    y = project(x, weight(module, name, axes, shape, math.prod(shape[:inputs])), inputs)
    if bias:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes[inputs:])
        y = y + cast(Array, module.param(f"{name}_bias", zeros, shape[inputs:])).astype(y.dtype)
    lora = module.lora
    if lora is None or not lora.adapts(f"{module.name}/{name}"):
        return y

    def half(suffix: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> Array:
        # The zeros only give the shape; `lora.init` makes the initial values of adapters.
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        variable = module.variable("lora", f"{name}_{suffix}", zeros, jax.random.key(0), shape)
        return cast(Array, variable.value)

    x = nn.Dropout(lora.dropout)(x, deterministic=not module.has_rng("dropout"))
    low = project(x, half("a", (*axes[:inputs], "rank"), (*shape[:inputs], lora.rank)), inputs)
    b = half("b", ("rank", *axes[inputs:]), (lora.rank, *shape[inputs:]))
    return y + lora.scale * project(low, b)


def project(x: Array, kernel: Array, inputs: int = 1) -> Array:
    """Contracts the last `inputs` axes of x with the first `inputs` axes of the kernel.

    x: [rows, time, *in], kernel: [*in, *out] -> [rows, time, *out], in x's dtype.
    """
    outputs = kernel.shape[inputs:]
    matrix = kernel.reshape(-1, math.prod(outputs)).astype(x.dtype)
    y = _matmul(x.reshape(*x.shape[:2], -1), matrix)
    return y.reshape(*x.shape[:2], *outputs)


@jax.custom_vjp
def _matmul(x: Float[Array, "rows time d"], w: Float[Array, "d f"]) -> Float[Array, "rows time f"]:
    return jnp.einsum("rtd,df->rtf", x, w)


def _forward(x, w):
    return _matmul(x, w), (x, w)


def _backward(kept, g):
    x, w = kept
    return jnp.einsum("rtf,df->rtd", g, w), jnp.einsum("rtd,rtf->df", x, g)


_matmul.defvjp(_forward, _backward)
