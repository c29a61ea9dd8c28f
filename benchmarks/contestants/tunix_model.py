"""Loads the benchmark's Llama model into Tunix."""

import json
from pathlib import Path

import jax.numpy as jnp
from tunix.models.llama3 import model, params


def load(folder):
    """Loads a Llama in float32 from a Hugging Face folder; returns (model, configuration).

    Tunix 0.1.7 ignores rope_theta and always uses its own rotary base, so its numbers differ from
    the model's if that is another. This does not affect its speed.
    """
    hf = json.loads((Path(folder) / "config.json").read_text())
    config = model.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=int((hf.get("rope_parameters") or hf)["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )
    return params.create_model_from_safe_tensors(folder, config, dtype=jnp.float32), config
