"""Reads the model in a GGUF file: its config.json, and its tensors by their Hugging Face names.

Only what is known to be converted correctly is supported. Any other key, tensor or architecture is
an error that names it; if it were ignored, the model would run and be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import ReaderTensor
from jaxtyping import Float32

from selm_jax.weights.gguf_families import FAMILIES, QKV_BIASES, Family, model_type_of
from selm_jax.weights.gguf_file import MEND, Fields, Gguf, GGUFError, numbers_of
from selm_jax.weights.gguf_keys import Heads
from selm_jax.weights.gguf_rope import FACTORS, LONG, SHORT, rope_scaling
from selm_jax.weights.gguf_tokenizer import SPECIAL_IDS

Json = dict[str, Any]

# The keys of a model, without their prefix, the name of the architecture.
_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.finetuned", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip

_OUTSIDE = {
    "token_embd.weight": ("model.embed_tokens.weight", "vocab", "hidden"),
    "output_norm.weight": ("model.norm.weight", "hidden"),
    "output.weight": ("lm_head.weight", "vocab", "hidden"),
}


class Named(NamedTuple):
    """A tensor of the folder, and where its numbers are in the file.

    Attributes:
      name: its Hugging Face name.
      tensors: the tensor of the file; several if their numbers alternate along the last axis.
      part: its entry on the first axis of that tensor; None if it is the whole tensor.
      shape: its shape, in numpy's order.
      heads: the number of heads between which rows are interleaved; None if they are in order.
      offset: a number that was added to it.
      stack: whether it has all experts of a layer, and the matrix of each is transposed.
    """

    name: str
    tensors: tuple[ReaderTensor, ...]
    part: int | None
    shape: tuple[int, ...]
    heads: int | None = None
    offset: float = 0.0
    stack: bool = False

    def numbers(self, file_of: Mapping[str, Path]) -> Float32[np.ndarray, ...]:
        """The numbers, dequantised; `file_of` has the file of each tensor."""
        if self.stack:
            return self._stacked(file_of)
        (tensor,) = self.tensors
        values = numbers_of(file_of[tensor.name], tensor, self.part).reshape(self.shape)
        if self.heads is not None:
            values = _unpermute(values, self.heads)
        return values - np.float32(self.offset) if self.offset else values

    def _stacked(self, file_of: Mapping[str, Path]) -> Float32[np.ndarray, "experts ..."]:
        values, every = np.empty(self.shape, np.float32), len(self.tensors)
        for first, tensor in enumerate(self.tensors):
            for expert, own in enumerate(values):  # one at a time, because together they are large
                own[..., first::every] = numbers_of(file_of[tensor.name], tensor, expert).T
        return values


def _unpermute(
    values: Float32[np.ndarray, "rows columns"], heads: int
) -> Float32[np.ndarray, "rows columns"]:
    """Reorders the rows of a query or key projection from llama.cpp's order to Hugging Face's.

    Rope rotates pairs of rows. Hugging Face pairs row i with row i + head_dim / 2 of the same head;
    llama.cpp's converter interleaves them (2i with 2i + 1) for the llama architecture and its kin.
    """
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


# --- config.json ----------------------------------------------------------------------------------


def read_config(fields: Fields, model: Gguf) -> Json:
    """Returns the content of config.json.

    Raises:
      GGUFError: if the architecture or a key is not supported, or values do not fit together.
    """
    model_type = model_type_of(fields)
    family = FAMILIES[model_type]
    k = fields.under(family.name)
    for key in k:
        if key not in _KEYS | family.keys:
            raise GGUFError(
                f"{k.path}: key {k.prefix}{key} is not supported, and ignoring it could give a "
                "wrong model. Get the model as a Hugging Face folder (safetensors) instead"
            )
    hidden = k.size("embedding_length")
    heads, kv_heads, head_dim, rotated = _heads(k, hidden, family)
    config: Json = {
        "architectures": [family.model_class],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": k.size("feed_forward_length"),
        "max_position_embeddings": k.size("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": k.size("block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": k.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": k.number("rope.freq_base", 10000.0),  # llama.cpp's default
        "tie_word_embeddings": all(t.name != "output.weight" for t in model.tensors),
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": len(fields.texts("tokenizer.ggml.tokens")),
    } | family.facts
    if config["num_hidden_layers"] > len(model.tensors):
        raise GGUFError(
            f"{k.path}: key {k.prefix}block_count is {config['num_hidden_layers']}, but the file "
            f"has only {len(model.tensors)} tensors. {MEND}"
        )
    if family.partial:
        config["partial_rotary_factor"] = rotated / head_dim
    if family.biases:
        config["attention_bias"] = "blk.0.attn_q.bias" in model.file_of
    config["rope_scaling"] = rope_scaling(k, model, family, config, rotated)
    if family.own is not None:
        config = family.own(k, config)
    if family.keys_as_values:  # the last layer has full attention
        values = f"blk.{config['num_hidden_layers'] - 1}.attn_v.weight"
        config["attention_k_eq_v"] = values not in model.file_of
    return config | _special_ids(fields, config["vocab_size"])


def _heads(k: Fields, hidden: int, family: Family) -> Heads:
    if family.heads is not None:
        found = family.heads(k)
        _check_heads(k, *found[:3])
        return found
    heads = k.size("attention.head_count")
    kv_heads = _of_all_layers(k, "attention.head_count_kv", heads)
    head_dim = k.get("attention.key_length", int) or hidden // heads
    _check_heads(k, heads, kv_heads, head_dim)
    rotated = k.size("rope.dimension_count", head_dim)
    partly = family.partial and rotated < head_dim and rotated % 2 == 0
    for key in ("attention.value_length", "rope.dimension_count"):
        if k.size(key, head_dim) != head_dim and not (partly and key == "rope.dimension_count"):
            raise GGUFError(
                f"{k.path}: key {k.prefix}{key} is {k.size(key)}, but the head size is {head_dim}; "
                f"only equal sizes (rope over the whole head) are supported. {MEND}"
            )
    return Heads(heads, kv_heads, head_dim, rotated)


def _of_all_layers(k: Fields, key: str, default: int) -> int:
    """The value of a key that may also be an array with the same number for each layer."""
    said = k.get(key, object)
    if isinstance(said, list) and len(said) == k.size("block_count") and len(set(said)) == 1:
        (value,) = set(said)
        if type(value) is int and value > 0:
            return value
    return k.size(key, default)


def _check_heads(k: Fields, heads: int, kv_heads: int, head_dim: int) -> None:
    if heads % kv_heads or head_dim % 2 or head_dim == 0:
        raise GGUFError(
            f"{k.path}: {heads} heads, {kv_heads} key/value heads, head size {head_dim}; "
            f"the first must be a multiple of the second, and the head size must be even. {MEND}"
        )


def _special_ids(fields: Fields, vocab_size: int) -> Json:
    found = {}
    for name, key in SPECIAL_IDS.items():
        token_id = fields.get(key, int)
        if token_id is None:
            if name == "eos":
                raise GGUFError(f"{fields.path}: key {key} is missing. {MEND}")
            continue
        if not 0 <= token_id < vocab_size:
            raise GGUFError(
                f"{fields.path}: key {key} is {token_id}, outside the vocabulary. {MEND}"
            )
        if name != "unk":
            found[f"{name}_token_id"] = token_id
    return found


# --- tensors --------------------------------------------------------------------------------------


def named_tensors(path: Path, model: Gguf, config: Json) -> list[Named]:
    """Checks and lists the tensors of the model, except the divisors of rope's frequencies.

    Raises:
      GGUFError: if a tensor is missing, unknown or of the wrong shape; the message names it.
    """
    family = FAMILIES[config["model_type"]]
    expected = dict(_expected(family, config))
    tensors = {t.name: t for t in model.tensors}
    divisors = {FACTORS, SHORT, LONG} if family.factors else set()
    for tensor in model.tensors:
        name = tensor.name
        if name not in expected.keys() | divisors or tensors[name] is not tensor:
            raise GGUFError(
                f"{model.file_of[name]}: a {config['model_type']} model of "
                f"{config['num_hidden_layers']} layers has no tensor {name}. {MEND}"
            )
    if missing := [expected[name][0] for name in sorted(expected.keys() - tensors.keys())]:
        raise GGUFError(
            f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}. {MEND}"
        )
    named: list[Named] = []
    for name, (hf_name, axes, sizes) in expected.items():
        tensor = tensors[name]
        # GGUF lists the fastest-running dimension first, numpy and safetensors last.
        shape = tuple(int(n) for n in reversed(tensor.shape))
        wanted = tuple(sizes[axis] for axis in axes)
        if shape != wanted:
            raise GGUFError(
                f"{model.file_of[name]}: tensor {name} has shape {shape}, but the "
                f"file's own hyperparameters imply {wanted}. {MEND}"
            )
        heads = sizes[f"{axes[0]}_heads"] if family.interleaved and _ROTATED.search(name) else None
        offset = family.offset if name.endswith("norm.weight") else 0.0
        if "{}" in hf_name:
            for part in range(shape[0]):
                one = hf_name.format(part)
                named.append(Named(one, (tensor,), part, shape[1:], heads, offset))
        elif ".experts." in hf_name:
            before = [named.pop()] if named[-1].name == hf_name else []
            parts = *(t for each in before for t in each.tensors), tensor
            *outer, last = shape[0], *shape[:0:-1]
            named.append(Named(hf_name, parts, None, (*outer, last * len(parts)), stack=True))
        else:
            named.append(Named(hf_name, (tensor,), None, shape, heads, offset))
    return named


_ROTATED = re.compile(r"\.attn_[qk]\.weight$")


def sizes_of(config: Json, layer: int = 0) -> dict[str, int]:
    """The sizes of axes in a layer, by the names that `gguf_families` uses."""
    heads, inner = config["num_attention_heads"], config["intermediate_size"]
    if "global_head_dim" in config and _is_full(config, layer):
        head, kv_heads = config["global_head_dim"], config["num_global_key_value_heads"]
    else:
        head, kv_heads = config["head_dim"], config["num_key_value_heads"]
    return {
        "single": 1,
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "head": head,
        "q": heads * head,
        "kv": kv_heads * head,
        "qkv": (heads + 2 * kv_heads) * head,
        "q_heads": heads,
        "kv_heads": kv_heads,
        "inner": inner,
        "gate_up": 2 * inner,
        "experts": config.get("num_local_experts") or config.get("num_experts") or 0,
        "one": config.get("moe_intermediate_size", inner),  # of one expert
    }


def _is_full(config: Json, layer: int) -> bool:
    return config["layer_types"][layer] == "full_attention"


def _expected(
    family: Family, config: Json
) -> Iterator[tuple[str, tuple[str, list[str], dict[str, int]]]]:
    """Each tensor of the file, its Hugging Face name, the names of its axes, and their sizes."""
    for name, (hf_name, *axes) in _OUTSIDE.items():
        if name != "output.weight" or not config["tie_word_embeddings"]:
            yield name, (hf_name, axes, sizes_of(config))
    biases = QKV_BIASES if family.biases and config["attention_bias"] else {}
    for i in range(config["num_hidden_layers"]):
        sizes = sizes_of(config, i)
        shared = config.get("attention_k_eq_v") and _is_full(config, i)
        for name, (hf_name, *axes) in (family.layer | biases).items():
            if name != "attn_v.weight" or not shared:
                yield f"blk.{i}.{name}", (f"model.layers.{i}.{hf_name}", axes, sizes)
