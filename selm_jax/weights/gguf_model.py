"""Reads the model in a GGUF file: its config.json, and its tensors by their Hugging Face names.

Only what is known to be converted correctly is supported. Any other key, tensor or architecture is
an error that names it; if it were ignored, the model would run and be wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import ReaderTensor
from jaxtyping import Float, Float32

from selm_jax.models.config_rope import magnitude_of
from selm_jax.weights.gguf_families import FAMILIES, QKV_BIASES, Family, model_type_of
from selm_jax.weights.gguf_file import MEND, Fields, Gguf, GGUFError, numbers_of
from selm_jax.weights.gguf_tokenizer import SPECIAL_IDS

Json = dict[str, Any]

# Divisors of rope's frequencies: of Llama 3's kin one table, of LongRoPE one for short texts and
# one for long ones.
_FACTORS, _SHORT, _LONG = (
    f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long")
)

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
      tensor: the tensor of the file.
      part: its entry on the first axis of that tensor; None if it is the whole tensor.
      shape: its shape, in numpy's order.
      heads: the number of heads between which rows are interleaved; None if they are in order.
      offset: a number that was added to it.
    """

    name: str
    tensor: ReaderTensor
    part: int | None
    shape: tuple[int, ...]
    heads: int | None
    offset: float

    def numbers(self, path: Path) -> Float32[np.ndarray, ...]:
        """The numbers, dequantised, from the file `path`."""
        values = numbers_of(path, self.tensor, self.part).reshape(self.shape)
        if self.heads is not None:
            values = _unpermute(values, self.heads)
        return values - np.float32(self.offset) if self.offset else values


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
    config["rope_scaling"] = _rope_scaling(k, model, family, config, rotated)
    if family.own is not None:
        config = family.own(k, config)
    return config | _special_ids(fields, config["vocab_size"])


def _heads(k: Fields, hidden: int, family: Family) -> tuple[int, int, int, int]:
    """The numbers of heads and key/value heads, a head's size, and how much of it rope rotates."""
    heads = k.size("attention.head_count")
    kv_heads = k.size("attention.head_count_kv", heads)
    head_dim = k.get("attention.key_length", int) or hidden // heads
    if heads % kv_heads or head_dim % 2 or head_dim == 0:
        raise GGUFError(
            f"{k.path}: {heads} heads, {kv_heads} key/value heads, head size {head_dim}; "
            f"the first must be a multiple of the second, and the head size must be even. {MEND}"
        )
    rotated = k.size("rope.dimension_count", head_dim)
    partly = family.partial and rotated < head_dim and rotated % 2 == 0
    for key in ("attention.value_length", "rope.dimension_count"):
        if k.size(key, head_dim) != head_dim and not (partly and key == "rope.dimension_count"):
            raise GGUFError(
                f"{k.path}: key {k.prefix}{key} is {k.size(key)}, but the head size is {head_dim}; "
                f"only equal sizes (rope over the whole head) are supported. {MEND}"
            )
    return heads, kv_heads, head_dim, rotated


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


# --- rope for longer contexts ---------------------------------------------------------------------


def _rope_scaling(
    k: Fields, model: Gguf, family: Family, config: Json, rotated: int
) -> Json | None:
    """The content of `rope_scaling`, from keys and from the tensors of divisors."""
    tables = {name: _table(k, model, name, rotated) for name in (_FACTORS, _SHORT, _LONG)}
    found = [name for name, table in tables.items() if table is not None]
    kind, magnitude = k.get("rope.scaling.type", str), k.number("rope.scaling.attn_factor", 1.0)
    factor = k.number("rope.scaling.factor", 1.0, zero=True) or 1.0  # in llama.cpp, 0 means 1
    if found and factor != 1 and kind != "none":
        raise GGUFError(
            f"{k.path}: key {k.prefix}rope.scaling.factor is {factor:g}, but the file also has the "
            f"tensors of divisors {found}; beside them only 1 is supported. {MEND}"
        )
    if kind is None and factor != 1:
        kind = "linear"  # llama.cpp's default
    if kind == "none":
        kind = None
    if family.name == "phi3" and found == [_SHORT, _LONG] and kind in (None, "longrope"):
        most = config["max_position_embeddings"]
        original = k.size("rope.scaling.original_context_length", most)
        # Without a magnitude, config.json means this one. The file has it in float32.
        usual = math.isclose(magnitude, magnitude_of(most / original, original), rel_tol=1e-6)
        return {
            "rope_type": "longrope",
            "short_factor": tables[_SHORT],
            "long_factor": tables[_LONG],
        } | ({} if usual else {"attention_factor": magnitude})
    if magnitude != 1:
        raise GGUFError(
            f"{k.path}: key {k.prefix}rope.scaling.attn_factor is {magnitude:g}; only 1 is "
            f"supported here. {MEND}"
        )
    match kind, found:
        case None, []:
            return None
        case None, [name] if name == _FACTORS:
            return _llama3(k.path, np.asarray(tables[name], np.float32), config)
        case "linear", []:
            return {"rope_type": "linear", "factor": k.number("rope.scaling.factor")}
        case "yarn", []:
            optional = {
                "attention_factor": "rope.scaling.yarn_attn_factor",
                "beta_fast": "rope.scaling.yarn_beta_fast",
                "beta_slow": "rope.scaling.yarn_beta_slow",
            }
            return {
                "rope_type": "yarn",
                "factor": k.number("rope.scaling.factor"),
                "original_max_position_embeddings": k.size("rope.scaling.original_context_length"),
            } | {name: k.number(key) for name, key in optional.items() if key in k}
    raise GGUFError(
        f"{k.path}: key {k.prefix}rope.scaling.type is {kind!r} and the tensors of divisors are "
        f"{found}; supported are linear and yarn without such a tensor, and the tensor {_FACTORS} "
        "without a type. Get the model as a Hugging Face folder (safetensors) instead"
    )


def _table(k: Fields, model: Gguf, name: str, rotated: int) -> list[float] | None:
    """The numbers of a tensor of divisors as the shortest decimals; None if there is no such."""
    for tensor in model.tensors:
        if tensor.name == name:
            values = numbers_of(model.file_of[name], tensor)
            if values.shape != (rotated // 2,):
                raise GGUFError(
                    f"{k.path}: tensor {name} has shape {values.shape}; expected {rotated // 2} "
                    f"numbers, half of the head size. {MEND}"
                )
            return [float(str(value)) for value in values]
    return None


def _llama3(path: Path, factors: Float[np.ndarray, " pairs"], config: Json) -> Json | None:
    """The settings of Llama 3's rope, from the divisors of frequencies that they give.

    llama.cpp stores only these divisors. We assume the settings of Llama 3.1, 3.2 and 3.3, which
    differ only in `factor`, compute their divisors, and compare them with those in the file.
    """
    if np.all(factors == 1):
        return None
    guess = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_divisors(guess, config["rope_theta"], config["head_dim"])
    if not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise GGUFError(
            f"{path}: tensor {_FACTORS} has divisors of rope's frequencies that differ from "
            f"those of Llama 3.1 to 3.3 (factor {guess['factor']:g}) and are not supported. "
            "Get the model as a Hugging Face folder (safetensors) instead"
        )
    return guess


def _llama3_divisors(scaling: Json, theta: float, head_dim: int) -> Float[np.ndarray, " pairs"]:
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / scaling["factor"])


# --- tensors --------------------------------------------------------------------------------------


def named_tensors(path: Path, model: Gguf, config: Json) -> list[Named]:
    """Checks and lists the tensors of the model, except the divisors of rope's frequencies.

    Raises:
      GGUFError: if a tensor is missing, unknown or of the wrong shape; the message names it.
    """
    family, sizes = FAMILIES[config["model_type"]], sizes_of(config)
    expected = dict(_expected(family, config))
    tensors = {t.name: t for t in model.tensors}
    divisors = {_FACTORS, _SHORT, _LONG} if family.factors else set()
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
    named = []
    for name, (hf_name, *axes) in expected.items():
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
                named.append(Named(one, tensor, part, shape[1:], heads, offset))
        else:
            named.append(Named(hf_name, tensor, None, shape, heads, offset))
    return named


_ROTATED = re.compile(r"\.attn_[qk]\.weight$")


def sizes_of(config: Json) -> dict[str, int]:
    """The sizes of axes, by the names that `gguf_families` uses."""
    head, inner = config["head_dim"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return {
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


def _expected(family: Family, config: Json) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each tensor of the file, its Hugging Face name, and the names of its axes' sizes."""
    for name, stored in _OUTSIDE.items():
        if name != "output.weight" or not config["tie_word_embeddings"]:
            yield name, stored
    biases = QKV_BIASES if family.biases and config["attention_bias"] else {}
    for i in range(config["num_hidden_layers"]):
        for name, (hf_name, *axes) in (family.layer | biases).items():
            yield f"blk.{i}.{name}", (f"model.layers.{i}.{hf_name}", *axes)
