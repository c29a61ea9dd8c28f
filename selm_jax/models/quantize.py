"""Quantises the kernels of a model's layers to 8 or 4 bits.

It is for a frozen base model under adapters (QLoRA, arXiv 2305.14314), and for the copy of the
policy that generates answers. The kernels become `qwix.QArray`s: integers, and a scale per block of
inputs, or of all inputs, and per output. A layer dequantises its kernels when it runs, so that only
one layer's kernels exist in full at a time. Embedding, unembedding, norms, routers and biases stay
as they are.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from selm_jax.models.lora import LoraError

Params = dict[str, Any]
_BLOCK = 64


def quantize(params: Params, qtype: str, block: int | None = _BLOCK) -> Params:
    """The parameters (stacked over layers) with the layers' kernels quantised.

    Args:
      params: the parameters, stacked over layers.
      qtype: "int8", or "nf4" for four bits at the quantiles of a normal distribution.
      block: the inputs that share a scale; None: all inputs of an output.

    Raises:
      LoraError: if `qwix` is not installed.
    """
    qwix = _qwix()

    def of(path: tuple[str, ...], x: Any) -> Any:
        if path[0] != "layers" or x.ndim < 3 or path[-1].endswith("_bias") or path[-1] == "router":
            return x
        # The last input axis. Axis 0 is the layer; of experts, axis 1 is the expert.
        inputs = 2 if path[-1] == "o" or path[-2] == "experts" else 1
        others = [axis for axis in range(x.ndim) if axis != inputs]
        if block is None:
            return qwix.quantize(x, qtype, channelwise_axes=others)
        tile = block if x.shape[inputs] % block == 0 else x.shape[inputs]
        return qwix.quantize(x, qtype, channelwise_axes=others, tiled_axes={inputs: tile})

    return unflatten_dict({path: of(path, x) for path, x in flatten_dict(params).items()})


def dequantize(params: Params) -> Params:
    """Undoes `quantize` up to rounding; arrays that are not quantised are not changed."""
    qwix = sys.modules.get("qwix")
    if qwix is None:  # never imported, maybe not installed, so nothing can be quantised
        return params

    def is_quantized(x: Any) -> bool:
        return isinstance(x, qwix.QArray)

    return jax.tree.map(
        lambda x: qwix.dequantize(x) if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def check_installed() -> None:
    """Raises LoraError if `qwix` is not installed."""
    _qwix()


def _qwix() -> Any:
    try:
        import qwix
    except ModuleNotFoundError as e:
        raise LoraError(
            "lora.base and rollout.weights: int8 need the package qwix: pip install "
            "'selm_jax[qlora]'"
        ) from e
    return qwix
