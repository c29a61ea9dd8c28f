"""Reads Hugging Face folders of safetensors, one tensor at a time; `weights.saving` writes them.

`weights.names` maps our parameters to names and layouts of tensors.

When reading, each process reads only the bytes of its own shards. A parameter of all layers is one
stacked array, which is created on the devices and filled layer by layer, so that the host never has
more than one layer's tensor in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params
from selm_jax.models.families import read_config
from selm_jax.weights.files import (
    DTYPES,
    Checkpoint,
    WeightsError,
    refuse_not_finite,
)
from selm_jax.weights.multimodal import open_text
from selm_jax.weights.names import (
    Tensor,
    in_one_tensor,
    stored_axes,
    stored_tensors,
    tensors,
    whole_shape,
)
from selm_jax.weights.saving import save, to_hf_tensors

__all__ = ["WeightsError", "check", "checked_config", "load", "save", "to_hf_tensors"]

# Tables of frequencies that early versions of transformers stored with the parameters.
_LEFTOVER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def load(
    folder: Path,
    config: DecoderConfig,
    *,
    dtype: Any = np.float32,
    shardings: Any = None,
    fresh_head: bool = False,
) -> Params:
    """Reads the parameters of the model in `folder`, each directly into its shards.

    Args:
      folder: the model folder.
      config: the model's config.
      dtype: of the parameters; tensors stored with another dtype are cast on the devices.
      shardings: a tree of `NamedSharding`, like the parameters; None puts all on the first device.
      fresh_head: whether `folder` has a language model from which the reward model of `config`
        starts. Its unembedding is not read, and the head is zero: every text's reward is 0.

    Raises:
      WeightsError: if tensors are missing, unknown, of the wrong shape or dtype, or contain NaN or
        infinity (all are listed), or a file is missing or incomplete.
    """
    rows = tensors(config)
    checkpoint = open_text(folder)
    _check(checkpoint, dataclasses.replace(config, head=None) if fresh_head else config)
    if shardings is None:
        where = dict.fromkeys(rows, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        where = cast(dict[Any, Sharding], flatten_dict(shardings))
    stacked = {path: row.layers for path, row in rows.items() if row.layers is not None}
    shapes = tuple((len(these), *rows[path].layer_shape) for path, these in stacked.items())
    zeros = _zeros(shapes, np.dtype(dtype), tuple(where[path] for path in stacked))()
    params = dict(zip(stacked, zeros, strict=True))
    finite: list[
        tuple[list[str], jax.Array]
    ] = []  # fetched at the end, so that devices need not wait
    # Parameters of one stored tensor follow each other, because the checkpoint keeps the rows of
    # the tensor that it read last.
    for parts in in_one_tensor(config):
        for layer, row in itertools.product(parts[0].layers or (None,), parts):
            path = row.path
            if fresh_head and path == ("score",):
                (params[path],) = _zeros((row.shape,), np.dtype(dtype), (where[path],))()
                continue
            if layer is not None:
                params[path], is_finite = _fill(checkpoint, row, layer, params[path])
            else:
                x = _from_file(checkpoint, None, row, where[path])
                # A copy even if the dtype is right: on CPU the array may be a view of the file.
                params[path], is_finite = jax.block_until_ready(
                    _caster(np.dtype(dtype), where[path])(x)
                )
                x.delete()
            finite.append((row.names(layer), is_finite))
    bad = [_not_finite(checkpoint, names) for names, is_finite in finite if not is_finite]
    refuse_not_finite(checkpoint, itertools.chain(*bad))
    return unflatten_dict({path: params[path] for path in rows})


def check(folder: Path, config: DecoderConfig) -> None:
    """Checks that `load` can read the folder; reads only the headers of its files.

    Raises:
      WeightsError: as for `load`, except for NaN and infinity.
    """
    _check(open_text(folder), config)


def checked_config(folder: Path) -> DecoderConfig:
    """Reads the config of the model in a folder and checks that its tensors match.

    Use it before allocating anything by the sizes in config.json, which may be wrong.

    Raises:
      UnsupportedModel: if config.json cannot be read or describes an unsupported model.
      WeightsError: as for `check`.
    """
    config = read_config(folder)
    check(folder, config)
    return config


def _fill(
    checkpoint: Checkpoint, row: Tensor, layer: int, stack: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Reads a layer's parameter into the stacked array `stack`; returns (stack, is finite)."""
    x = _from_file(checkpoint, layer, row, _of_layer(stack.sharding))
    # Wait; otherwise the host would read ahead and keep in memory what devices have not yet taken.
    filled = jax.block_until_ready(_filler(stack.sharding)(stack, x, row.at(layer)))
    x.delete()
    return filled


def _from_file(
    checkpoint: Checkpoint, layer: int | None, row: Tensor, sharding: Sharding
) -> jax.Array:
    """Reads one layer's parameter onto the devices, in the stored dtype."""
    names = row.names(layer)
    stored = {DTYPES[checkpoint.tensors[name].dtype] for name in names}
    dtype = stored.pop() if len(stored) == 1 else np.float32  # which holds all of the others

    def part(index: Any) -> np.ndarray:
        bounds = [cut.indices(n)[:2] for cut, n in zip(index, row.layer_shape, strict=True)]
        if row.experts is None:
            return _read(checkpoint, names[0], row, tuple(bounds))
        these = names[slice(*bounds[0])]
        return np.stack(
            [_read(checkpoint, name, row, tuple(bounds[1:])).astype(dtype) for name in these]
        )

    return jax.make_array_from_callback(row.layer_shape, sharding, part, dtype=dtype)


def _read(
    checkpoint: Checkpoint, name: str, row: Tensor, bounds: tuple[tuple[int, int], ...]
) -> np.ndarray:
    """Reads part of a parameter as a view; `bounds` are (start, stop) for each of its axes.

    A stored axis may consist of several of our axes, flattened. The first of these can be cut in
    the file; the others are not contiguous there, so they are cut in memory.
    """
    groups = stored_axes(row)
    cuts = []
    for axes in groups:
        start, stop = bounds[axes[0]]
        inner = math.prod(row.shape[a] for a in axes[1:])
        first = 0 if cuts or row.of > 1 else row.first
        cuts.append(slice(first + start * inner, first + stop * inner))
    if row.of > 1:
        last = cuts[-1]
        cuts[-1] = slice(row.of * last.start + row.first, row.of * last.stop, row.of)
    sizes, rest = list(row.shape), [slice(*bound) for bound in bounds]
    for axis in (axes[0] for axes in groups):
        start, stop = bounds[axis]
        sizes[axis], rest[axis] = stop - start, slice(None)
    order = [axis for axes in groups for axis in axes]
    x = checkpoint.read(name, cuts).reshape([sizes[axis] for axis in order])
    return x.transpose(np.argsort(order))[tuple(rest)]


def _not_finite(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """Which of the tensors that make up one parameter contain NaN or infinity, if any does."""
    if len(names) == 1:
        return names
    return [n for n in names if not np.isfinite(checkpoint.read(n).astype(np.float32)).all()]


def _of_layer(stacked: Sharding) -> Sharding:
    """The sharding of one layer of a stacked parameter."""
    if not isinstance(stacked, NamedSharding):
        return stacked
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


def _of_scalar(sharding: Sharding) -> Sharding:
    """The sharding of a scalar computed from a parameter: replicated on the same devices.

    Every process can then read it, and all come to the same conclusion.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec())


@lru_cache(maxsize=16)
def _zeros(shapes: tuple[tuple[int, ...], ...], dtype: np.dtype, shardings: tuple[Sharding, ...]):
    """Returns a jitted function that makes arrays of zeros, each device only its own shards."""
    return jax.jit(
        lambda: tuple(jnp.zeros(shape, dtype) for shape in shapes), out_shardings=shardings
    )


@lru_cache(maxsize=256)
def _filler(sharding: Sharding):
    """Returns a jitted (stack, x, at) -> (stack with x at this index, whether x is finite).

    The stack is donated. The check costs one more pass over x on the devices.
    """

    def fill(stack, x, at):
        x = x.astype(stack.dtype)
        stack = jax.lax.dynamic_update_index_in_dim(stack, x, at, 0)
        return stack, jnp.isfinite(x).all()

    return jax.jit(fill, donate_argnums=0, out_shardings=(sharding, _of_scalar(sharding)))


@lru_cache(maxsize=256)
def _caster(dtype: np.dtype, sharding: Sharding):
    """Returns a jitted function x -> (a copy of x with this dtype, whether x is finite)."""

    def cast_to(x):
        x = x.astype(dtype)
        return jnp.copy(x), jnp.isfinite(x).all()

    return jax.jit(cast_to, out_shardings=(sharding, _of_scalar(sharding)))


def _check(checkpoint: Checkpoint, config: DecoderConfig) -> None:
    wanted = {n: whole_shape(parts) for names, _, parts in stored_tensors(config) for n in names}
    found = {n: t for n, t in checkpoint.tensors.items() if not _LEFTOVER.fullmatch(n)}
    unknown = set(found) - set(wanted)
    # Some tools write a copy of the embedding for tied models.
    if config.tied and checkpoint.same("lm_head.weight", "model.embed_tokens.weight"):
        unknown.discard("lm_head.weight")
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"unknown: {name}" for name in sorted(unknown)]
    for name in [name for name in wanted if name in found]:
        shape, dtype = found[name]
        if shape != wanted[name]:
            problems.append(f"{name}: shape {shape}, but config.json implies {wanted[name]}")
        if dtype not in DTYPES:
            problems.append(
                f"{name}: stored as {dtype}; only {', '.join(DTYPES)} are supported. A quantised "
                "checkpoint has to be dequantised first"
            )
    if "lm_head.weight" in unknown and config.tied:
        problems.append(
            "lm_head.weight: differs from model.embed_tokens.weight, although config.json has "
            "tie_word_embeddings"
        )
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightsError(
            f"{checkpoint.folder}: tensors do not match config.json:\n  {shown}{more}\n"
            "Get config.json and the weights of the same model"
        )
