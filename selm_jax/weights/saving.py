"""Writes parameters as safetensors in Hugging Face's names, one tensor at a time, from any mesh."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params
from selm_jax.weights.files import MAX_SHARD_BYTES, part_of, stored_like, write
from selm_jax.weights.multimodal import Around
from selm_jax.weights.names import Tensor, stored_axes, stored_tensors, whole_shape


def save(
    params: Params,
    config: DecoderConfig,
    folder: Path | None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    inside: Around | None = None,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Writes the parameters into `folder` as safetensors, in their own dtypes, from any mesh.

    It writes one file, or several of at most `max_shard_bytes` of data with an index. Tensors are
    streamed: one tensor of one layer is on the host at a time. If the parameters are sharded over
    several processes, all of them have to call this; those that do not write pass None for
    `folder`, and process i of n that each write some of the files passes (i, n) for `part`. With
    `inside`, a multi-modal checkpoint is written, with these parameters as its text model.
    """
    if folder is None:
        for _ in to_hf_tensors(params, config, lambda name: False):
            continue
        return
    flat = _flat(params)
    entries = {
        name: stored_like(whole_shape(parts), flat[parts[0].path].dtype)
        for names, _, parts in stored_tensors(config)
        for name in names
    }
    stored = {name: name for name in entries} if inside is None else inside.stored
    entries = {stored[name]: like for name, like in entries.items()}
    if inside is not None:
        entries |= inside.aside
    only = part_of(entries, part, max_shard_bytes)
    values = to_hf_tensors(params, config, lambda name: stored[name] in only)
    others = () if inside is None else inside.tensors(only)
    values = itertools.chain(((stored[n], x) for n, x in values), others)
    write(folder, entries, values, max_shard_bytes=max_shard_bytes, only=only)


def to_hf_tensors(
    params: Params, config: DecoderConfig, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields (name, tensor) in Hugging Face's names and layouts, in a fixed order.

    If the parameters are sharded over several processes, each of them has to iterate over all. It
    gets None for a tensor that is not `wanted`, which it helps to gather for another process.
    """
    flat = _flat(params)
    for names, layer, parts in stored_tensors(config):
        if not any(map(wanted, names)):
            jax.block_until_ready([_gathered(flat[row.path], row.at(layer)) for row in parts])
            yield from ((name, None) for name in names)
            continue
        ours = [fetch(flat[row.path], row.at(layer)).reshape(-1, *row.shape) for row in parts]
        for expert, name in enumerate(names):
            found = [_to_theirs(x[expert], row) for x, row in zip(ours, parts, strict=True)]
            yield name, _joined(found, parts)


def _joined(found: list[np.ndarray], parts: list[Tensor]) -> np.ndarray:
    """Joins the parameters that one stored tensor holds."""
    if len(found) == 1:
        return found[0]
    if parts[0].of > 1:
        return np.stack(found, axis=-1).reshape(whole_shape(parts))
    return np.concatenate(found)


def _flat(params: Params) -> dict[tuple[str, ...], jax.Array]:
    return cast(Any, flatten_dict(params))


def fetch(x: jax.Array, at: int | None) -> np.ndarray:
    """Copies a parameter, or one layer of a stacked one, to the host, gathered from all processes.

    It fetches a temporary copy, because a JAX array keeps a host copy once it was fetched.
    """
    return np.asarray(_gathered(x, at))


def _gathered(x: jax.Array, at: int | None) -> jax.Array:
    everywhere = None
    if not x.is_fully_addressable:
        assert isinstance(x.sharding, NamedSharding)
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
    if at is None:
        return _copier(everywhere)(x)
    return _taker(everywhere)(x, at)


@lru_cache(maxsize=16)
def _copier(out: Sharding | None):
    return jax.jit(jnp.copy, out_shardings=out)


@lru_cache(maxsize=16)
def _taker(out: Sharding | None):
    take = partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)
    return jax.jit(take, out_shardings=out)


def _to_theirs(x: np.ndarray, row: Tensor) -> np.ndarray:
    order = [axis for axes in stored_axes(row) for axis in axes]
    return np.ascontiguousarray(x.transpose(order).reshape(row.stored_shape))
