"""What model a GGUF file holds: its config.json, and its tensors by their Hugging Face names.

Only what is known to come out right is here; a key, tensor or architecture that is not is refused
by name, because read past it the model would run, and be wrong.
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

from selm_jax.weights.gguf_file import Fields, Gguf, GGUFError
from selm_jax.weights.gguf_tokenizer import SPECIAL_IDS

Json = dict[str, Any]

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """How an architecture of llama.cpp differs from the others here.

    Attributes:
      config: what its config.json says beside the common keys.
      qkv_bias: the projections into attention have biases.
      qk_norm: queries and keys of each head are normed.
      interleaved: rows of query and key projections are in llama.cpp's own order.
      rope_factors: it may have a tensor with a divisor for each of rope's frequencies.
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

# The keys of a model, behind its architecture's name.
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
    """The Hugging Face name of a tensor; None if it is not known here."""
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
    """The architecture and the content of config.json, but for scaled rope (`rope_scaling`).

    Raises:
      GGUFError: an architecture or a key not known here, or values that do not fit together.
    """
    name = fields.need("general.architecture", str)
    if name not in FAMILIES:
        raise GGUFError(
            f"{fields.path}: architecture {name!r}; converted here: {', '.join(FAMILIES)}. "
            "Get the model as a Hugging Face folder (safetensors) instead"
        )
    family = FAMILIES[name]
    for key in reader.fields:
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in _KEYS:
            raise GGUFError(
                f"{fields.path}: key {key} is not known here; what it changes would be lost"
            )

    hidden = fields.size(f"{name}.embedding_length")
    heads, kv_heads, head_dim = _heads(fields, reader, name, hidden)
    theta = 10000.0  # llama.cpp's default where the key is absent
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
            f"holds only {len(reader.tensors)} tensors"
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
            f"{fields.path}: {heads} heads, {kv_heads} key/value heads, head size {head_dim}: "
            "the first must be a multiple of the second and the size even"
        )
    for key in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        if fields.get(key, int) not in (None, head_dim):
            raise GGUFError(
                f"{fields.path}: key {key} is {fields.get(key, int)}, the head size is {head_dim}; "
                "only equal sizes (rope over the whole head) are converted"
            )
    return heads, kv_heads, head_dim


def _special_ids(fields: Fields, vocab_size: int) -> Json:
    found = {}
    for name, key in SPECIAL_IDS.items():
        token_id = fields.get(key, int)
        if token_id is None:
            if name == "eos":
                raise GGUFError(f"{fields.path}: key {key} is missing")
            continue
        if not 0 <= token_id < vocab_size:
            raise GGUFError(f"{fields.path}: key {key} is {token_id}, outside the vocabulary")
        if name != "unk":
            found[f"{name}_token_id"] = token_id
    return found


# --- rope for longer contexts -----------------------------------------------------------------------


def rope_scaling(path: Path, factors: Float[np.ndarray, " pairs"], config: Json) -> Json | None:
    """`rope_scaling` of config.json from the divisors of rope's frequencies.

    llama.cpp keeps only these divisors. The settings that they come from are those of Llama 3.1,
    3.2 and 3.3, which differ in `factor` alone, or they are not known: the divisors of the guess
    are computed again and must be those in the file.

    Raises:
      GGUFError: they are not.
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
            f"{path}: tensor {ROPE_FACTORS} holds divisors of rope's frequencies that are not those "
            f"of Llama 3.1 to 3.3 (factor {guess['factor']:g}); config.json cannot say them. "
            "Get the model as a Hugging Face folder (safetensors) instead"
        )
    return guess


def _llama3_divisors(scaling: Json, theta: float, head_dim: int) -> Float[np.ndarray, " pairs"]:
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / scaling["factor"])


# --- tensors ----------------------------------------------------------------------------------------


def named_tensors(path: Path, reader: Gguf, family: Family, config: Json) -> list[Named]:
    """Every tensor but the divisors of rope, checked: none missing, none unknown, none misshapen.

    Raises:
      GGUFError: one of these, by its name in the file.
    """
    expected = _expected_shapes(family, config)
    found: dict[str, Named] = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS and family.rope_factors:
            continue
        name = hf_name(tensor.name)
        if name is None or name not in expected or name in found:
            raise GGUFError(
                f"{reader.file_of[tensor.name]}: tensor {tensor.name} has no place in a {config['model_type']} model of "
                f"{config['num_hidden_layers']} layers"
            )
        # GGUF lists the fastest-running dimension first, numpy and safetensors last.
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != expected[name]:
            raise GGUFError(
                f"{reader.file_of[tensor.name]}: tensor {tensor.name} has shape {shape}, "
                f"the file's own settings ask for {expected[name]}"
            )
        found[name] = Named(name, tensor, shape)
    if missing := sorted(expected.keys() - found.keys()):
        raise GGUFError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
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
