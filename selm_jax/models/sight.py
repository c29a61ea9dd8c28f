"""The attention mask of a row, as one integer per key.

In a row of packed prompt trees (`preferences.packing`) the queries that see a key are adjacent:
they begin with the key's own token and end with its segment, if the key belongs to the prompt, or
with its branch otherwise. So one integer per key is the whole mask:

    q sees k   iff   k <= q < end[k]                          q and k: indices in the row
               and   position[q] - position[k] < window       in a layer that has a window

The drawing shows two examples: the first has responses a and b, the second c; the last column is
padding:

                 p0 p1 p2 a0 a1 b0 b1 q0 c0  .
        end       7  7  7  5  5  7  7  9  9  0
        p0        x
        p1        x  x
        p2        x  x  x
        a0        x  x  x  x
        a1        x  x  x  x  x
        b0        x  x  x        x
        b1        x  x  x        x  x
        q0                             x
        c0                             x  x
        .

Source: FlashMask's column-wise mask (arXiv 2410.01359). Letters: r rows, t queries, s keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class Sight(NamedTuple):
    """The attention mask of one layer: which keys each query sees, as drawn at the top.

    Attributes:
      position: position of each query along its own path, [r, t].
      key_position: position of each key along its own path, [r, s] or [1, s].
      end: one past the last query that sees each key, [r, s]; None if all later queries see it.
      place: index of each query among the keys, [r, t]; None if queries and keys are the same
        tokens.
      window: number of positions that a query sees, including its own, []; None for all.
    """

    position: Int[Array, "r t"]
    key_position: Int[Array, "#r s"]
    end: Int[Array, "r s"] | None = None
    place: Int[Array, "r t"] | None = None
    window: Int[Array, ""] | None = None

    def mask(self) -> Bool[Array, "#r t s"]:
        """The boolean mask, computed from the integers of this object."""
        keys = jnp.arange(self.key_position.shape[1])
        place = keys[None] if self.place is None else self.place
        seen = keys <= place[:, :, None]
        if self.end is not None:
            seen &= place[:, :, None] < self.end[:, None, :]
        if self.window is not None:
            ago = self.position[:, :, None] - self.key_position[:, None, :]
            seen &= ago < self.window
        return seen

    def padded(self, block: int) -> Sight:
        """A copy with an `end` for every key, padded to whole blocks with keys that no query sees.

        Queries and keys must be the same tokens (`place` is None).
        """
        end = jnp.full_like(self.position, self.position.shape[1]) if self.end is None else self.end
        key_position = jnp.broadcast_to(self.key_position, self.position.shape)
        position, key_position, end = (
            whole_blocks(x, block) for x in (self.position, key_position, end)
        )
        return Sight(position, key_position, end, window=self.window)

    def meeting(self, block: int) -> Meeting:
        """Finds which blocks of queries see which blocks of keys, in a mask that `padded` made."""
        assert self.end is not None
        rows, time = self.position.shape
        i, j = np.tril_indices(time // block)
        ends, of_queries, of_keys = (
            x.reshape(rows, -1, block) for x in (self.end, self.position, self.key_position)
        )
        some = ends.max(2)[:, j] > i * block
        every = (ends.min(2)[:, j] >= (i + 1) * block) & (i > j)
        if self.window is not None:
            some &= of_queries.min(2)[:, i] - of_keys.max(2)[:, j] < self.window
            every &= of_queries.max(2)[:, i] - of_keys.min(2)[:, j] < self.window
        return Meeting(i, j, some, every)


class Meeting(NamedTuple):
    """The p block pairs (a query block and a key block) on or below the diagonal of a mask.

    Attributes:
      queries, keys: index of each pair's query block and key block.
      some: whether any query of the pair may see any of its keys.
      every: whether every query of the pair sees all of its keys.
    """

    queries: Int[np.ndarray, " p"]
    keys: Int[np.ndarray, " p"]
    some: Bool[Array, "r p"]
    every: Bool[Array, "r p"]


def whole_blocks(x: Array, block: int) -> Array:
    """Pads [r, t, ...] with zeros along t, to a multiple of the block size."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
