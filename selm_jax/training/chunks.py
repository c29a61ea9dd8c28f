"""Finds the files of a checkpoint that hold the shards of this process.

Without a common folder, orbax writes each array as a folder: `.zarray` says how the array is cut
into chunks, and the file `i.j` is the chunk in row i and column j of that grid. A process that
restores its shards reads only the chunks that these overlap.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

Index = tuple[slice, ...]
_ARRAY = "/.zarray"


def small(files: Iterable[str]) -> set[str]:
    """The files, by relative path, that are no chunks: what arrays there are, and their grids."""
    files = set(files)
    return {
        name for name in files if _array_of(name) + _ARRAY not in files or name.endswith(_ARRAY)
    }


def chunks(folder: Path, files: Iterable[str], like: Any) -> set[str]:
    """The chunks that this process reads to restore arrays with the shardings of `like`.

    Of an array that `like` does not have by this name, or without a sharding, it is all chunks.

    Args:
      folder: the checkpoint, whose small files are there.
      files: all its files, by relative path.
      like: a tree of arrays or abstract arrays.
    """
    files = set(files)
    leaves: Mapping[str, Any] = ocp.tree.to_flat_dict(ocp.tree.serialize_tree(like), sep=".")
    needed = files - small(files)
    for name in {_array_of(file) for file in needed}:
        sharding = getattr(leaves.get(name), "sharding", None)
        if sharding is not None:
            grid = json.loads((folder / f"{name}{_ARRAY}").read_text(encoding="utf-8"))
            shape, parts, between = grid["shape"], grid["chunks"], grid["dimension_separator"]
            mine = {
                f"{name}/{between.join(map(str, at)) or '0'}"
                for index in _indices(sharding, tuple(shape))
                for at in overlapped(index, shape, parts)
            }
            needed = {file for file in needed if _array_of(file) != name} | mine
    return needed


def overlapped(
    index: Index, shape: Sequence[int], parts: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """The positions in the grid of chunks that a part of an array overlaps.

    Args:
      index: a slice for each axis.
      shape: of the array.
      parts: the shape of a chunk.
    """
    ranges = []
    for cut, size, part in zip(index, shape, parts, strict=True):
        start, stop, _ = cut.indices(size)
        ranges.append(range(start // part, -(-stop // part)))
    return itertools.product(*ranges)


def _indices(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[Index]:
    """The parts of an array that the devices of this process hold."""
    return [
        index
        for index in sharding.addressable_devices_indices_map(shape).values()
        if index is not None
    ]


def _array_of(file: str) -> str:
    return file.rpartition("/")[0]
