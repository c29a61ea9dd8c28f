"""A finished policy as a Hugging Face folder that transformers, vLLM and lm-eval load as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from selm_jax.models.decoder import Params
from selm_jax.models.families import DecoderConfig
from selm_jax.weights.huggingface import save

# The tokenizer and what goes with it, byte for byte as it came.
_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def export_folder(
    params: Params, config: DecoderConfig, source: Path, folder: Path, card: str
) -> None:
    """Writes weights, config, tokenizer and model card into `folder`, which must not exist.

    The config is the source model's, since the model is of the same shape; only what describes the
    stored weights is set anew.
    """
    folder.mkdir(parents=True)
    for name in _COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    hf = json.loads((source / "config.json").read_text())
    hf.pop("dtype", None)
    hf["torch_dtype"] = str(params["embedding"].dtype)
    hf["use_cache"] = True
    (folder / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(card)
    save(params, config, folder / "model.safetensors")
