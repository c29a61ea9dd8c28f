"""Rotary position embeddings."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotations(
    positions: Int[Array, "rows time"], head_dim: int, theta: float
) -> tuple[Float[Array, "rows time 1 half"], Float[Array, "rows time 1 half"]]:
    """Cosines and sines of the angle of each position and frequency.

    Always float32: in bfloat16 position 257 would be 256.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "rows time heads head_dim"],
    rotation: tuple[Float[Array, "rows time 1 half"], Float[Array, "rows time 1 half"]],
) -> Float[Array, "rows time heads head_dim"]:
    """Turns the pairs (x[i], x[i + half]) by their angles (the layout of Hugging Face weights)."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
