"""Reads the model in a GGUF file: its config.json, and its tensors by their Hugging Face names.

Only what is known to be converted correctly is supported. Any other key, tensor or architecture is
an error that names it; if it were ignored, the model would run and be wrong.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import ReaderTensor
from jaxtyping import Float

from selm_jax.weights.gguf_file import MEND, Fields, Gguf, GGUFError
from selm_jax.weights.gguf_tokenizer import SPECIAL_IDS

Json = dict[str, Any]

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """The properties in which one of llama.cpp's architectures differs from the others.

    Attributes:
      architecture: the class in transformers.
      config: keys of config.json in addition to the common ones.
      qkv_bias: whether the projections into attention have biases.
      qk_norm: whether queries and keys of each head are normalised.
      interleaved: whether rows of query and key projections are in llama.cpp's own order.
      rope_factors: whether there may be a tensor with a divisor for each of rope's frequencies.
    """

    architecture: str
    config: Json = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
    interleaved: bool = False
    rope_factors: bool = False


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"attention_bias": False, "mlp_bias": False},
        interleaved=True,
        rope_factors=True,
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"use_sliding_window": False}, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"attention_bias": False, "use_sliding_window": False}, qk_norm=True
    ),
}

# The keys of a model, without their prefix, the name of the architecture.
_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base",
}  # fmt: skip

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a tensor; None if it is not supported."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP and kind == "weight":
        return f"{_TOP[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in _LAYER and kind in ("weight", "bias"):
        return f"model.layers.{int(layer[1])}.{_LAYER[layer[2]]}.{kind}"
    return None


class Named(NamedTuple):
    """A tensor of the file, its Hugging Face name, and its shape in numpy's order."""

    name: str
    tensor: ReaderTensor
    shape: tuple[int, ...]


# --- config.json ----------------------------------------------------------------------------------


def read_model(fields: Fields, reader: Gguf) -> tuple[Family, Json]:
    """Returns (architecture, content of config.json without `rope_scaling`).

    Raises:
      GGUFError: if the architecture or a key is not supported, or values do not fit together.
    """
    name = fields.need("general.architecture", str)
    if name not in FAMILIES:
        raise GGUFError(
            f"{fields.path}: architecture {name!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}. Get the model as a Hugging Face folder (safetensors) instead"
        )
    family = FAMILIES[name]
    for key in reader.fields:
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in _KEYS:
            raise GGUFError(
                f"{fields.path}: key {key} is not supported, and ignoring it could give a wrong "
                "model. Get the model as a Hugging Face folder (safetensors) instead"
            )

    hidden = fields.size(f"{name}.embedding_length")
    heads, kv_heads, head_dim = _heads(fields, reader, name, hidden)
    theta = 10000.0  # llama.cpp's default if the key is absent
    if f"{name}.rope.freq_base" in reader.fields:
        theta = fields.number(f"{name}.rope.freq_base")
    config: Json = {
        "architectures": [family.architecture],
        "model_type": name,
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": fields.size(f"{name}.feed_forward_length"),
        "max_position_embeddings": fields.size(f"{name}.context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": fields.size(f"{name}.block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": fields.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": theta,
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors),
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": len(fields.texts("tokenizer.ggml.tokens")),
    } | family.config
    if config["num_hidden_layers"] > len(reader.tensors):
        raise GGUFError(
            f"{fields.path}: key {name}.block_count is {config['num_hidden_layers']}, but the file "
            f"has only {len(reader.tensors)} tensors. {MEND}"
        )
    return family, config | _special_ids(fields, config["vocab_size"])


def _heads(fields: Fields, reader: Gguf, name: str, hidden: int) -> tuple[int, int, int]:
    heads = fields.size(f"{name}.attention.head_count")
    kv_heads = heads
    if f"{name}.attention.head_count_kv" in reader.fields:
        kv_heads = fields.size(f"{name}.attention.head_count_kv")
    head_dim = fields.get(f"{name}.attention.key_length", int) or hidden // heads
    if heads % kv_heads or head_dim % 2 or head_dim == 0:
        raise GGUFError(
            f"{fields.path}: {heads} heads, {kv_heads} key/value heads, head size {head_dim}; "
            "the first must be a multiple of the second, and the head size must be even. "
            f"{MEND}"
        )
    for key in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        if fields.get(key, int) not in (None, head_dim):
            raise GGUFError(
                f"{fields.path}: key {key} is {fields.get(key, int)}, but the head size is "
                f"{head_dim}; only equal sizes (rope over the whole head) are supported. "
                f"{MEND}"
            )
    return heads, kv_heads, head_dim


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


def rope_scaling(path: Path, factors: Float[np.ndarray, " pairs"], config: Json) -> Json | None:
    """Reconstructs `rope_scaling` for config.json from the divisors of rope's frequencies.

    llama.cpp stores only these divisors. We assume the settings of Llama 3.1, 3.2 and 3.3, which
    differ only in `factor`, compute their divisors, and compare them with those in the file.

    Raises:
      GGUFError: if these divisors differ from those in the file.
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
            f"{path}: tensor {ROPE_FACTORS} has divisors of rope's frequencies that differ from "
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


def named_tensors(path: Path, reader: Gguf, family: Family, config: Json) -> list[Named]:
    """Checks and lists the tensors of the model, except the divisors of rope's frequencies.

    Raises:
      GGUFError: if a tensor is missing, unknown or of the wrong shape; the message names it.
    """
    expected = _expected_shapes(family, config)
    found: dict[str, Named] = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS and family.rope_factors:
            continue
        name = hf_name(tensor.name)
        if name is None or name not in expected or name in found:
            raise GGUFError(
                f"{reader.file_of[tensor.name]}: a {config['model_type']} model of "
                f"{config['num_hidden_layers']} layers has no tensor {tensor.name}. {MEND}"
            )
        # GGUF lists the fastest-running dimension first, numpy and safetensors last.
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != expected[name]:
            raise GGUFError(
                f"{reader.file_of[tensor.name]}: tensor {tensor.name} has shape {shape}, but the "
                f"file's own hyperparameters imply {expected[name]}. {MEND}"
            )
        found[name] = Named(name, tensor, shape)
    if missing := sorted(expected.keys() - found.keys()):
        raise GGUFError(
            f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}. {MEND}"
        )
    return [found[name] for name in expected]


def _expected_shapes(family: Family, config: Json) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    rows_q = config["num_attention_heads"] * config["head_dim"]
    rows_kv = config["num_key_value_heads"] * config["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (rows_q, hidden),
        "attn_k.weight": (rows_kv, hidden),
        "attn_v.weight": (rows_kv, hidden),
        "attn_output.weight": (hidden, rows_q),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }
    if family.qkv_bias:
        layer |= {"attn_q.bias": (rows_q,), "attn_k.bias": (rows_kv,), "attn_v.bias": (rows_kv,)}
    if family.qk_norm:
        layer |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (config["head_dim"],))
    shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (vocab, hidden)
    return {str(hf_name(name)): shape for name, shape in shapes.items()}
