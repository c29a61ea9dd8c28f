"""The attention mask of a row, as one integer per key.

In a row of packed prompt trees (`preferences.packing`) the queries that see a key are adjacent:
they begin with the key's own token and end with its segment, if the key belongs to the prompt, or
with its branch otherwise. So one integer per key is the whole mask:

    q sees k   iff   k <= q < end[k]                          q and k: places in the row
               and   position[q] - position[k] < window       in a layer that has a window

The drawing shows two examples: the first has responses a and b, the second c; the last place is
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
from jaxtyping import Array, Bool, Int


class Sight(NamedTuple):
    """Which keys each query sees in one layer, as drawn at the top of the module.

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
        """The boolean mask that these integers describe."""
        keys = jnp.arange(self.key_position.shape[1])
        place = keys[None] if self.place is None else self.place
        seen = keys <= place[:, :, None]
        if self.end is not None:
            seen &= place[:, :, None] < self.end[:, None, :]
        if self.window is not None:
            ago = self.position[:, :, None] - self.key_position[:, None, :]
            seen &= ago < self.window
        return seen
