"""GGUF in, Hugging Face folder out: one llama checkpoint as plain float32 safetensors.

A GGUF file holds weights (often quantised), hyperparameters and the tokenizer in one file. `convert`
reads all three and writes what transformers, vLLM and this package read: config.json,
generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja and
model.safetensors. Only what is known to come out right is converted; the rest is refused by name.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from jaxtyping import Float32

from selm_jax.weights.gguf_file import Fields, GGUFError, open_gguf
from selm_jax.weights.gguf_tokenizer import SPECIAL_IDS, build_tokenizer, tokenizer_config

__all__ = ["CONVERTER_VERSION", "GGUFError", "convert"]

CONVERTER_VERSION = 1
"""Part of a cached folder's name: raise it whenever the same GGUF file would give other bytes."""

_SPARE_BYTES = 64 << 20  # tokenizer files, and room for the disk to breathe

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_path: str | Path, out_folder: str | Path) -> Path:
    """Write the Hugging Face folder of a GGUF file, whole or not at all.

    The folder is built beside `out_folder` and renamed when complete. Where `out_folder` already
    exists (another process was quicker), that folder is kept. One tensor is in memory at a time.

    Args:
      gguf_path: a llama-architecture GGUF file with a byte-level BPE tokenizer.
      out_folder: the folder to make; its parents are made too.

    Returns:
      `out_folder`.

    Raises:
      GGUFError: damaged file, or an architecture, tensor, tensor type or tokenizer not known here.
      FileNotFoundError: no such file.
      OSError: with errno ENOSPC where the disk is too full; nothing is left behind.
    """
    path, out = Path(gguf_path), Path(out_folder)
    reader = open_gguf(path)
    fields = Fields(path, reader)
    config = _llama_config(fields, reader)
    tensors = _named_tensors(path, reader, config)
    tokenizer = build_tokenizer(fields)

    needed = sum(4 * int(np.prod(shape)) for _, _, shape in tensors) + _SPARE_BYTES
    with _whole_folder(out, needed) as folder:
        _write_json(folder / "config.json", config)
        ids = {k: v for k, v in config.items() if k.endswith("_token_id")}
        _write_json(folder / "generation_config.json", ids)
        _write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
        _write_json(folder / "tokenizer_config.json", tokenizer_config(fields, config))
        template = fields.get("tokenizer.chat_template", str)
        if template is not None:
            _write_text(folder / "chat_template.jinja", template)
        _write_safetensors(folder / "model.safetensors", path, tensors, config)
    return out


# --- config.json ------------------------------------------------------------------------------


def _llama_config(fields: Fields, reader: GGUFReader) -> dict[str, Any]:
    architecture = fields.need("general.architecture", str)
    if architecture != "llama":
        raise GGUFError(
            f"{fields.path}: architecture {architecture!r}; only 'llama' is converted here. "
            "Get the model as a Hugging Face folder (safetensors) instead"
        )
    for key in reader.fields:
        # Read past any of these and the model would run, and be wrong.
        if key.startswith(("llama.rope.scaling", "llama.expert")):
            raise GGUFError(f"{fields.path}: key {key}: scaled rope and experts are not converted")

    hidden, heads = fields.size("llama.embedding_length"), fields.size("llama.attention.head_count")
    kv_heads = heads
    if "llama.attention.head_count_kv" in reader.fields:
        kv_heads = fields.size("llama.attention.head_count_kv")
    head_dim = fields.get("llama.attention.key_length", int) or hidden // heads
    if heads % kv_heads or head_dim % 2 or head_dim == 0:
        raise GGUFError(
            f"{fields.path}: {heads} heads, {kv_heads} key/value heads, head size {head_dim}: "
            "the first must be a multiple of the second and the size even"
        )
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.get(key, int) not in (None, head_dim):
            raise GGUFError(
                f"{fields.path}: key {key} is {fields.get(key, int)}, the head size is {head_dim}; "
                "only equal sizes (rope over the whole head) are converted"
            )
    theta = 10000.0  # llama.cpp's default where the key is absent
    if "llama.rope.freq_base" in reader.fields:
        theta = fields.number("llama.rope.freq_base")

    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": fields.size("llama.feed_forward_length"),
        "max_position_embeddings": fields.size("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields.size("llama.block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": fields.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": theta,
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors),
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": len(fields.texts("tokenizer.ggml.tokens")),
    }
    if config["num_hidden_layers"] > len(reader.tensors):
        raise GGUFError(
            f"{fields.path}: key llama.block_count is {config['num_hidden_layers']}, but the file "
            f"holds only {len(reader.tensors)} tensors"
        )
    for name, key in SPECIAL_IDS.items():
        token_id = fields.get(key, int)
        if token_id is None:
            if name in ("bos", "eos"):
                raise GGUFError(f"{fields.path}: key {key} is missing")
            continue
        if not 0 <= token_id < config["vocab_size"]:
            raise GGUFError(f"{fields.path}: key {key} is {token_id}, outside the vocabulary")
        if name != "unk":
            config[f"{name}_token_id"] = token_id
    return config


# --- model.safetensors ------------------------------------------------------------------------

_Named = tuple[str, ReaderTensor, tuple[int, ...]]


def _named_tensors(path: Path, reader: GGUFReader, config: dict[str, Any]) -> list[_Named]:
    """Every tensor with its Hugging Face name and shape, checked: none missing, none unknown."""
    expected = _expected_shapes(config)
    found: dict[str, _Named] = {}
    for tensor in reader.tensors:
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        name = _TOP_NAMES.get(tensor.name)
        if layer and layer[2] in _LAYER_NAMES:
            name = f"model.layers.{int(layer[1])}.{_LAYER_NAMES[layer[2]]}.weight"
        if name not in expected or name in found:
            raise GGUFError(
                f"{path}: tensor {tensor.name} has no place in a llama model of "
                f"{config['num_hidden_layers']} layers"
            )
        # GGUF lists the fastest-running dimension first, numpy and safetensors last.
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != expected[name]:
            raise GGUFError(
                f"{path}: tensor {tensor.name} has shape {shape}, "
                f"the file's own settings ask for {expected[name]}"
            )
        found[name] = (name, tensor, shape)
    if missing := sorted(expected.keys() - found.keys()):
        raise GGUFError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return [found[name] for name in expected]


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    rows_q = config["num_attention_heads"] * config["head_dim"]
    rows_kv = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (rows_q, hidden),
        "attn_k": (rows_kv, hidden),
        "attn_v": (rows_kv, hidden),
        "attn_output": (hidden, rows_q),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        for short, shape in layer.items():
            shapes[f"model.layers.{i}.{_LAYER_NAMES[short]}.weight"] = shape
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _write_safetensors(
    target: Path, path: Path, tensors: list[_Named], config: dict[str, Any]
) -> None:
    """Stream the tensors out one by one: safetensors' own writer wants them all in memory.

    Format: 8 bytes of header length (little endian), a JSON header, then the raw tensors.
    https://huggingface.co/docs/safetensors/index#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this mark
    offset = 0
    for name, _, shape in tensors:
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the tensors then start on a multiple of 8
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    with target.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, tensor, shape in tensors:
            values = _plain(path, tensor).reshape(shape)
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                values = _unpermute(values, heads[kind])
            file.write(np.ascontiguousarray(values, dtype="<f4").data)
        _sync(file)


def _plain(path: Path, tensor: ReaderTensor) -> Float32[np.ndarray, ...]:
    try:
        with np.errstate(all="ignore"):  # damaged numbers are reported below, by name
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise GGUFError(
            f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}, "
            f"which cannot be turned into float32 here: {error}"
        ) from error
    if not np.isfinite(values).all():
        raise GGUFError(f"{path}: tensor {tensor.name} holds NaN or infinity: the file is damaged")
    return values


def _unpermute(
    values: Float32[np.ndarray, "rows columns"], heads: int
) -> Float32[np.ndarray, "rows columns"]:
    """Rows of a query or key projection, from llama.cpp's order back to Hugging Face's.

    Rope turns pairs of rows. Hugging Face pairs row i with row i + head_dim / 2 of the same head;
    llama.cpp's converter interleaves them (2i with 2i + 1) for the llama architecture.
    """
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


# --- writing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole_folder(out: Path, needed: int) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` on success and is removed otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free on this disk",
            str(out.parent),
        )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".incoming-") as work:
        folder = Path(work) / out.name
        folder.mkdir()
        yield folder
        try:
            os.rename(folder, out)
        except OSError as error:
            # A folder with files in it stands there already: the other process won the race.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        _sync(file)


def _sync(file: Any) -> None:
    """Reach the disk before the rename does: a power cut must not leave a whole-looking folder."""
    file.flush()
    os.fsync(file.fileno())
