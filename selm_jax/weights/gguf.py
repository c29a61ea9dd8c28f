"""Converts a GGUF file of llama.cpp into a Hugging Face folder with float32 safetensors.

A GGUF file contains weights (often quantised), hyperparameters and the tokenizer. `convert` reads
all three and writes the files that transformers, vLLM and this package read: config.json,
generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja and
safetensors. It converts only what is known to be converted correctly; anything else is an error
that names it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from selm_jax.shell.leftovers import INCOMING
from selm_jax.weights import files
from selm_jax.weights.gguf_file import MEND, Fields, Gguf, GGUFError, open_gguf
from selm_jax.weights.gguf_model import named_tensors, read_config
from selm_jax.weights.gguf_tokenizer import build_tokenizer, eos_ids, tokenizer_config

__all__ = ["CONVERTER_VERSION", "TYPES", "GGUFError", "convert"]

CONVERTER_VERSION = 1
"""Part of a cached folder's name: raise it whenever the same GGUF file would give other bytes."""

TYPES = (
    Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0,
    Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.MXFP4,
)  # fmt: skip
"""The supported tensor types; a test compares each with its definition."""

_SPARE_BYTES = 64 << 20  # for tokenizer files, and some reserve


def convert(gguf_path: str | Path, out_folder: str | Path) -> Path:
    """Converts a GGUF file into a Hugging Face folder, completely or not at all.

    The folder is built beside `out_folder` and renamed when complete. If `out_folder` already
    exists (another process was quicker), that folder is kept. One tensor is in memory at a time.

    Args:
      gguf_path: a GGUF file of an architecture in `gguf_families.FAMILIES`; or any one file of a
        model that is split into several.
      out_folder: the folder to make; its parents are created too.

    Returns:
      `out_folder`.

    Raises:
      GGUFError: if a file is damaged or missing, or an architecture, tensor, tensor type or
        tokenizer is not supported.
      FileNotFoundError: if there is no such file.
      OSError: with errno ENOSPC if there is not enough free space; nothing is left behind.
    """
    path, out = Path(gguf_path), Path(out_folder)
    model = open_gguf(path)
    fields = Fields(path, model)
    _check_types(model)
    config = read_config(fields, model)
    tensors = named_tensors(path, model, config)
    tokenizer = build_tokenizer(fields)

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for named in tensors:
            yield named.name, named.numbers(model.file_of)

    entries = {named.name: files.stored_like(named.shape, np.float32) for named in tensors}
    needed = sum(entry.bytes for entry in entries.values()) + _SPARE_BYTES
    with _whole_folder(out, needed) as folder:
        _write_json(folder / "config.json", config)
        ids = {k: v for k, v in config.items() if k.endswith("_token_id")}
        _write_json(folder / "generation_config.json", ids | eos_ids(fields))
        _write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
        _write_json(folder / "tokenizer_config.json", tokenizer_config(fields, config))
        template = fields.get("tokenizer.chat_template", str)
        if template is not None:
            _write_text(folder / "chat_template.jinja", template)
        files.write(folder, entries, values())
    return out


# --- numbers ----------------------------------------------------------------------------------


def _check_types(model: Gguf) -> None:
    for tensor in model.tensors:
        if tensor.tensor_type not in TYPES:
            raise GGUFError(
                f"{model.file_of[tensor.name]}: tensor {tensor.name} has the type "
                f"{tensor.tensor_type.name}, which is not supported; supported are "
                f"{', '.join(t.name for t in TYPES)}. {MEND}"
            )


# --- writing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole_folder(out: Path, needed: int) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `out` on success and removed on failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e6:.0f} MB are needed, but only {free / 1e6:.0f} MB are free on this disk",
            str(out.parent),
        )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=INCOMING) as work:
        folder = Path(work) / out.name
        folder.mkdir()
        yield folder
        try:
            os.rename(folder, out)
        except OSError as error:
            # There already is a folder with files: another process was quicker.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        _sync(file)


def _sync(file: Any) -> None:
    """Flushes the file to disk, so that the renamed folder is complete even after a power cut."""
    file.flush()
    os.fsync(file.fileno())
