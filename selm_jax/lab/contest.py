"""Runs any arm of `arms` in any world of one shape, in one compiled program.

The arm is data to the program: it switches between losses and samplers, so 22 methods with all of
their strengths cost one compilation. Rounds are those of `rounds`: pairs, feedback, descent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from selm_jax.lab import exact
from selm_jax.lab.algorithms import Length, Settings
from selm_jax.lab.arms import BENDS, REPLACES, SAMPLERS, Bend
from selm_jax.lab.many import keys
from selm_jax.lab.rounds import Examples, draw, label, logps, minimise
from selm_jax.lab.samplers import Pairs, Two
from selm_jax.lab.worlds import Scalar, Table, World, WorldShape, make_world
from selm_jax.objectives.losses import Logps, dpo
from selm_jax.objectives.roles import CHOSEN, EXPLORE, REJECTED

_CERTAIN = 50.0  # the score of a winner, and minus that of a loser: the label alone is known


@flax.struct.dataclass
class Entry:
    """An arm in a place, as numbers; one program runs them all.

    Attributes:
      landscape: an index of `worlds.LANDSCAPES`.
      coverage: the reference's probability of the good responses (`worlds.make_world`).
      temperature: of the Bradley-Terry feedback, in units of reward; at 0 the best always wins.
      assumed: the temperature that the learner assumes: the true one, or `many.ASSUMED` if it is 0.
      moving: 1 if the policy becomes the reference after each round, else 0.
      sampler: an index of `SAMPLERS`.
      many: 1 if four responses are ranked, else 0.
      bend, strength: indices of `BENDS` and their strengths, for the policy that samples and for
        the one that is judged; where they are equal, the policies are one.
    """

    landscape: Any
    coverage: Any
    temperature: Any
    assumed: Any
    moving: Any
    sampler: Any
    many: Any
    bend: Int[Array, "2"]
    strength: Float[Array, "2"]


class Outcome(NamedTuple):
    """The regret of the judged policy after each round, and the last round's mass on the best."""

    regret: Float[Array, " rounds"]
    good: Scalar


def seen(log_policy: Table, log_reference: Table, data: Examples) -> Logps:
    """Makes what a loss sees of labelled pairs: scores say who won, and nothing more.

    The bonus is the count bonus of y_e: 1 / sqrt(1 + how often the data have the response).
    """
    roles = {CHOSEN: data.chosen, REJECTED: data.rejected, EXPLORE: data.explore}
    found = logps(log_policy, log_reference, data.prompt, **roles)
    won = jnp.full(data.prompt.shape, _CERTAIN)
    scores = {
        CHOSEN: won,
        REJECTED: -won,
        EXPLORE: jnp.where(data.explore == data.chosen, won, -won),
    }
    rare = 1 / jnp.sqrt(1 + counts(data, log_policy)[data.prompt, data.explore])
    return found.replace(scores=scores, bonus=rare)


def counts(data: Examples, like: Table) -> Table:
    """Counts how often each response was compared."""
    zero = jnp.zeros_like(like)
    both = (data.chosen, data.rejected)
    return sum((zero.at[data.prompt, y].add(data.weight) for y in both), zero)


def mean_over(weight: Float[Array, " n"], losses: Float[Array, " n"]) -> Scalar:
    return jnp.sum(weight * losses) / jnp.sum(weight)


def bent(
    bend: Bend,
    world: World,
    assumed: Scalar,
    strength: Scalar,
    log_policy: Table,
    log_reference: Table,
    data: Examples,
) -> Scalar:
    """The loss of a bend at a strength; at strength 0 a term leaves DPO's."""
    tables = log_policy / assumed, log_reference / assumed
    if bend.kind == REPLACES:
        # Dividing by the strength flattens the loss; its square undoes that.
        further = seen(tables[0] / strength, tables[1] / strength, data)
        losses, _ = bend.make(world.beta, 0.0)(further)
        return strength**2 * mean_over(data.weight, losses)
    plain = mean_over(data.weight, dpo(world.beta)(seen(*tables, data))[0])
    read = (log_policy, log_reference) if bend.plain else tables
    if bend.explorer == "pair":
        weight, explored = data.weight, data
    else:
        prompts, responses = jnp.indices(log_policy.shape).reshape(2, -1)
        flat = jnp.full_like(log_reference, -jnp.log(log_reference.shape[-1]))
        explorer = log_reference if bend.explorer == "reference" else flat
        weight = (world.prompts[:, None] * jnp.exp(explorer)).reshape(-1)
        # A pair of a response with itself: what DPO says of it is a constant.
        explored = Examples(prompts, responses, responses, responses, weight)
    batch = seen(*read, explored)
    if bend.explorer != "pair":
        rare = 1 / jnp.sqrt(1 + counts(data, log_policy)).reshape(-1)
        batch = batch.replace(bonus=rare)
    one, none = (bend.make(world.beta, alpha)(batch)[0] for alpha in (1.0, 0.0))
    return plain + strength * mean_over(weight, one - none)


def ask(
    key: Key[Array, ""],
    world: World,
    settings: Settings,
    queries: int,
    pairs: Pairs,
    many: Scalar,
) -> Examples:
    """Draws a round's pairs from a sampler, and labels them."""
    split = jax.random.split(key, 8)
    prompt = jax.random.categorical(split[0], jnp.log(world.prompts), shape=(queries,))
    kind = (jax.random.uniform(split[3], (queries,)) < pairs.share[1, prompt]).astype(jnp.int32)
    rows = [table[kind, prompt] for table in (pairs.first, pairs.second)]
    drawn = [draw(k, row) for k, row in zip(split[4:], (*rows, *rows), strict=True)]
    candidates = jnp.stack(drawn, axis=-1)
    part = jnp.stack([jnp.ones_like(many), jnp.ones_like(many), many, many])
    chosen, rejected = label(split[1:3], world, settings, prompt, candidates, part)
    return Examples(prompt, chosen, rejected, candidates[:, 1], jnp.ones(queries))


def run(key: Key[Array, ""], world: World, entry: Entry, length: Length) -> Outcome:
    """Runs an arm on a world. Equal keys give equal noise, whatever the arm."""
    settings = Settings(temperature=entry.temperature, assumed=entry.assumed)
    places = length.rounds * length.queries
    nothing = jnp.zeros(places, jnp.int32)
    empty = Examples(nothing, nothing, nothing, nothing, jnp.zeros(places))

    def fit(theta, bend, strength, log_reference, data):
        def cost(theta):
            tables = world.log_policy(theta), log_reference
            branches = [
                functools.partial(bent, each, world, entry.assumed, strength) for each in BENDS
            ]
            return jax.lax.switch(bend, branches, *tables, data)

        return minimise(cost, theta, world, settings, length.steps)

    def one_round(carry, t):
        policies, log_reference, data = carry
        two = Two(world.log_policy(policies[0]), log_reference, world.beta / entry.assumed)
        pairs = jax.lax.switch(entry.sampler, SAMPLERS, two)
        new = ask(jax.random.fold_in(key, t), world, settings, length.queries, pairs, entry.many)
        at = (t * length.queries,)
        data = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, at), data, new)

        def one_fit(before, own):
            needed, theta, bend, strength = own
            found = jax.lax.cond(
                needed, lambda: fit(theta, bend, strength, log_reference, data), lambda: before
            )
            return found, found

        # A loop of two fits, of which the second is often not needed, compiles in half the time.
        fits = needed, policies, entry.bend, entry.strength
        _, policies = jax.lax.scan(one_fit, policies[0], fits)
        log_policy = world.log_policy(policies[1])
        log_reference = jnp.where(entry.moving > 0, log_policy, log_reference)
        found = exact.regret(world, log_policy), exact.mass_on_good(world, log_policy)
        return (policies, log_reference, data), found

    differ = (entry.bend[0] != entry.bend[1]) | (entry.strength[0] != entry.strength[1])
    needed = jnp.stack([jnp.array(True), differ])
    start = jnp.zeros((2, world.dimension)), world.log_reference, empty
    _, (regret, good) = jax.lax.scan(one_round, start, jnp.arange(length.rounds))
    return Outcome(regret, good[-1])


Program = Callable[[Key[Array, ""], Int[Array, " seeds"], Entry], Outcome]


@functools.cache
def program(shape: WorldShape, length: Length) -> Program:
    """The compiled function of a shape: an entry with some seeds, whose worlds are equal for all.

    A seed determines the world and all noise of a run, so entries can be compared seed by seed.
    """

    def one(key, which, entry):
        world_key, run_key = keys(key, which)
        world = make_world(world_key, shape, entry.landscape, entry.coverage)
        return run(run_key, world, entry, length)

    # A program of all losses is large; at this level it compiles faster, and runs as fast.
    options = {"xla_backend_optimization_level": 1}
    return jax.jit(jax.vmap(one, in_axes=(None, 0, None)), compiler_options=options)
