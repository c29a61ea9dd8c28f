"""A finished policy as a Hugging Face folder that transformers, vLLM and lm-eval load as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params
from selm_jax.models.families import reward_model_json
from selm_jax.weights.files import (
    DTYPES,
    MAX_SHARD_BYTES,
    Checkpoint,
    WeightsError,
    open_checkpoint,
    stored_like,
    write,
)
from selm_jax.weights.folder import carried, links_out
from selm_jax.weights.huggingface import save

# The key under which a folder's settings name Python files of its own.
_CODE = "auto_map"


def export_folder(
    params: Params,
    config: DecoderConfig,
    source: Path,
    folder: Path | None,
    card: str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes weights, config, tokenizer and model card into `folder`, which must not exist.

    The config is the source model's, key by key, since the model is of the same shape; only the
    dtype of the stored weights is set anew, and what makes a reward model of it, if it is one.
    Where it names code (`auto_map`), that is left out: no code goes with the model, and none is
    needed.

    Args:
      source: the Hugging Face folder that training started from.
      folder: None for the processes that only bring their parts of the parameters.
      card: the text of README.md.
      max_shard_bytes: of one safetensors file.

    Raises:
      WeightsError: a file that goes with the model is a link to one outside `source`.
    """
    if folder is not None:
        _write_folder(source, folder, str(params["embedding"].dtype), config)
        (folder / "README.md").write_text(card, encoding="utf-8")
    save(params, config, folder, max_shard_bytes=max_shard_bytes)


def convert_dtype(
    source: Path, folder: Path, dtype: str, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes the model in `source` into `folder`, which must not exist, with weights of `dtype`.

    For what leaves a run: within it weights stay as they were trained, because the next iteration
    starts from them and updates are smaller than bfloat16 can tell.

    Args:
      dtype: "float32", "bfloat16" or "float16".

    Raises:
      WeightsError: `source` is not whole, or another dtype.
    """
    kinds = {np.dtype(known).name: np.dtype(known) for known in DTYPES.values()}
    if dtype not in kinds:
        raise WeightsError(f"dtype {dtype!r}: weights are stored as one of {', '.join(kinds)}")
    kind = kinds[dtype]
    checkpoint = open_checkpoint(source)
    entries = {n: stored_like(t.shape, kind) for n, t in checkpoint.tensors.items()}
    _write_folder(source, folder, dtype)
    if (source / "README.md").exists():
        shutil.copyfile(source / "README.md", folder / "README.md")
    values = ((name, _narrowed(checkpoint, name, kind)) for name in entries)
    write(folder, entries, values, max_shard_bytes=max_shard_bytes)


def _narrowed(checkpoint: Checkpoint, name: str, kind: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # said below, by name
        found = checkpoint.read(name).astype(kind)
    if not np.isfinite(found).all():
        raise WeightsError(
            f"{checkpoint.folder}: {name} holds numbers that are too large for {kind.name}, or no "
            "numbers at all; export as bfloat16 or float32"
        )
    return found


def _write_folder(
    source: Path, folder: Path, dtype: str, config: DecoderConfig | None = None
) -> None:
    """All but the weights and the card."""
    hf: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config is not None and config.head is not None:
        hf = reward_model_json(hf, config.head.pad)
    if wrong := links_out(source):
        raise WeightsError(f"{source}: {'; '.join(wrong)}")
    folder.mkdir(parents=True)
    for name in carried(source):
        (folder / name).parent.mkdir(exist_ok=True)
        _copy(source / name, folder / name)
    hf.pop(_CODE, None)
    # transformers 5 writes `dtype`, earlier versions and others `torch_dtype`, which all can read.
    for key in [key for key in ("dtype", "torch_dtype") if key in hf] or ["torch_dtype"]:
        hf[key] = dtype
    _write_json(folder / "config.json", hf)


def _copy(file: Path, to: Path) -> None:
    """Byte for byte, but for what names code that stays behind."""
    if file.suffix == ".json" and f'"{_CODE}"'.encode() in file.read_bytes():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and settings.pop(_CODE, None) is not None:
            return _write_json(to, settings)
    shutil.copyfile(file, to)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
