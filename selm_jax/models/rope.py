"""Rotary position embeddings, with or without scaling for long contexts, and growing queries."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from selm_jax.models.config import (
    Growth,
    Linear,
    Llama3,
    LongRope,
    Proportional,
    Rope,
    RotaryPairs,
    Yarn,
)

Rotation = tuple[Float[Array, "rows time 1 half"], Float[Array, "rows time 1 half"]]


def frequencies(rope: Rope, rotated: int) -> Float32[np.ndarray, " half"]:
    """Radians per position of each pair of dimensions, in float32 as in the published models.

    Args:
      rope: the settings.
      rotated: how many dimensions of a head are rotated.
    """
    exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
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
        case Proportional(share, factor):
            kept = np.arange(len(plain)) < int(share * rotated // 2)
            return np.where(kept, plain / np.float32(factor), np.float32(0))
        case Yarn() as yarn:
            divided = _yarn_ramp(yarn, rope.theta, rotated)
            return divided * (plain / np.float32(yarn.factor)) + (1 - divided) * plain


def _yarn_ramp(yarn: Yarn, theta: float, rotated: int) -> Float32[np.ndarray, " half"]:
    """How far each frequency is divided: 0 for fast ones, 1 for slow ones, linear in between."""

    def pair_turning(times: float) -> float:
        """The index, not rounded, of the pair that turns so often within the original context."""
        wavelength = yarn.original / (times * 2 * math.pi)
        return rotated * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_turning(yarn.fast), pair_turning(yarn.slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    width = last - first or 0.001  # as in the published models, for a step
    pairs = np.arange(rotated // 2, dtype=np.float32)
    return np.clip((pairs - np.float32(first)) / np.float32(width), 0, 1)


def rotations(positions: Int[Array, "rows time"], rope: Rope | None, rotated: int) -> Rotation:
    """Cosines and sines of the angle of each position and frequency.

    They are always float32: in bfloat16 position 257 would become 256. Without rope the angle is 0.
    """
    if rope is None:
        angle = jnp.zeros((*positions.shape, 1, rotated // 2), jnp.float32)
    else:
        angle = positions[..., None, None].astype(jnp.float32) * frequencies(rope, rotated)
    magnitude = 1.0
    if rope is not None and isinstance(rope.scaling, LongRope | Yarn):
        magnitude = rope.scaling.magnitude
    return magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)


def growth(of: Growth, positions: Int[Array, "rows time"]) -> Float32[Array, "rows time 1 1"]:
    """The factor of each query."""
    steps = jnp.floor(positions[..., None, None].astype(jnp.float32) / of.every)
    return 1 + of.rate * jnp.log1p(steps)


def rotate(
    x: Float[Array, "rows time heads head_dim"],
    rotation: Rotation,
    pairs: RotaryPairs = "halves",
) -> Array:
    """Rotates pairs of dimensions by their angles, as Hugging Face weights expect.

    If there are more dimensions than the angles need, the rest stay as they are.

    Args:
      pairs: which dimensions form a pair: (i, i + half), or (2 i, 2 i + 1).
    """
    cos, sin = rotation
    half = cos.shape[-1]
    rotated, rest = jnp.split(x.astype(jnp.float32), (2 * half,), axis=-1)
    if pairs == "neighbours":
        a, b = rotated[..., ::2], rotated[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(rotated.shape)
    else:
        a, b = jnp.split(rotated, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)
