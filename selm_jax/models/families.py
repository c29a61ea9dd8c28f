"""Model families as facts: Hugging Face `config.json` <-> `DecoderConfig`, both ways.

One decoder serves every family. A family is a set of values of `DecoderConfig`, never a subclass
and never a test on a name. `from_hf` and `to_hf` are inverse to each other; a key of `config.json`
that neither describes the model to us nor is known to be harmless is an error, because a key that
nobody reads is how log-probabilities become silently wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class UnsupportedModel(ValueError):
    """The checkpoint describes a model that the decoder cannot express."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The facts that the decoder needs. Hashable, so that it can be a static argument of jit.

    Attributes:
      vocab_size: rows of the embedding.
      embed: width of the residual stream.
      layers, heads, kv_heads, head_dim: attention; `heads` is a multiple of `kv_heads`.
      mlp: width of the gated MLP.
      norm_eps: epsilon inside the root mean square.
      rope_theta: base of the rotary frequencies.
      tied: the unembedding is the embedding.
      window: a token sees the last `window` positions, itself included; None sees all.
      max_positions: positions that the model was trained for.
      architecture: the class name in `config.json`; carried along for the way out only.
    """

    vocab_size: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm_eps: float
    rope_theta: float
    tied: bool
    window: int | None
    max_positions: int
    architecture: str

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UnsupportedModel(
                f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads evenly"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")


# model_type -> architecture. The Llama shape: RMS norms before attention and MLP, rotary
# positions in halves, SwiGLU, no biases.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# Keys that `from_hf` reads.
_USED = {
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "rms_norm_eps", "rope_theta", "rope_parameters", "tie_word_embeddings", "sliding_window",
    "max_position_embeddings", "hidden_act",
}  # fmt: skip

# Keys that may only have the value under which they change nothing.
_NEUTRAL = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "attention_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
}

# Keys that say nothing about the function that the model computes.
_HARMLESS = {
    "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
    "initializer_range", "transformers_version", "use_cache", "is_llama_config",
    "rope_interleaved", "transformers.js_config", "unsloth_fixed", "_attn_implementation",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "is_encoder_decoder",
}  # fmt: skip


def from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The decoder's facts from the dictionary of a `config.json`.

    Raises:
      UnsupportedModel: an unknown family, a key that nobody here understands, or a known key with
        a value that the decoder cannot express. The message names the key.
    """
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise UnsupportedModel(
            f"config.json: model_type is {family!r}; this version knows {sorted(ARCHITECTURES)}"
        )
    for key, allowed in _NEUTRAL.items():
        if key in hf and hf[key] not in allowed:
            raise UnsupportedModel(
                f"config.json: {key} is {hf[key]!r}; the decoder supports only {allowed[0]!r}"
            )
    if unknown := set(hf) - _USED - set(_NEUTRAL) - _HARMLESS:
        raise UnsupportedModel(
            f"config.json: {', '.join(sorted(unknown))}: not read by this decoder and not known to "
            "be harmless. If it does not change the forward pass, add it to _HARMLESS in "
            "selm_jax/models/families.py"
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"config.json: hidden_act is {hf['hidden_act']!r}, not 'silu'")
    heads = hf["num_attention_heads"]
    # A Mistral config without the key has transformers' default window, not none.
    window = hf.get("sliding_window", 4096 if family == "mistral" else None)
    if window is not None and family == "llama":
        raise UnsupportedModel(f"config.json: sliding_window is {window}, in a Llama model")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp=hf["intermediate_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=_rope_theta(hf),
        tied=hf.get("tie_word_embeddings", False),
        window=window,
        max_positions=hf["max_position_embeddings"],
        architecture=ARCHITECTURES[family],
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The part of `config.json` that describes the model; `from_hf(to_hf(c)) == c`."""
    family = next(k for k, v in ARCHITECTURES.items() if v == config.architecture)
    hf = {
        "architectures": [config.architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
    }
    if family == "mistral":
        hf["sliding_window"] = config.window
    return hf


def read_config(folder: Path) -> DecoderConfig:
    """The facts of the model in a Hugging Face folder."""
    try:
        return from_hf(json.loads((Path(folder) / "config.json").read_text()))
    except KeyError as missing:
        raise UnsupportedModel(f"{folder}/config.json: key {missing} is missing") from missing


def _rope_theta(hf: Mapping[str, Any]) -> float:
    """transformers 5 keeps the base under `rope_parameters`, earlier versions at the top level."""
    rope = dict(hf.get("rope_parameters") or {})
    kind = rope.pop("rope_type", "default")
    theta = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
    if kind != "default" or rope:
        raise UnsupportedModel(f"config.json: rope_parameters {hf['rope_parameters']!r}")
    if hf.get("rope_theta", theta) != theta:
        raise UnsupportedModel(
            f"config.json: rope_theta {hf['rope_theta']} but rope_parameters says {theta}"
        )
    return float(theta)
