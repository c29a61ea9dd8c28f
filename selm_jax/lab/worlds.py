"""Makes worlds: prompts with a few listed responses, a reference policy and a true reward.

The policy class of a world is log-linear around its reference,

    log pi(y|x) = log pi_ref(y|x) + features(x, y) . theta - log Z(x)

so theta = 0 is the reference. Features are shared by all prompts; a tabular world has one parameter
per (prompt, response). The true reward is always inside the class (the paper's Assumption 5.2):
theta_star, whose policy is the KL-regularised optimum, is known.

Feedback compares two responses by `payoff(y, y') = r(y) - r(y') + cross(turn(y), turn(y'))`. The
second part is 0 in all landscapes but `cyclic`, where three responses beat each other in a circle,
so no reward explains the preferences. The optimum there is the von Neumann winner; see `exact`.
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

LANDSCAPES = ("two_peaks", "needle", "smooth", "random", "wrong", "cyclic")
REWARDED = LANDSCAPES[:4]  # those of the first experiments


@flax.struct.dataclass
class World:
    """A small bandit problem: prompts, a reference policy, the true reward and a policy class.

    If `features` is None, the policy class is tabular.
    """

    prompts: Float[Array, " prompts"]  # probabilities
    log_reference: Table
    reward: Table  # in [0, 1]
    turn: Float[Array, "prompts responses 2"]  # the cyclic part of preferences, 0 without one
    balance: Float[Array, "prompts 2"]  # the mean turn under the optimum
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
    good responses are the sixteenth with the highest reward (in `cyclic`, the three of the circle);
    `coverage` is the total probability that the reference gives to them. `landscape` is a name of
    `LANDSCAPES` or its index, with which one program can compute all of them.
    """
    if isinstance(landscape, str) and landscape not in LANDSCAPES:
        raise ValueError(f"landscape is {landscape!r}; expected one of {LANDSCAPES}")
    index = LANDSCAPES.index(landscape) if isinstance(landscape, str) else landscape
    places, logits, reward_key, features_key = jax.random.split(key, 4)
    at = jnp.arange(shape.responses) / shape.responses
    centre = jax.random.uniform(places, (shape.prompts, 1))
    reward = landscapes(reward_key, at, centre)[index]
    cyclic, wrong = (index == LANDSCAPES.index(name) for name in ("cyclic", "wrong"))
    turn = jnp.where(cyclic, _circle(at, centre), 0.0)

    sharpness = jnp.where(wrong, 6, 3)
    base = sharpness * _bump(at, centre, 0.12) + 0.5 * _noise(logits, reward.shape)
    order = jnp.argsort(jnp.argsort(-reward, axis=-1), axis=-1)
    best = jnp.where(cyclic, _CYCLE, max(1, shape.responses // 16))
    good = (order < best).astype(reward.dtype)
    log_reference = jnp.where(
        good > 0,
        jax.nn.log_softmax(jnp.where(good > 0, base, -jnp.inf)) + jnp.log(coverage),
        jax.nn.log_softmax(jnp.where(good > 0, -jnp.inf, base)) + jnp.log1p(-coverage),
    )
    balance = _winner(log_reference, reward, turn, shape.beta)
    aim = reward + cross(turn, balance[:, None])
    features, theta_star = _features(features_key, aim, shape)
    return World(
        prompts=jnp.full(shape.prompts, 1 / shape.prompts),
        log_reference=log_reference,
        reward=reward,
        turn=turn,
        balance=balance,
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
    needle: 1 on the other side, 0 elsewhere; smooth: three random waves; random: independent;
    wrong: the distance from the centre, where the reference is sharper than elsewhere, so it is
    confident of the worst responses; cyclic: 1 for three on the other side, which beat each other
    in a circle, and 0.6 under the reference.
    """
    far = (centre + 0.5) % 1
    shifted = _nearest(at, far)
    two_peaks = jnp.maximum(0.6 * _bump(at, centre, 0.1), _bump(shifted, far, 0.05))
    needle = (_bump(shifted, far, 0.05) > 0.999).astype(at.dtype)
    waves = jnp.arange(1, 4)[:, None, None]
    phase, size = jax.random.uniform(key, (2, 3, len(centre), 1))
    smooth = jnp.sum(size / waves * jnp.sin(2 * jnp.pi * (waves * at + phase)), axis=0)
    random = _noise(key, (len(centre), len(at)))
    distance = jnp.abs((at - centre + 0.5) % 1 - 0.5)
    cyclic = jnp.maximum(0.6 * _bump(at, centre, 0.1), _farthest(at, centre) < _CYCLE)
    return jnp.stack(
        [two_peaks, needle, _to_unit(smooth), _to_unit(random), _to_unit(distance), cyclic]
    )


def cross(first: Array, second: Array) -> Array:
    """The cross product of vectors in the plane: by how much the first beats the second."""
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


_CYCLE = 3  # the responses of the circle


def _farthest(at: Array, centre: Array) -> Array:
    """The rank of each response by its distance from the point opposite to the centre."""
    gap = jnp.abs((_nearest(at, (centre + 0.5) % 1) - centre) % 1 - 0.5)
    return jnp.argsort(jnp.argsort(gap, axis=-1), axis=-1)


def _circle(at: Array, centre: Array) -> Float[Array, "prompts responses 2"]:
    """Places three responses on a circle, so that each beats the next by a payoff of 1."""
    rank = _farthest(at, centre)
    angle = 2 * jnp.pi * rank / _CYCLE
    length = jnp.sqrt(1 / jnp.sin(2 * jnp.pi / _CYCLE))
    return jnp.where(
        (rank < _CYCLE)[..., None],
        length * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1),
        0.0,
    )


def _winner(
    log_reference: Table, reward: Table, turn: Float[Array, "prompts responses 2"], beta: float
) -> Float[Array, "prompts 2"]:
    """The mean turn of the optimum of the KL-regularised game, by damped Newton steps.

    The optimum pi is the best response to itself: pi ~ pi_ref exp((r + cross(turn, m)) / beta) with
    m the mean turn under pi. That is an equation in two numbers for each prompt, with one solution,
    because the game is strictly monotone; its Jacobian has a determinant of at least 1.
    """

    def step(m, _):
        p = jax.nn.softmax(log_reference + (reward + cross(turn, m[:, None])) / beta, axis=-1)
        mean = jnp.sum(p[..., None] * turn, axis=1)
        off = turn - mean[:, None]
        xx, xy, yy = (
            jnp.sum(p * off[..., i] * off[..., j], axis=-1) / beta
            for i, j in ((0, 0), (0, 1), (1, 1))
        )
        fx, fy = (mean - m).T
        det = 1 - xy**2 + xx * yy
        change = jnp.stack([(1 - xy) * fx + xx * fy, (1 + xy) * fy - yy * fx], -1)
        return m + 0.5 * change / det[:, None], None

    return jax.lax.scan(step, jnp.zeros((len(reward), 2), reward.dtype), None, 40)[0]


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
