"""Writes the model of a Hugging Face folder as a GGUF file, as llama.cpp's converter does.

The names of tensors are those of the package gguf, which llama.cpp's converter takes as well.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import quantize
from safetensors.numpy import load_file
from tiny_gguf import CONTROL, F32, tokenizer_keys, write

NAMES = {
    "qwen3_moe": "qwen3moe", "mixtral": "llama", "olmo3": "olmo2", "gemma3_text": "gemma3",
    "ministral3": "mistral3", "gpt_oss": "gpt-oss", "gemma4_text": "gemma4",
    "granitemoehybrid": "granite",  # if all layers are attention, and tokens have no experts
}  # fmt: skip
# Those whose rope rotates neighbours in llama.cpp.
_NEIGHBOURS = ("llama", "mixtral", "ministral3", "granite", "granitemoehybrid", "smollm3")
_COPIED = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_intermediate_size": "expert_shared_feed_forward_length",
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_d_state": "ssm.state_size",
    "mamba_n_groups": "ssm.group_count",
    "mamba_n_heads": "ssm.time_step_rank",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ROPE = {
    "rope_theta": "rope.freq_base",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "attention_factor": "rope.scaling.yarn_attn_factor",
}


def write_of(
    folder: Path,
    path: Path,
    change: dict | None = None,
    keys: dict | None = None,
    experts: GGMLQuantizationType = F32,
) -> tuple[Path, dict]:
    """Writes the model of a Hugging Face folder as GGUF, with `change` in its config.json.

    `keys` are set in the file whatever config.json says; None leaves a key out. `experts` is the
    type of the matrices of experts.

    Returns the file and the config.
    """
    config = json.loads((folder / "config.json").read_text()) | (change or {})
    name = config["model_type"]
    arch = NAMES.get(name, name)
    tokens = CONTROL + ["AB"] + [chr(ord("A") + i) for i in range(config["vocab_size"] - 4)]
    said = {f"{arch}.{key}": value for key, value in _keys_of(config).items()}
    said |= tokenizer_keys(tokens, [("A", "B")], 3) | {"general.architecture": arch}
    tensors = {
        name: value.astype(np.float32)
        for name, value in load_file(folder / "model.safetensors").items()
        if not name.endswith(".bias") or config.get("attention_bias", True)
    }
    tensors = _tensors_of(tensors, config, arch) | _factors_of(config)
    said = {key: value for key, value in (said | (keys or {})).items() if value is not None}
    kinds = {name: experts if name.endswith("_exps.weight") else F32 for name in tensors}
    stored = {name: (quantize(x, kinds[name]), kinds[name]) for name, x in tensors.items()}
    return write(path, said, stored), config


def _keys_of(config: dict) -> dict:
    name, rope = config["model_type"], config["rope_parameters"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    full = rope.get("full_attention", rope)
    keys = {new: config[old] for old, new in _COPIED.items() if config.get(old) is not None}
    if name.startswith("gemma") or config.get("head_dim"):
        keys["attention.value_length"] = head
    if name in ("llama", "mixtral", "granite", "granitemoehybrid", "phi3", "glm4"):
        keys["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1))
    if name in ("olmo3", "exaone4", "gemma2", "gemma3_text", "phi3", "gpt_oss", "gemma4_text"):
        keys["attention.sliding_window"] = config["sliding_window"] or 0
    if name in ("olmo3", "exaone4", "gemma4_text"):
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        keys["attention.sliding_window_pattern"] = slides
    if name not in ("gemma", "gemma2"):
        keys["rope.freq_base"] = full["rope_theta"]
    if "sliding_attention" in rope:
        keys["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
    if full["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = full["rope_type"]
        keys |= {new: full[old] for old, new in _ROPE.items() if old in full}
    if name == "gemma4_text":
        full = _heads_of_full_layers(config)
        for suffix, size in (("", full["head_dim"]), ("_swa", head)):
            for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
                keys[key + suffix] = size
        if "num_key_value_heads" in full:
            counts = {"sliding_attention": config["num_key_value_heads"]}
            counts["full_attention"] = full["num_key_value_heads"]
            keys["attention.head_count_kv"] = [counts[kind] for kind in config["layer_types"]]
        keys |= {"attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0}
    if name == "granitemoehybrid":
        keys["ssm.inner_size"] = config["mamba_expand"] * config["hidden_size"]
        keys["attention.head_count_kv"] = [config["num_key_value_heads"]] * len(
            config["layer_types"]
        )
        keys["rope.scaling.finetuned"] = True
    if name == "gpt_oss":
        keys["expert_feed_forward_length"] = config["intermediate_size"]
    if name == "ministral3":
        keys["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
        keys["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
    if name == "phi3":
        original = config["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = original
        if full["rope_type"] == "longrope":
            extended = config["max_position_embeddings"] / original
            factor = (1 + math.log(extended) / math.log(original)) ** 0.5
            keys["rope.scaling.attn_factor"] = factor
    return keys


def _heads_of_full_layers(config: dict) -> dict:
    return config["per_layer_config"][str(config["layer_types"].index("full_attention"))]


def _factors_of(config: dict) -> dict[str, np.ndarray]:
    """The tensors of rope's divisors, number by number."""
    rope = config["rope_parameters"]
    if config["model_type"] == "gemma4_text":
        pairs = _heads_of_full_layers(config)["head_dim"] // 2
        rotated = int(rope["full_attention"]["partial_rotary_factor"] * pairs)
        divisors = [1.0] * rotated + [1e30] * (pairs - rotated)
        return {"rope_freqs.weight": np.array(divisors, np.float32)}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
            for kind in ("short", "long")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    original, divisors = rope["original_max_position_embeddings"], []
    for i in range(0, head, 2):
        turns = original / (2 * math.pi * rope["rope_theta"] ** (i / head))
        smooth = (turns - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(divisors, np.float32)}


def _apart(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """A tensor under the names that the package gguf knows: its own, or those of its parts."""
    stem, _, last = name.rpartition(".")
    if last in ("sinks", "layer_scalar"):
        return [(f"{name}.weight", value)]
    if stem.endswith("shared_mlp.output_linear"):
        return [(name.replace("shared_mlp.output_linear", "mlp.down_proj"), value)]
    if stem.endswith("shared_mlp.input_linear"):
        halves = zip(("gate_proj", "up_proj"), np.split(value, 2), strict=True)
        return [(name.replace("shared_mlp.input_linear", f"mlp.{n}"), half) for n, half in halves]
    if not stem.endswith("mlp.experts"):
        return [(name, value)]
    kind = "bias" if last.endswith("_bias") else "weight"
    value = value if kind == "bias" else value.swapaxes(1, 2)
    if last.startswith("down"):
        return [(f"{stem}.down_proj.{kind}", value)]
    return [(f"{stem}.gate_proj.{kind}", value[:, ::2]), (f"{stem}.up_proj.{kind}", value[:, 1::2])]


def _tensors_of(tensors: dict, config: dict, arch: str) -> dict[str, np.ndarray]:
    """The tensors under the names that the package gguf has for them."""
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == arch)
    names, out = get_tensor_name_map(kind, config["num_hidden_layers"]), {}
    experts: dict[str, list] = {}
    for name, value in (each for pair in tensors.items() for each in _apart(*pair)):
        stem, _, suffix = re.sub(r"experts\.\d+\.", "experts.", name).rpartition(".")
        stored = f"{names.get_name(stem)}.{suffix}"
        assert not stored.startswith("None"), name
        for part, key in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
            if f"{part}.weight" in stored and config["model_type"] in _NEIGHBOURS:
                heads = value.reshape(config[key], 2, -1, value.shape[-1])
                value = heads.swapaxes(1, 2).reshape(value.shape)
        if arch.startswith("gemma") and arch != "gemma4" and name.endswith("norm.weight"):
            value = value + np.float32(1)
        if number := re.findall(r"experts\.(\d+)", name):
            experts.setdefault(stored, []).append((int(number[0]), value))
        else:
            out[stored] = value
    return out | {
        k: np.stack([v for _, v in sorted(vs, key=lambda v: v[0])]) for k, vs in experts.items()
    }
