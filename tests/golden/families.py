"""Makes tests/golden/families: a tiny checkpoint of every family, and its logits, by transformers.

    python tests/golden/families.py            # or only those that are named

Needs torch and transformers; `VERSIONS` in the folder says which were used. Weights are random,
large enough that every part of the model matters, and stored in float16, which both sides widen.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "families"
LENGTH = 1100
SHORT = 400  # below the context that LongRoPE extends
ROWS = 2
# Logits are kept at these positions: the beginning, and beyond 1,000.
KEPT = (0, 1, 2, 39, 40, 41, 255, 399, 1000, 1001, 1023, 1024, 1050, 1098, 1099)

_SIZES = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 4096,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 9.0],
}  # fmt: skip
_GEMMA = {"sliding_window": 40, "head_dim": 8, "query_pre_attn_scalar": 24}
_YARN = {
    "rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.1,
    "original_max_position_embeddings": 256,
}  # fmt: skip
_TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

_GEMMA_4 = {
    "num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    "num_key_value_heads": 4, "num_global_key_value_heads": 2, "head_dim": 8,
    "global_head_dim": 16, "sliding_window": 40, "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0, "final_logit_softcapping": 5.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e5,
            "factor": 2.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip

_IMAGES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip

_IMAGES_4 = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4, "patch_size": 4, "position_embedding_size": 16,
}  # fmt: skip

# Name -> (transformers' config class, what it is given beyond the sizes).
FAMILIES = {
    "llama-2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-3.1": ("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("LlamaConfig", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral-0.1": ("MistralConfig", {"sliding_window": 37}),
    "mistral-0.3": ("MistralConfig", {"sliding_window": None, "head_dim": 8}),
    "ministral-3": (
        "Ministral3Config",
        {
            "head_dim": 16, "rope_parameters": _YARN | {
                "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.3,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "phi-3-4k": ("Phi3Config", {"sliding_window": 47, "num_key_value_heads": 4}),
    "phi-3-128k": (
        "Phi3Config", {"rope_parameters": _LONG, "original_max_position_embeddings": 512},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "smollm3": ("SmolLM3Config", {}),
    "llama-yarn": ("LlamaConfig", {"head_dim": 16, "rope_parameters": _YARN}),
    "llama-gelu": ("LlamaConfig", {"hidden_act": "gelu"}),
    "phi-4-mini": (
        "Phi3Config",
        {
            "rope_parameters": _LONG | {"partial_rotary_factor": 0.5}, "hidden_size": 32,
            "original_max_position_embeddings": 512, "tie_word_embeddings": True,
        },
    ),
    "olmo-2": ("Olmo2Config", {"attention_bias": True}),
    "olmo-3": (
        "Olmo3Config",
        {
            "sliding_window": 40, "head_dim": 16, "rope_parameters": {
                "full_attention": _YARN | {"attention_factor": 1.3, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "exaone-4": ("Exaone4Config", {"sliding_window": 40}),
    "granite-3": (
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0, "attention_multiplier": 0.4, "residual_multiplier": 0.22,
            "logits_scaling": 3.0, "tie_word_embeddings": True,
        },
    ),
    "granite-4": (
        "GraniteMoeHybridConfig",
        {
            "embedding_multiplier": 12.0, "attention_multiplier": 0.4, "residual_multiplier": 0.22,
            "logits_scaling": 3.0, "tie_word_embeddings": True, "layer_types": ["attention"] * 4,
            "num_local_experts": 0, "shared_intermediate_size": 24, "mamba_n_heads": 4,
            "position_embedding_type": "rope",
        },
    ),
    "glm-4": ("Glm4Config", {"head_dim": 8}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_hidden_layers": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
            "num_hidden_layers": 2,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 40,
            "swiglu_alpha": 1.5, "swiglu_limit": 0.5,
            "rope_parameters": _YARN | {"truncate": False},
        },
    ),
    "gemma-1": ("GemmaConfig", {"head_dim": 8}),
    "gemma-2": ("Gemma2Config", _GEMMA),
    "gemma-3": (
        "Gemma3TextConfig", _GEMMA | {"num_hidden_layers": 6, "rope_parameters": _TWO_ROPES}
    ),
    "gemma-3-images": (
        "Gemma3Config",
        {
            "text_config": _SIZES | _GEMMA | {
                "sliding_window": 24, "num_hidden_layers": 6, "rope_parameters": _TWO_ROPES,
            },
            "vision_config": _IMAGES | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4, "image_token_index": 200,
        },
    ),
    "gemma-4": ("Gemma4TextConfig", _GEMMA_4),
    "gemma-4-images": (
        "Gemma4Config",
        {
            "text_config": _SIZES | _GEMMA_4 | {
                "use_bidirectional_attention": "vision", "head_dim": 16, "global_head_dim": 8,
                "attention_k_eq_v": False, "num_global_key_value_heads": None,
            },
            "vision_config": _IMAGES_4,
        },
    ),
    "mistral-3-images": (
        "Mistral3Config",
        {
            "text_config": _SIZES | {
                "model_type": "ministral3", "num_hidden_layers": 2, "sliding_window": 700,
                "head_dim": 16, "rope_parameters": _YARN | {"llama_4_scaling_beta": 0.1},
            },
            "vision_config": _IMAGES | {"model_type": "pixtral", "head_dim": 4},
            "image_token_index": 200,
        },
    ),
}  # fmt: skip


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (ROWS, LENGTH)).astype(np.int32)


def make(name: str, folder: Path):
    """Writes the checkpoint that transformers makes of a family; returns its torch model."""
    import torch
    import transformers

    kind, own = FAMILIES[name]
    config = getattr(transformers, kind)(**(own if "text_config" in own else _SIZES | own))
    torch.manual_seed(0)
    model = auto(config).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():  # its own start values are nearly a constant function
            p.add_(torch.randn_like(p) * 0.2)
        for each, p in model.named_parameters():
            if kind.startswith("Gemma4") and each.endswith("q_norm.weight"):
                p.mul_(0.3)  # scores are not divided there, and sharp ones would amplify rounding
        for each, p in model.named_buffers():
            if each.endswith("layer_scalar"):
                p.add_(torch.randn_like(p) * 0.2)
    model.to(torch.float16).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    # Loaded again, not cast back: a cast to float16 rounds the rotary frequencies too.
    return read(folder)


def read(folder: Path, **settings):
    """The torch model in a folder, as transformers loads it; with `settings`, what it returns."""
    import torch
    import transformers

    kind = auto(transformers.AutoConfig.from_pretrained(folder))
    found = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **settings
    )
    return found if settings else found.eval()


def auto(config):
    """transformers' class that chooses a class of models: language models, also with images."""
    import transformers

    if hasattr(config, "vision_config"):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def logits(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def main() -> None:
    import torch
    import transformers

    chosen = sys.argv[1:] or FAMILIES
    for name in chosen:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        model = make(name, FOLDER / name)
        full = logits(model, tokens())
        kept = {"long": full[:, KEPT]}
        if "longrope" in str(model.config):
            short = [t for t in KEPT if t < SHORT]
            kept["short"] = logits(model, tokens()[:, :SHORT])[:, short]
        np.savez_compressed(FOLDER / name / "logits.npz", **kept)
        print(f"{name:14} logits up to {np.abs(full).max():.1f}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (FOLDER / "VERSIONS.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
