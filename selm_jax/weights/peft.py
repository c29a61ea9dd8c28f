"""Exports LoRA adapters as a folder that the `peft` library can load onto their base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params
from selm_jax.models.lora import Lora
from selm_jax.weights.files import stored_like, write_file
from selm_jax.weights.names import Tensor, in_one_tensor
from selm_jax.weights.saving import fetch


def export_adapter(
    adapters: Params,
    config: DecoderConfig,
    lora: Lora,
    base: str,
    folder: Path | None,
    revision: str | None = None,
    inside: bool = False,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into `folder`, which must not exist.

    PEFT adapts stored tensors, each of which may contain several of our kernels (`qkv_proj` of
    Phi-3; the MLP's gate and up of Phi-3, GLM-4 and Granite 4). The adapters of n kernels in one
    tensor, each of rank r, become one adapter of rank n r: their A are concatenated, their B are
    the blocks of a block-diagonal matrix. The product is the same. Each expert of a mixture is a
    module, as in the published files. Where transformers holds all experts as one parameter, PEFT
    0.21 joins their adapters as it loads them, if gates and ups both have some, or neither.

    Where the files store all experts of a layer as one tensor (gpt-oss), PEFT adapts that
    parameter, for which it needs version 0.17 or later: `target_parameters` names it.

    Args:
      adapters: the parameters of the adapters.
      config: the base model's config.
      lora: the settings of the adapters.
      base: the model that the adapters were trained on, as PEFT's users have to name it: a Hub id
        or a folder.
      folder: None for processes that only contribute their shards of the adapters.
      revision: the commit of a Hub id.
      inside: whether the base is a multi-modal model, whose text model has the adapters.
    """
    adapted = [parts for parts in in_one_tensor(config) if any(_has(p, lora) for p in parts)]
    parameters = [parts[0].name for parts in adapted if parts[0].inputs is None]
    parameters.sort(key=lambda name: name.endswith("down_proj"))  # as transformers' class has them
    stored = dict(_matrices(flatten_dict(adapters), adapted, parameters, lora, inside))
    if folder is None:
        return
    folder.mkdir(parents=True)
    entries = {name: stored_like(x.shape, x.dtype) for name, x in stored.items()}
    write_file(folder / "adapter_model.safetensors", entries, iter(stored.items()))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        **_numbers(adapted, lora),
        **_targets(adapted, parameters, inside),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _matrices(
    flat: dict, adapted: list[list[Tensor]], parameters: list[str], lora: Lora, inside: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """The adapters' matrices by their names in the file."""
    for parts in adapted:
        for layer in parts[0].layers or ():
            if parts[0].name in parameters:
                names = [_wrapper(parts[0].name, parameters).format(layer)]
                pairs = [_of_all(parts, flat, layer, lora)]
            else:
                names, pairs = parts[0].names(layer), _pairs(parts, flat, layer, lora)
            for name, (a, b) in zip(names, pairs, strict=True):
                name = name.removesuffix(".weight")
                if inside:
                    name = name.replace("model.", "model.language_model.", 1)
                yield f"base_model.model.{name}.lora_A.weight", a
                yield f"base_model.model.{name}.lora_B.weight", b


def _numbers(adapted: list[list[Tensor]], lora: Lora) -> dict[str, Any]:
    """The ranks and scales in adapter_config.json.

    The scale is alpha / rank; if the rank is n times as large, so must be alpha. rsLoRA is written
    like this, too: where PEFT joins gates and ups as it loads experts, it multiplies alpha by n,
    which is wrong with `use_rslora`.
    """
    alpha = lora.scale * lora.rank
    counts = {_last(parts[0].name): len([p for p in parts if _has(p, lora)]) for parts in adapted}
    return {
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": False,
        "rank_pattern": {name: n * lora.rank for name, n in counts.items() if n > 1},
        "alpha_pattern": {name: n * alpha for name, n in counts.items() if n > 1},
    }


def _targets(adapted: list[list[Tensor]], parameters: list[str], inside: bool) -> dict[str, Any]:
    """The modules and the parameters in adapter_config.json."""
    modules = {_last(parts[0].name) for parts in adapted if parts[0].name not in parameters}
    names = "|".join(sorted(modules))
    # A regular expression if a model for images has modules of the same names.
    found = {"target_modules": rf".*\.language_model\..*\.({names})" if inside else sorted(modules)}
    if not parameters:
        return found
    return found | {"target_parameters": sorted(name.partition("{}.")[2] for name in parameters)}


def _last(name: str) -> str:
    """The last part of a module's or a parameter's name."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _has(row: Tensor, lora: Lora) -> bool:
    return row.layers is not None and lora.adapts(row.kernel)


def _wrapper(whole: str, parameters: list[str]) -> str:
    """The module in PEFT that adapts the parameter `whole`.

    PEFT wraps the module of the parameters once for each of them, in the order in which the module
    has them, which is that of `parameters`: the last one is outside.
    """
    around = len(parameters) - 1 - parameters.index(whole)
    return whole.rpartition(".")[0] + around * ".base_layer"


def _of_all(
    parts: list[Tensor], flat: dict, layer: int, lora: Lora
) -> tuple[np.ndarray, np.ndarray]:
    """The adapter matrices of a tensor [experts, in, out] that stores all experts of a layer.

    PEFT has A as [experts * rank, in], expert by expert, and B as [out, rank * experts], in which
    neighbours are of different experts.
    """
    adapted = [row for row in parts if _has(row, lora)]
    a_parts, b_parts = [], []
    for row in adapted:
        a, b = _halves(row, flat, layer)
        b_parts.append(np.zeros((*b.shape[:-1], row.of * b.shape[-1]), np.float32))
        b_parts[-1][..., row.first :: row.of] = b  # parameters alternate along the outputs
        a_parts.append(a)
    a, b = np.concatenate(a_parts, axis=2), np.concatenate(b_parts, axis=1)
    experts, inputs, rank = a.shape
    a = a.transpose(0, 2, 1).reshape(experts * rank, inputs)
    b = b.transpose(2, 1, 0).reshape(-1, rank * experts)
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


def _halves(row: Tensor, flat: dict, layer: int) -> list[np.ndarray]:
    """A and B of one layer of a kernel, as the adapters have them."""
    *where, kernel = row.path
    both = (fetch(flat[(*where, f"{kernel}_{half}")], row.at(layer)) for half in "ab")
    return [np.asarray(x, np.float32) for x in both]


def _pairs(
    parts: list[Tensor], flat: dict, layer: int, lora: Lora
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The adapter matrices A [rank, in] and B [out, rank] of a stored tensor.

    Where each expert is a stored tensor, these are those of one expert after the other.
    """
    adapted = [row for row in parts if _has(row, lora)]
    halves = {row.path: _halves(row, flat, layer) for row in adapted}
    for expert in range(parts[0].experts or 1):
        a_rows, b_blocks = [], []
        for row in parts:
            outputs, inputs = row.stored_shape
            block = np.zeros((outputs, lora.rank * len(adapted)), np.float32)
            if row.path in halves:
                a, b = (x if row.experts is None else x[expert] for x in halves[row.path])
                first = lora.rank * len(a_rows)
                block[:, first : first + lora.rank] = b.reshape(lora.rank, outputs).T
                a_rows.append(a.reshape(inputs, lora.rank).T)
            b_blocks.append(block)
        yield np.ascontiguousarray(np.concatenate(a_rows)), np.concatenate(b_blocks)
