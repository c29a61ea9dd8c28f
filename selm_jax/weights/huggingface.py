"""Hugging Face folders of safetensors <-> the parameter tree, one tensor at a time.

`TENSORS` is the whole map. Both directions use the same row, so they cannot disagree. Our kernels
are [in, out] with heads as an axis of their own; Hugging Face's are [out, in].
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from selm_jax.models.decoder import Params, abstract_params
from selm_jax.models.families import DecoderConfig


class WeightsError(ValueError):
    """The tensors in a folder are not those of the model that its config.json describes."""


class Tensor(NamedTuple):
    """One row of the map: our path, their name (`{}` is the layer), and whether to transpose.

    `inputs` is how many leading axes of our kernel are its inputs; a kernel is flattened to
    [inputs, outputs] and transposed. None keeps the tensor as it is.
    """

    path: tuple[str, ...]
    name: str
    inputs: int | None


TENSORS = (
    Tensor(("embedding",), "model.embed_tokens.weight", None),
    Tensor(("unembedding",), "lm_head.weight", None),
    Tensor(("norm", "scale"), "model.norm.weight", None),
    Tensor(("layers", "attention_norm", "scale"), "model.layers.{}.input_layernorm.weight", None),
    Tensor(("layers", "mlp_norm", "scale"), "model.layers.{}.post_attention_layernorm.weight", None),
    Tensor(("layers", "attention", "q"), "model.layers.{}.self_attn.q_proj.weight", 1),
    Tensor(("layers", "attention", "k"), "model.layers.{}.self_attn.k_proj.weight", 1),
    Tensor(("layers", "attention", "v"), "model.layers.{}.self_attn.v_proj.weight", 1),
    Tensor(("layers", "attention", "o"), "model.layers.{}.self_attn.o_proj.weight", 2),
    Tensor(("layers", "mlp", "gate"), "model.layers.{}.mlp.gate_proj.weight", 1),
    Tensor(("layers", "mlp", "up"), "model.layers.{}.mlp.up_proj.weight", 1),
    Tensor(("layers", "mlp", "down"), "model.layers.{}.mlp.down_proj.weight", 1),
)  # fmt: skip
_BY_PATH = {row.path: row for row in TENSORS}


def load(
    folder: Path,
    config: DecoderConfig,
    *,
    dtype: Any = np.float32,
    place: Callable[[tuple[str, ...], np.ndarray], jax.Array] | None = None,
) -> Params:
    """Reads the parameters of the model in `folder`.

    Args:
      place: puts one finished parameter on the devices, given its path; by default on the default
        device. No more than one stacked parameter is in host memory at a time.

    Raises:
      WeightsError: tensors missing, unknown or of the wrong shape (all of them are listed), or a
        file that is not whole.
    """
    expected = _expected(config)
    place = place or (lambda path, x: jax.device_put(x))
    with _reader(Path(folder)) as (read, shapes):
        _check_names(folder, expected, config, shapes)
        params = {}
        for path, leaf in expected.items():
            x = np.empty(leaf.shape, dtype)
            for layer, slot in _layers(path, x):
                slot[...] = _to_ours(read(_name(path, layer)), path, slot.shape)
            params[path] = place(path, x)
    return unflatten_dict(params)


def to_hf_tensors(params: Params, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) pairs in Hugging Face's names and layouts, in a fixed order."""
    flat = flatten_dict(params)
    for path in _expected(config):
        x = np.asarray(jax.device_get(flat[path]))
        for layer, slot in _layers(path, x):
            yield _name(path, layer), _to_theirs(slot, path)


def save(params: Params, config: DecoderConfig, file: Path) -> None:
    """Writes one safetensors file. The tensors are streamed: none is held twice.

    The format (https://github.com/huggingface/safetensors, "Format"): eight bytes of header length,
    little-endian; the header as JSON, padded with spaces to a multiple of eight; the data.
    """
    flat = flatten_dict(params)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for path in _expected(config):
        x = flat[path]
        count = config.layers if path[0] == "layers" else 1
        shape = x.shape[1:] if path[0] == "layers" else x.shape
        size = math.prod(shape) * x.dtype.itemsize
        for layer in range(count):
            header[_name(path, layer)] = {
                "dtype": _DTYPES[str(x.dtype)],
                "shape": list(_their_shape(shape, path)),
                "data_offsets": [offset, offset + size],
            }
            offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        # As bytes: bfloat16 is not a type of Python's buffers.
        f.writelines(tensor.view(np.uint8).data for _, tensor in to_hf_tensors(params, config))


_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def _expected(config: DecoderConfig) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    return cast(Any, flatten_dict(nn.unbox(abstract_params(config))))


def _name(path: tuple[str, ...], layer: int) -> str:
    return _BY_PATH[path].name.format(layer)


def _layers(path: tuple[str, ...], x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(layer, view of that layer's part); everything outside the layers counts as layer 0."""
    yield from enumerate(x) if path[0] == "layers" else [(0, x)]


def _their_shape(shape: tuple[int, ...], path: tuple[str, ...]) -> tuple[int, ...]:
    inputs = _BY_PATH[path].inputs
    if inputs is None:
        return shape
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def _to_ours(tensor: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    return tensor if _BY_PATH[path].inputs is None else tensor.T.reshape(shape)


def _to_theirs(x: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    if _BY_PATH[path].inputs is not None:
        out, *rest = _their_shape(x.shape, path)
        x = x.reshape(*rest, out).T
    return np.ascontiguousarray(x)  # safetensors' own writer does not look at strides


def _check_names(folder, expected, config: DecoderConfig, shapes: dict[str, tuple[int, ...]]):
    wanted = {}
    for path, leaf in expected.items():
        stacked = path[0] == "layers"
        shape = leaf.shape[1:] if stacked else leaf.shape
        for layer in range(config.layers if stacked else 1):
            wanted[_name(path, layer)] = _their_shape(shape, path)
    unknown = set(shapes) - set(wanted)
    if config.tied:  # some writers store the tied head a second time
        unknown.discard("lm_head.weight")
    problems = [f"missing: {n}" for n in wanted if n not in shapes]
    problems += [f"unknown: {n}" for n in sorted(unknown)]
    problems += [
        f"{n}: shape {shapes[n]}, config.json implies {shape}"
        for n, shape in wanted.items()
        if n in shapes and tuple(shapes[n]) != tuple(shape)
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightsError(f"{folder}: tensors do not match config.json:\n  {shown}{more}")


@contextlib.contextmanager
def _reader(folder: Path):
    """Yields (read one tensor by name, {name: shape}) over a single or an indexed checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            where = json.loads(index.read_text())["weight_map"]
            names = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise WeightsError(f"{index}: not an index of safetensors files ({e!r})") from e
    else:
        where, names = None, ["model.safetensors"]
    with contextlib.ExitStack() as stack:
        files = {}
        for name in names:
            if not (folder / name).exists():
                raise WeightsError(f"{folder}: {name} is missing")
            try:
                files[name] = stack.enter_context(safe_open(folder / name, framework="numpy"))
            except SafetensorError as e:
                raise WeightsError(f"{folder / name}: not a whole safetensors file ({e})") from e
        file_of = where or {key: names[0] for key in files[names[0]].keys()}
        for key, name in file_of.items():
            if key not in files[name].keys():
                raise WeightsError(
                    f"{index}: says that {key} is in {name}, which has no such tensor"
                )
        shapes = {k: tuple(files[f].get_slice(k).get_shape()) for k, f in file_of.items()}
        yield (lambda name: files[file_of[name]].get_tensor(name)), shapes
