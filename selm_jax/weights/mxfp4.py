"""Reads tensors that are stored in mxfp4 as bfloat16: the experts of the published gpt-oss files.

The format (OCP Microscaling Formats 1.0, sections 5.2 and 6.3): 32 numbers of four bits, each a
sign and one of eight values, share a scale, a power of two in a byte. A tensor is stored as two:
`..._blocks` has 16 bytes for each 32 numbers, where each byte holds two numbers, the first in its
lower half, and `..._scales` has one byte. Every such number is exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from selm_jax.weights.files import Checkpoint, Stored, WeightsError

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32  # numbers that share a scale

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=-1)  # of a byte
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


def in_full(packed: Checkpoint) -> Checkpoint:
    """Makes a checkpoint that has each tensor in mxfp4 under its own name, as if in bfloat16.

    Raises:
      WeightsError: if a tensor has blocks without scales, or their shapes do not match.
    """
    names = packed_tensors(packed)
    return _InFull(packed, names) if names else packed


def packed_tensors(checkpoint: Checkpoint) -> list[str]:
    """Lists the tensors that a checkpoint stores in mxfp4, by their own names."""
    return [n.removesuffix(_BLOCKS) for n in checkpoint.tensors if n.endswith(_BLOCKS)]


class _InFull(Checkpoint):
    """A checkpoint whose tensors in mxfp4 are decoded as they are read."""

    def __init__(self, packed: Checkpoint, names: Sequence[str]):
        self._packed, self.folder = packed, packed.folder
        self.tensors, self.file_of = dict(packed.tensors), dict(packed.file_of)
        for name in names:
            self.tensors[name] = _stored(packed, name)
            self.file_of[name] = self.file_of[name + _BLOCKS]
            for suffix in (_BLOCKS, _SCALES):
                del self.tensors[name + suffix], self.file_of[name + suffix]
        # A checkpoint keeps the rows of the tensor that it read last, which several devices may
        # want. Blocks and scales are read in turn, so the scales have a checkpoint of their own.
        self._of_scales = packed.renamed({name + _SCALES: name + _SCALES for name in names})

    def read(self, name: str, cuts: Sequence[slice] = ()) -> np.ndarray:
        """Returns the part of a tensor that the slices select."""
        if name in self._packed.tensors:
            return self._packed.read(name, cuts)
        experts, inputs, outputs = (*cuts, *(slice(None),) * (3 - len(cuts)))
        begin, end, _ = inputs.indices(self.tensors[name].shape[1])
        first = begin // _BLOCK
        cuts = experts, outputs, slice(first, -(-end // _BLOCK))
        blocks = self._packed.read(name + _BLOCKS, cuts)
        scales = self._of_scales.read(name + _SCALES, cuts)
        within = slice(begin - first * _BLOCK, end - first * _BLOCK)
        # One expert at a time, because the numbers are in float32 for a moment.
        decoded = [decode(*each)[:, within].T for each in zip(blocks, scales, strict=True)]
        return np.stack(decoded)

    def bytes_of(self, name: str) -> UInt8[np.ndarray, " bytes"]:
        """Returns the bytes of a tensor, decoded if it is stored in mxfp4."""
        if name in self._packed.tensors:
            return self._packed.bytes_of(name)
        return np.ascontiguousarray(self.read(name)).reshape(-1).view(np.uint8)


def decode(
    blocks: UInt8[np.ndarray, "outputs blocks 16"], scales: UInt8[np.ndarray, "outputs blocks"]
) -> np.ndarray:
    """Decodes a matrix in mxfp4 to numbers in bfloat16, [outputs, 32 * blocks].

    The scale 255 makes NaN, as the format has it. A number too large for bfloat16 is infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # who reads weights refuses such numbers
        values = _PAIRS[blocks] * _POWERS[scales][..., None, None]
    return values.astype(ml_dtypes.bfloat16).reshape(len(blocks), -1)


def _stored(packed: Checkpoint, name: str) -> Stored:
    """Returns the shape [experts, inputs, outputs] of a tensor that blocks and scales hold."""
    blocks = packed.tensors[name + _BLOCKS]
    scales = packed.tensors.get(name + _SCALES)
    fits = len(blocks.shape) == 4 and blocks.shape[-1] == _BLOCK // 2
    if not fits or scales != Stored(blocks.shape[:-1], "U8") or blocks.dtype != "U8":
        raise WeightsError(
            f"{packed.folder}: {name}{_BLOCKS} is {blocks}, and {name}{_SCALES} is {scales}; mxfp4 "
            "has bytes of shape [experts, outputs, blocks, 16], and [experts, outputs, blocks]. "
            "Get the files again"
        )
    experts, outputs, count, _ = blocks.shape
    return Stored((experts, _BLOCK * count, outputs), "BF16")
