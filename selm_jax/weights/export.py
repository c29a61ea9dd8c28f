"""Exports a policy as a Hugging Face folder that transformers, vLLM and lm-eval can load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params
from selm_jax.models.families import reward_model_json, text_model_json
from selm_jax.models.multimodal import is_multimodal
from selm_jax.weights import multimodal
from selm_jax.weights.files import (
    DTYPES,
    MAX_SHARD_BYTES,
    Checkpoint,
    WeightsError,
    open_checkpoint,
    stored_like,
    write,
)
from selm_jax.weights.folder import IMAGES, carried, links_out
from selm_jax.weights.mxfp4 import packed_tensors
from selm_jax.weights.saving import save

# The key with which the JSON files of a folder refer to Python code in the folder.
_CODE = "auto_map"
_QUANTIZED = "quantization_config"
_DTYPES = "dtype", "torch_dtype"


def export_folder(
    params: Params,
    config: DecoderConfig,
    source: Path,
    folder: Path | None,
    card: str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    keep_vision: bool = True,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Writes weights, config, tokenizer and model card into `folder`, which must not exist.

    The config is that of the source model; only the dtype of the weights is changed and, for a
    reward model, the keys that describe its head. The key `auto_map`, which refers to code, is
    removed: no code is exported, and none is needed. So is `quantization_config`, because the
    weights are exported in full; the model card says so.

    If the source model is multi-modal, its other tensors are copied byte for byte, or the text
    model is written alone.

    Args:
      params: the parameters.
      config: the model's config.
      source: the Hugging Face folder that training started from.
      folder: None for processes that only contribute their shards of the parameters.
      card: the text of README.md.
      max_shard_bytes: the most bytes of data in one safetensors file.
      keep_vision: whether an export from a multi-modal source is the whole model. A reward model is
        always its text model alone.
      part: (i, n) in process i of n, each of which writes some of the files of weights; all else is
        written by process 0.

    Raises:
      WeightsError: if a file to be copied is a link to a file outside `source`.
    """
    inside = None
    if folder is not None and keep_vision and config.head is None and multimodal.is_in(source):
        inside = multimodal.around(source)
    if folder is not None and part[0] == 0:
        change = partial(_json_of, config=config, whole=inside is not None)
        dtype = str(params["embedding"].dtype)
        _write_folder(source, folder, dtype, change)
        (folder / "README.md").write_text(card + _precision(source, dtype), encoding="utf-8")
    save(params, config, folder, max_shard_bytes=max_shard_bytes, inside=inside, part=part)


def _precision(source: Path, dtype: str) -> str:
    """Writes the model card's sentences on weights that are quantised in `source`, if any are.

    A copy in full may have kept `quantization_config`, so the tensors are what counts.
    """
    if not packed_tensors(open_checkpoint(source)):
        return ""
    return (
        "\n## Precision\n\nThe start model stores a part of its weights in mxfp4. "
        f"These are all in {dtype}, and need more memory.\n"
    )


def _json_of(hf: Mapping[str, Any], config: DecoderConfig, whole: bool) -> Mapping[str, Any]:
    """The config.json to export for a model that started from one with the config.json `hf`."""
    if config.head is not None:
        return reward_model_json(hf, config.head.pad)
    return hf if whole else text_model_json(hf)


def convert_dtype(
    source: Path, folder: Path, dtype: str, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Copies the model in `source` to the new folder `folder`, converting its weights to `dtype`.

    This is for models that leave a run. Within a run, weights keep the dtype of training, because
    the next iteration starts from them and updates may be too small for bfloat16.

    Args:
      source: the folder to read.
      folder: the folder to write.
      dtype: "float32", "bfloat16" or "float16".
      max_shard_bytes: the most bytes of data in one safetensors file.

    Raises:
      WeightsError: if `source` is incomplete, or the dtype is not one of these.
    """
    kinds = {np.dtype(known).name: np.dtype(known) for known in DTYPES.values()}
    if dtype not in kinds:
        raise WeightsError(f"dtype is {dtype!r}; expected one of {', '.join(kinds)}")
    kind = kinds[dtype]
    checkpoint = open_checkpoint(source)
    entries = {  # a multi-modal model may have whole numbers, such as positions: they stay
        n: stored_like(t.shape, kind) if t.dtype in DTYPES else t
        for n, t in checkpoint.tensors.items()
    }
    _write_folder(source, folder, dtype)
    if (source / "README.md").exists():
        shutil.copyfile(source / "README.md", folder / "README.md")
    values = ((name, _narrowed(checkpoint, name, kind)) for name in entries)
    write(folder, entries, values, max_shard_bytes=max_shard_bytes)


def _narrowed(checkpoint: Checkpoint, name: str, kind: np.dtype) -> np.ndarray:
    if checkpoint.tensors[name].dtype not in DTYPES:
        return checkpoint.bytes_of(name)
    with np.errstate(over="ignore"):  # reported below with the tensor's name
        found = checkpoint.read(name).astype(kind)
    if not np.isfinite(found).all():
        raise WeightsError(
            f"{checkpoint.folder}: {name} contains numbers too large for {kind.name}, or NaN or "
            "infinity; export as bfloat16 or float32"
        )
    return found


def _write_folder(
    source: Path,
    folder: Path,
    dtype: str,
    change: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf: hf,
) -> None:
    """Writes all files of the folder except the weights and the model card."""
    read = json.loads((source / "config.json").read_text(encoding="utf-8"))
    hf = dict(change(read))
    if wrong := links_out(source):
        raise WeightsError(f"{source}: {'; '.join(wrong)}")
    folder.mkdir(parents=True)
    text_alone = is_multimodal(read) and not is_multimodal(hf)
    for name in carried(source):
        if text_alone and name in IMAGES:
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        _copy(source / name, folder / name)
    for key in (_CODE, _QUANTIZED):
        hf.pop(key, None)
    # transformers 5 writes `dtype`, earlier versions and other tools `torch_dtype`; all read both.
    for key in [key for key in _DTYPES if key in hf] or ["torch_dtype"]:
        hf[key] = dtype
    if text := hf.get("text_config"):
        hf["text_config"] = text | {key: dtype for key in _DTYPES if key in text}
    _write_json(folder / "config.json", hf)


def _copy(file: Path, to: Path) -> None:
    """Copies a file, and removes the key `auto_map` if the file is JSON."""
    if file.suffix == ".json" and f'"{_CODE}"'.encode() in file.read_bytes():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and settings.pop(_CODE, None) is not None:
            return _write_json(to, settings)
    shutil.copyfile(file, to)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
