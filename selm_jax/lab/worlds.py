"""Makes worlds: prompts with a few listed responses, a reference policy and a true reward.

The policy class of a world is log-linear around its reference,

    log pi(y|x) = log pi_ref(y|x) + features(x, y) . theta - log Z(x)

so theta = 0 is the reference. Features are shared by all prompts; a tabular world has one parameter
per (prompt, response). The true reward is always inside the class (the paper's Assumption 5.2):
theta_star, whose policy is the KL-regularised optimum, is known.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Table = Float[Array, "prompts responses"]
Scalar = Float[Array, ""]

LANDSCAPES = ("two_peaks", "needle", "smooth", "random")


@flax.struct.dataclass
class World:
    """A small bandit problem: prompts, a reference policy, the true reward and a policy class.

    If `features` is None, the policy class is tabular.
    """

    prompts: Float[Array, " prompts"]  # probabilities
    log_reference: Table
    reward: Table  # in [0, 1]
    features: Float[Array, "prompts responses dimension"] | None
    theta_star: Float[Array, " dimension"]
    good: Table  # 1 on the responses whose reward is highest, 0 elsewhere
    beta: float = flax.struct.field(pytree_node=False)

    @property
    def dimension(self) -> int:
        return self.theta_star.shape[-1]

    def log_policy(self, theta: Float[Array, " dimension"]) -> Table:
        """Returns log pi(y|x) at theta, normalised over each prompt's responses."""
        shape = self.log_reference.shape
        tilt = theta.reshape(shape) if self.features is None else self.features @ theta
        return jax.nn.log_softmax(self.log_reference + tilt, axis=-1)


@dataclasses.dataclass(frozen=True)
class WorldShape:
    """The sizes of a world, static under jit: each shape needs one compilation.

    Attributes:
      prompts, responses: how many there are.
      dimension: of the shared features; None means tabular.
      beta: strength of the KL penalty, in units of reward.
    """

    prompts: int = 4
    responses: int = 16
    dimension: int | None = None
    beta: float = 0.1

    def __post_init__(self):
        if min(self.prompts, self.responses, self.dimension or 1) < 1 or self.beta <= 0:
            raise ValueError(f"{self}: sizes must be at least 1 and beta must be positive")


def make_world(
    key: Key[Array, ""],
    shape: WorldShape,
    landscape: int | Int[Array, ""] | str = "two_peaks",
    coverage: float | Scalar = 0.05,
) -> World:
    """Makes a random world of the given shape and reward landscape.

    Each prompt's responses are on a ring, and the reference is centred at a random place of it. The
    good responses are the sixteenth with the highest reward; `coverage` is the total probability
    that the reference gives to them. `landscape` is a name of `LANDSCAPES` or its index, with which
    one program can compute all of them.
    """
    if isinstance(landscape, str) and landscape not in LANDSCAPES:
        raise ValueError(f"landscape is {landscape!r}; expected one of {LANDSCAPES}")
    index = LANDSCAPES.index(landscape) if isinstance(landscape, str) else landscape
    places, logits, reward_key, features_key = jax.random.split(key, 4)
    at = jnp.arange(shape.responses) / shape.responses
    centre = jax.random.uniform(places, (shape.prompts, 1))
    reward = landscapes(reward_key, at, centre)[index]

    base = 3 * _bump(at, centre, 0.12) + 0.5 * _noise(logits, reward.shape)
    order = jnp.argsort(jnp.argsort(-reward, axis=-1), axis=-1)
    good = (order < max(1, shape.responses // 16)).astype(reward.dtype)
    log_reference = jnp.where(
        good > 0,
        jax.nn.log_softmax(jnp.where(good > 0, base, -jnp.inf)) + jnp.log(coverage),
        jax.nn.log_softmax(jnp.where(good > 0, -jnp.inf, base)) + jnp.log1p(-coverage),
    )
    features, theta_star = _features(features_key, reward, shape)
    return World(
        prompts=jnp.full(shape.prompts, 1 / shape.prompts),
        log_reference=log_reference,
        reward=reward,
        features=features,
        theta_star=theta_star,
        good=good,
        beta=shape.beta,
    )


def landscapes(
    key: Key[Array, ""], at: Float[Array, " responses"], centre: Float[Array, "prompts 1"]
) -> Float[Array, "landscapes prompts responses"]:
    """Rewards in [0, 1] of responses on a ring, one table per name in `LANDSCAPES`.

    The reference is at `centre`.
    two_peaks: a broad peak of 0.6 under the reference, a narrow one of 1 on the other side;
    needle: 1 on the other side, 0 elsewhere; smooth: three random waves; random: independent.
    """
    far = (centre + 0.5) % 1
    shifted = _nearest(at, far)
    two_peaks = jnp.maximum(0.6 * _bump(at, centre, 0.1), _bump(shifted, far, 0.05))
    needle = (_bump(shifted, far, 0.05) > 0.999).astype(at.dtype)
    waves = jnp.arange(1, 4)[:, None, None]
    phase, size = jax.random.uniform(key, (2, 3, len(centre), 1))
    smooth = jnp.sum(size / waves * jnp.sin(2 * jnp.pi * (waves * at + phase)), axis=0)
    random = _noise(key, (len(centre), len(at)))
    return jnp.stack([two_peaks, needle, _to_unit(smooth), _to_unit(random)])


def _to_unit(height: Table) -> Table:
    low, high = (f(height, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    return (height - low) / (high - low)


def _nearest(at: Array, target: Array) -> Array:
    """Shifts the responses' positions so that the response nearest the target is exactly there."""
    gap = (at - target + 0.5) % 1 - 0.5
    closest = jnp.argmin(jnp.abs(gap), axis=-1, keepdims=True)
    return at - jnp.take_along_axis(gap, closest, axis=-1)


def _bump(at: Array, centre: Array, width: float) -> Array:
    distance = jnp.abs((at - centre + 0.5) % 1 - 0.5)
    return jnp.exp(-0.5 * (distance / width) ** 2)


def _noise(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """Draws uniform random numbers of unit variance.

    With normal numbers, or with an array that is not drawn flat, compiling this would take XLA
    longer than compiling the rest of a run.
    """
    flat = jax.random.uniform(key, (math.prod(shape),), minval=-(3**0.5), maxval=3**0.5)
    return flat.reshape(shape)


def _features(key, reward, shape: WorldShape):
    """Makes random features that span the reward, and theta_star, the optimal policy's parameters.

    One column is the reward and the others are noise, all of unit variance. All are then reflected
    in a random plane, so that no coordinate is special. |features(x, y)| is about 1, as in a
    tabular world.
    """
    centred = reward - jnp.mean(reward)
    if shape.dimension is None:
        return None, (reward - jnp.mean(reward, -1, keepdims=True)).reshape(-1) / shape.beta
    deviation = jnp.std(centred)
    column, mirror = jax.random.split(key)
    noise = _noise(column, (*reward.shape, shape.dimension - 1))
    columns = jnp.concatenate([(centred / deviation)[..., None], noise], axis=-1)
    v = _noise(mirror, (shape.dimension,))
    v = v / jnp.linalg.norm(v)
    scale = shape.dimension**0.5
    features = (columns - 2 * (columns @ v)[..., None] * v) / scale
    first = jnp.zeros(shape.dimension).at[0].set(1.0)
    return features, (first - 2 * v[0] * v) * scale * deviation / shape.beta
