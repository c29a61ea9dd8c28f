"""Compares rules for which prompts to ask about, in all landscapes and conditions of `compare`.

Each round draws plain online DPO's pairs for a pool of prompts. A rule chooses which of the pairs
are labelled, and plain DPO is fitted to them. The rules are those of `preferences.acquisition`, as
functions of arrays; `random` is the control. A second control, `random_distinct`, shows how much of
a rule's gain comes only from avoiding pairs of two equal responses, whose label says nothing.
Queries, worlds and random numbers are equal, and a pair costs nothing until it is labelled.

    random           the first pairs of the pool, which was drawn at random
    random_distinct  the first pairs of the pool that have two different responses
    reward_gap       the pairs whose implicit rewards differ most. arXiv 2402.08114
    entropy          the pairs whose response of the policy is the least likely. arXiv 2402.08114
    d_optimal        the pairs whose last-layer features say most together. arXiv 2503.01076
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from selm_jax.lab import exact, stats
from selm_jax.lab.algorithms import Length, Settings
from selm_jax.lab.compare import LENGTH, PLACES, SHAPE, Place
from selm_jax.lab.many import ASSUMED, keys
from selm_jax.lab.rounds import Examples, draw, label, mean_loss, minimise
from selm_jax.lab.stats import Record
from selm_jax.lab.worlds import LANDSCAPES, Table, World, WorldShape, make_world
from selm_jax.objectives.losses import dpo

POOL = 16  # pairs, of which a round labels as many as `Length.queries` says

Values = Float[Array, " pool"]
Asked = Int[Array, " queries"]


class Pool(NamedTuple):
    """Holds what a rule sees: pairs that may be labelled, and the two policies that wrote them."""

    log_policy: Table
    log_reference: Table
    prompt: Int[Array, " pool"]
    first: Int[Array, " pool"]  # the policy's response
    second: Int[Array, " pool"]  # the reference's
    difference: Float[Array, "pool features"]  # of the features of the two


def highest(values: Values, queries: int) -> Asked:
    """The indices of the highest values; of equal ones the first, which in a pool is any."""
    return jnp.argsort(-values, stable=True)[:queries]


def random(pool: Pool, queries: int) -> Asked:
    """The control: the indices [queries] of the pool's first pairs, which are random as it is."""
    return highest(jnp.zeros(len(pool.prompt)), queries)


def random_distinct(pool: Pool, queries: int) -> Asked:
    """The second control: the indices [queries] of the first pairs of two different responses.

    Pairs of two equal ones come after them, if there are too few others.
    """
    return highest((pool.first != pool.second).astype(jnp.float32), queries)


def reward_gap(pool: Pool, queries: int) -> Asked:
    """The indices [queries] of the pairs whose implicit rewards differ most; the largest first.

    Source: Muldrew et al. (2024), arXiv 2402.08114, preference certainty. The gap is that of
    log(policy / reference), the implicit reward divided by beta.
    """
    ratio = pool.log_policy - pool.log_reference
    gap = ratio[pool.prompt, pool.first] - ratio[pool.prompt, pool.second]
    return highest(jnp.abs(gap), queries)


def entropy(pool: Pool, queries: int) -> Asked:
    """The indices [queries] of the pairs whose response of the policy is the least likely.

    Source: arXiv 2402.08114, predictive entropy: the mean of -log policy over the policy's own
    samples, of which a pair has one.
    """
    return highest(-pool.log_policy[pool.prompt, pool.first], queries)


def d_optimal(pool: Pool, queries: int) -> Asked:
    """Chooses, one after another, the pair that raises log det(I + sum x x^T) most.

    Source: arXiv 2503.01076. x are the pairs' differences of features, divided by their root mean
    square. The result are indices [queries], in the order of choice.
    """
    mean_square = jnp.mean(pool.difference**2)
    x = pool.difference / jnp.sqrt(jnp.maximum(mean_square, jnp.finfo(pool.difference.dtype).tiny))

    def step(carry, _):
        inverse, left = carry
        i = jnp.argmax(jnp.where(left, jnp.sum((x @ inverse) * x, axis=-1), -jnp.inf))
        v = inverse @ x[i]
        inverse = inverse - jnp.outer(v, v) / (1 + x[i] @ v)  # Sherman and Morrison
        return (inverse, left.at[i].set(False)), i

    start = jnp.eye(x.shape[-1], dtype=x.dtype), jnp.ones(len(x), bool)
    return jax.lax.scan(step, start, None, queries)[1]


CONTROLS: tuple[Callable[[Pool, int], Asked], ...] = (random, random_distinct)
RULES = (*CONTROLS, reward_gap, entropy, d_optimal)
NAMES = tuple(rule.__name__ for rule in RULES)
COMPARED = tuple(  # each rule with each control that stands before it
    (name, control.__name__) for i, control in enumerate(CONTROLS) for name in NAMES[i + 1 :]
)


@flax.struct.dataclass
class Entry:
    """A rule in a place, as numbers, with which one program runs them all.

    Attributes:
      rule: an index of `RULES`; the others are those of `contest.Entry`.
    """

    landscape: Any
    coverage: Any
    temperature: Any
    assumed: Any
    moving: Any
    rule: Any

    @classmethod
    def of(cls, place: Place, rule: str) -> Entry:
        return cls(
            landscape=jnp.asarray(LANDSCAPES.index(place.landscape), jnp.int32),
            coverage=jnp.asarray(place.coverage, jnp.float32),
            temperature=jnp.asarray(place.temperature, jnp.float32),
            assumed=jnp.asarray(place.temperature or ASSUMED, jnp.float32),
            moving=jnp.asarray(place.moving, jnp.float32),
            rule=jnp.asarray(NAMES.index(rule), jnp.int32),
        )


def drawn(
    key: Key[Array, "3"], world: World, log_policy: Table, log_reference: Table, size: int
) -> Pool:
    """Draws a pool: prompts of the world, a response of the policy and one of the reference."""
    prompt = jax.random.categorical(key[0], jnp.log(world.prompts), shape=(size,))
    first, second = draw(key[1], log_policy[prompt]), draw(key[2], log_reference[prompt])
    features = world.features
    if features is None:  # a table: a feature for each response to each prompt
        features = jnp.eye(log_policy.size).reshape(*log_policy.shape, -1)
    difference = features[prompt, first] - features[prompt, second]
    return Pool(log_policy, log_reference, prompt, first, second, difference)


def run(
    key: Key[Array, ""], world: World, entry: Entry, length: Length, size: int
) -> Float[Array, " rounds"]:
    """The regret after each round of a rule in a world. Equal keys give equal noise."""
    settings = Settings(temperature=entry.temperature, assumed=entry.assumed)
    nothing = jnp.zeros(length.rounds * length.queries, jnp.int32)
    empty = Examples(nothing, nothing, nothing, nothing, jnp.zeros(nothing.shape))

    def ask(key, log_policy, log_reference):
        split = jax.random.split(key, 5)
        pool = drawn(split[:3], world, log_policy, log_reference, size)
        rules = [lambda pool, rule=rule: rule(pool, length.queries) for rule in RULES]
        of = jax.lax.switch(entry.rule, rules, pool)
        prompt, pair = pool.prompt[of], jnp.stack([pool.first[of], pool.second[of]], axis=-1)
        chosen, rejected = label(split[3:], world, settings, prompt, pair)
        return Examples(prompt, chosen, rejected, pair[:, 1], jnp.ones(length.queries))

    def one_round(carry, t):
        theta, log_reference, data = carry
        new = ask(jax.random.fold_in(key, t), world.log_policy(theta), log_reference)
        at = (t * length.queries,)
        data = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, at), data, new)

        def cost(theta):
            tables = world.log_policy(theta) / entry.assumed, log_reference / entry.assumed
            return mean_loss(dpo(world.beta), *tables, data)

        theta = minimise(cost, theta, world, settings, length.steps)
        log_policy = world.log_policy(theta)
        log_reference = jnp.where(entry.moving > 0, log_policy, log_reference)
        return (theta, log_reference, data), exact.regret(world, log_policy)

    start = jnp.zeros(world.dimension), world.log_reference, empty
    return jax.lax.scan(one_round, start, jnp.arange(length.rounds))[1]


@functools.cache
def program(shape: WorldShape, length: Length, size: int) -> Callable[..., Any]:
    """The compiled function of a shape: (key, which worlds [seeds], entry) -> [seeds, rounds]."""

    def one(key, which, entry):
        world_key, run_key = keys(key, which)
        world = make_world(world_key, shape, entry.landscape, entry.coverage)
        return run(run_key, world, entry, length, size)

    return jax.jit(jax.vmap(one, in_axes=(None, 0, None)))


def compare(
    seeds: int,
    seed: int = 0,
    *,
    shape: WorldShape = SHAPE,
    length: Length = LENGTH,
    size: int = POOL,
    places: Sequence[Place] = PLACES,
) -> Iterator[list[Record]]:
    """Yields, for each place, the rules' records against both controls, not yet corrected."""
    key, which = jax.random.key(seed), jnp.arange(seeds)
    for place in places:
        of_place = WorldShape(shape.prompts, shape.responses, place.dimension, shape.beta)
        one = program(of_place, length, size)
        regret = {name: np.asarray(one(key, which, Entry.of(place, name))) for name in NAMES}
        yield [
            _record(name, control, place, regret[name], regret[control])
            for name, control in COMPARED
        ]


def correct(records: Sequence[Record]) -> list[Record]:
    """Adds Holm-corrected p-values; the comparisons with each control are a family of their own."""
    families = [against(records, control.__name__) for control in CONTROLS]
    return [r for family in families for r in stats.correct(family)]


def against(records: Sequence[Record], control: str) -> list[Record]:
    """The records that compare a rule with this control."""
    return [r for r in records if r["control"] == control]


def _record(name: str, control: str, place: Place, regret: np.ndarray, base: np.ndarray) -> Record:
    last = regret[:, -1].mean(dtype=np.float64) / base[:, -1].mean(dtype=np.float64) - 1
    return {
        "effect": "best",
        "arm": name,
        "control": control,
        "landscape": place.landscape,
        "condition": place.condition,
        **stats.compare(regret.sum(-1, dtype=np.float64), base.sum(-1, dtype=np.float64)),
        "last": float(last),
    }
