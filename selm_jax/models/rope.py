"""Rotary position embeddings, with or without scaling for long contexts."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from selm_jax.models.config import Linear, Llama3, LongRope, Rope

Rotation = tuple[Float[Array, "rows time 1 half"], Float[Array, "rows time 1 half"]]


def frequencies(rope: Rope, head_dim: int) -> Float32[np.ndarray, " half"]:
    """Radians per position of each pair of dimensions, in float32 as in the published models."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1) / np.float32(rope.theta) ** exponent
    match rope.scaling:
        case None:
            return plain
        case Linear(factor):
            return plain / np.float32(factor)
        case LongRope(short, long, extended=extended):
            return plain / np.array(long if extended else short, np.float32)
        case Llama3(factor, low, high, original):
            wavelength = np.float32(2 * math.pi) / plain
            # 0 for low frequencies, 1 for high ones, and linear in between.
            kept = (original / wavelength - low) / (high - low)
            kept = np.clip(kept, 0, 1).astype(np.float32)
            return (1 - kept) * plain / np.float32(factor) + kept * plain


def rotations(positions: Int[Array, "rows time"], rope: Rope | None, head_dim: int) -> Rotation:
    """Cosines and sines of the angle of each position and frequency.

    They are always float32: in bfloat16 position 257 would become 256. Without rope the angle is 0.
    """
    if rope is None:
        angle = jnp.zeros((*positions.shape, 1, head_dim // 2), jnp.float32)
    else:
        angle = positions[..., None, None].astype(jnp.float32) * frequencies(rope, head_dim)
    magnitude = 1.0
    if rope is not None and isinstance(rope.scaling, LongRope):
        magnitude = rope.scaling.magnitude
    return magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)


def rotate(x: Float[Array, "rows time heads head_dim"], rotation: Rotation) -> Array:
    """Rotates the pairs (x[i], x[i + half]) by their angles, as Hugging Face weights expect."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
