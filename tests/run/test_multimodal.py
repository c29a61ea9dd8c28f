"""A run starts from the text model in a multi-modal folder, and goes on from what it exports."""

from __future__ import annotations

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console
from safetensors.numpy import load_file, save_file

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.models.decoder import Decoder
from selm_jax.models.families import from_hf
from selm_jax.run.run import Run
from selm_jax.weights.huggingface import to_hf_tensors


def make(folder: Path) -> None:
    """Turns the tiny model of a folder into a Gemma 3 with one tensor for images."""
    was = json.loads((folder / "config.json").read_text())
    text = {key: was[key] for key in ("vocab_size", "head_dim")} | {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "sliding_window": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1,
    }  # fmt: skip
    hf = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 2}}
    (folder / "config.json").write_text(json.dumps(hf))
    of_text, two = from_hf(hf), jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(Decoder(of_text).init(jax.random.key(0), two, two)["params"])
    tensors = {f"language_model.{name}": x for name, x in to_hf_tensors(params, of_text)}
    tensors["vision_tower.weight"] = np.arange(6, dtype=np.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("keep_vision", [True, False])
def test_two_iterations_from_a_multimodal_folder(keep_vision, tmp_path, monkeypatch):
    tiny.on_first_device(monkeypatch)
    lora = {"rank": 2, "alpha": 4, "targets": "q_proj"}
    file = tiny.experiment(tmp_path, model__keep_vision=keep_vision, lora=lora)
    make(tmp_path / "model")
    iterate(Run(config.load(file), Console(quiet=True)))
    start = load_file(tmp_path / "model" / "model.safetensors")
    for t in (1, 2):
        folder = tmp_path / "run" / f"iteration_{t}"
        after = load_file(folder / "model" / "model.safetensors")
        if keep_vision:
            assert after.keys() == start.keys()
            assert after["vision_tower.weight"].tobytes() == start["vision_tower.weight"].tobytes()
        else:
            assert {f"language_model.{name}" for name in after} == set(start) - {
                "vision_tower.weight"
            }
        adapters = load_file(folder / "adapter" / "adapter_model.safetensors")
        inside = keep_vision or t == 1  # the base of the second is the first one's export
        assert all(("language_model" in name) == inside for name in adapters)
