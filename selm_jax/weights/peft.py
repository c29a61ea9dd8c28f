"""Exports LoRA adapters as a folder that the `peft` library can load onto their base model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params
from selm_jax.models.lora import TARGETS, Lora, LoraError
from selm_jax.weights.files import stored_like, write_file
from selm_jax.weights.names import Tensor, in_one_tensor, tensors
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
    module, as in the published files. Versions of transformers that hold all experts as one
    parameter have no such modules.

    Args:
      adapters: the parameters of the adapters.
      config: the base model's config.
      lora: the settings of the adapters.
      base: the model that the adapters were trained on, as PEFT's users have to name it: a Hub id
        or a folder.
      folder: None for processes that only contribute their shards of the adapters.
      revision: the commit of a Hub id.
      inside: whether the base is a multi-modal model, whose text model has the adapters.

    Raises:
      LoraError: as for `check`.
    """
    check(config, lora)
    flat = flatten_dict(adapters)
    stored: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for parts in in_one_tensor(config):
        count = len([p for p in parts if _has(p, lora)])
        if not count:
            continue
        module = parts[0].name.removesuffix(".weight")
        ranks[module.rpartition(".")[2]] = lora.rank * count
        for layer in parts[0].layers or ():
            pairs = _pairs(parts, flat, layer, lora)
            for name, (a, b) in zip(parts[0].names(layer), pairs, strict=True):
                name = name.removesuffix(".weight")
                if inside:
                    name = name.replace("model.", "model.language_model.", 1)
                where = f"base_model.model.{name}"
                stored[f"{where}.lora_A.weight"], stored[f"{where}.lora_B.weight"] = a, b
    # The scale is alpha / rank (or its root); if the rank is n times as large, so must be alpha.
    grown = {m: r / lora.rank for m, r in ranks.items() if r != lora.rank}
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
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        # A regular expression if a model for images has modules of the same names.
        "target_modules": rf".*\.language_model\..*\.({'|'.join(sorted(ranks))})"
        if inside
        else sorted(ranks),
        "rank_pattern": {m: ranks[m] for m in grown},
        "alpha_pattern": {
            m: lora.alpha * (math.sqrt(n) if lora.rslora else n) for m, n in grown.items()
        },
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def check(config: DecoderConfig, lora: Lora) -> None:
    """Raises LoraError if adapters are asked for experts that are one tensor.

    PEFT has no module for such experts. `lora.experts` is no way out, so this refuses targets that
    match them before `abstract_adapters` would recommend it.
    """
    for row in tensors(config).values():
        place = row.kernel.replace("experts/", "mlp/")  # the kernel of an MLP whose place it takes
        if row.inputs is None and place in TARGETS and (lora.experts or lora.adapts(place)):
            raise LoraError(
                f"lora.targets is {lora.targets!r} and lora.experts {str(lora.experts).lower()}, "
                f"but this model stores all experts of a layer as one tensor "
                f"({row.name.format(0)}), for which the export has no adapters. Set lora.targets: "
                "self_attn and lora.experts: false, which adapts attention alone"
            )


def _has(row: Tensor, lora: Lora) -> bool:
    return row.layers is not None and lora.adapts(row.kernel)


def _pairs(
    parts: list[Tensor], flat: dict, layer: int, lora: Lora
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The adapter matrices A [rank, in] and B [out, rank] of a stored tensor.

    Where each expert is a stored tensor, these are those of one expert after the other.
    """
    adapted = [row for row in parts if _has(row, lora)]
    halves = {}
    for row in adapted:
        *where, kernel = row.path
        both = (fetch(flat[(*where, f"{kernel}_{half}")], row.at(layer)) for half in "ab")
        halves[row.path] = [np.asarray(x, np.float32) for x in both]
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
