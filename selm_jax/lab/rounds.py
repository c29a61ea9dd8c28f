"""Runs an `Algorithm` on a `World`: rounds of sampling, feedback and fitting.

Feedback at temperature tau depends on rewards in units of tau: sigmoid((r1 - r2) / tau). A learner
must take this into account; otherwise it fits r / tau and moves 1 / tau times too far from the
reference. So the losses get log-probabilities divided by tau. This is equivalent to a `beta` of
beta / tau, the only value with which DPO, fitted to infinite data, gives the world's optimum.

Everything here can be jitted and vmapped over keys and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from selm_jax.lab import exact, theory
from selm_jax.lab.algorithms import Algorithm, Length, Settings
from selm_jax.lab.worlds import Scalar, Table, World, cross
from selm_jax.objectives.losses import Logps, Objective


class Trace(NamedTuple):
    """The metrics of a run: arrays with one number per round, for the policy after that round."""

    regret: Float[Array, " rounds"]
    reward: Float[Array, " rounds"]  # E_pi[r]
    forward_kl: Float[Array, " rounds"]  # KL(pi_ref || pi), pi_ref the first reference
    reverse_kl: Float[Array, " rounds"]  # KL(pi || pi_ref)
    good: Float[Array, " rounds"]  # mass on the best responses
    accuracy: Float[Array, " rounds"]  # pairs of the round whose chosen response is truly no worse


class Examples(NamedTuple):
    """Preference pairs, as indices of prompts and responses, with weights.

    `weight` is a count for sampled data and a probability for exact data.
    """

    prompt: Int[Array, " examples"]
    chosen: Int[Array, " examples"]
    rejected: Int[Array, " examples"]
    explore: Int[Array, " examples"]
    weight: Float[Array, " examples"]


def logps(
    log_policy: Table, log_reference: Table, prompt: Int[Array, " n"], **roles: Int[Array, " n"]
) -> Logps:
    """Makes the `Logps` for a loss from log-probability tables; responses have length 1."""
    one = jnp.ones(prompt.shape)
    return Logps(
        policy={role: log_policy[prompt, y] for role, y in roles.items()},
        reference={role: log_reference[prompt, y] for role, y in roles.items()},
        lengths=dict.fromkeys(roles, one),
        mean_lengths=dict.fromkeys(roles, jnp.ones(())),
    )


def mean_loss(
    objective: Objective, log_policy: Table, log_reference: Table, data: Examples
) -> Scalar:
    """Computes the mean loss of an objective over weighted examples."""
    seen = logps(
        log_policy, log_reference, data.prompt,
        chosen=data.chosen, rejected=data.rejected, explore=data.explore,
    )  # fmt: skip
    losses, _ = objective(seen)
    return jnp.sum(data.weight * losses) / jnp.sum(data.weight)


def expected_bonus(
    objective: Objective, world: World, explorer: Table, log_policy: Table, log_reference: Table
) -> Scalar:
    """Computes the expected bonus E_{x~nu, y_ref~explorer}[loss(y_ref)] exactly."""
    prompts, responses = jnp.indices(log_policy.shape).reshape(2, -1)
    losses, _ = objective(logps(log_policy, log_reference, prompts, explore=responses))
    return exact.mean(world, explorer, losses.reshape(log_policy.shape))


def sample(
    key: Key[Array, ""],
    world: World,
    slots: tuple[Table, ...],
    temperatures: tuple[float, ...],
    settings: Settings,
    queries: int,
    explore: int,
) -> Examples:
    """Samples prompts, one candidate per table of log-probabilities, and noisy preferences."""
    keys = jax.random.split(key, 3 + len(slots))
    prompt = jax.random.categorical(keys[0], jnp.log(world.prompts), shape=(queries,))
    drawn = [
        draw(key, table[prompt], temperature)
        for key, table, temperature in zip(keys[3:], slots, temperatures, strict=True)
    ]
    candidates = jnp.stack(drawn, axis=-1)
    chosen, rejected = label(keys[1:3], world, settings, prompt, candidates)
    return Examples(prompt, chosen, rejected, candidates[:, explore], jnp.ones(queries))


def draw(
    key: Key[Array, ""], logits: Float[Array, "queries responses"], temperature: float = 1.0
) -> Int[Array, " queries"]:
    """Draws a response from each row of logits at a temperature, by the Gumbel-max trick."""
    noise = jax.random.gumbel(key, (logits.size,))  # flat: see worlds._noise
    return jnp.argmax(logits + temperature * noise.reshape(logits.shape), axis=-1)


def label(
    keys: Key[Array, "2"],
    world: World,
    settings: Settings,
    prompt: Int[Array, " queries"],
    candidates: Int[Array, "queries slots"],
    seen: Any = True,
) -> tuple[Int[Array, " queries"], Int[Array, " queries"]]:
    """Picks the best and the worst candidate of each query by noisy feedback.

    Scores are r / temperature plus Gumbel noise, so their order follows the Plackett-Luce model; of
    two candidates the first wins with probability sigmoid(payoff / temperature), as in the
    Bradley-Terry model. The cyclic part of a candidate's score is against the mean of them all.

    Args:
      keys: of the noise, and of the flips.
      seen: which slots take part, one truth value per slot.
    """
    part = jnp.broadcast_to(jnp.asarray(seen), candidates.shape[1:]).astype(world.reward.dtype)
    turn = world.turn[prompt[:, None], candidates]
    others = jnp.sum(part[:, None] * turn, axis=1, keepdims=True) / jnp.sum(part)
    noise = jax.random.gumbel(keys[0], candidates.shape)
    scores = world.reward[prompt[:, None], candidates] + cross(turn, others)
    scores = scores + settings.temperature * noise
    flipped = jax.random.uniform(keys[1], (len(prompt),)) < settings.flips
    best = jnp.argmax(jnp.where(part > 0, scores, -jnp.inf), -1)
    worst = jnp.argmin(jnp.where(part > 0, scores, jnp.inf), -1)
    pick = [jnp.where(flipped, worst, best), jnp.where(flipped, best, worst)]
    chosen, rejected = (jnp.take_along_axis(candidates, i[:, None], -1)[:, 0] for i in pick)
    return chosen, rejected


def every_pair(
    world: World, first: Table, second: Table, settings: Settings
) -> Float[Array, "prompts chosen rejected"]:
    """The probability that `sample` draws each labelled pair, for candidates from two policies."""
    gap = world.reward[:, :, None] - world.reward[:, None, :]
    gap = gap + cross(world.turn[:, :, None], world.turn[:, None, :])
    warm = jax.nn.sigmoid(gap / jnp.maximum(settings.temperature, 1e-12))
    wins = jnp.where(settings.temperature > 0, warm, 0.5 + 0.5 * jnp.sign(gap))
    wins = settings.flips + (1 - 2 * settings.flips) * wins
    both = jnp.exp(first)[:, :, None] * jnp.exp(second)[:, None, :]
    return world.prompts[:, None, None] * wins * (both + both.swapaxes(1, 2))


def as_examples(pairs: Float[Array, "prompts chosen rejected"]) -> Examples:
    """Turns a table of pair probabilities into weighted examples, with an arbitrary y_ref."""
    index = jnp.indices(pairs.shape).reshape(3, -1)
    return Examples(index[0], index[1], index[2], index[2], pairs.reshape(-1))


def weight(algorithm: Algorithm, world: World, settings: Settings, t: Scalar, rounds: int) -> Any:
    """The weight of the exploration bonus in the loss of round t = 1, 2, ...

    With either convention it applies to log-probabilities divided by the temperature, as in `loss`.
    """
    alpha = settings.alpha
    if algorithm.schedule == "theory":
        alpha = theory.of_world(world, rounds).alpha
    elif algorithm.schedule == "inverse_sqrt":
        alpha = alpha / jnp.sqrt(t)
    return alpha * (world.beta if algorithm.convention == "alpha_beta" else settings.assumed)


def loss(
    algorithm: Algorithm,
    world: World,
    settings: Settings,
    theta: Float[Array, " dimension"],
    log_reference: Table,
    data: Examples,
    bonus_weight: Any,
) -> Scalar:
    """The loss that a round's fit minimises: the objective plus the weighted bonus."""
    log_policy = world.log_policy(theta)
    if algorithm.fit is None:  # the oracle; the factor makes its curvature that of DPO's loss
        scale = (world.beta / settings.assumed) ** 2
        return scale * exact.kl(world, exact.optimum(world), log_policy)
    seen = log_policy / settings.assumed, log_reference / settings.assumed
    total = mean_loss(algorithm.fit, *seen, data)
    if algorithm.bonus is None:
        return total
    if algorithm.explore is None:
        bonus = expected_bonus(algorithm.bonus, world, log_reference, *seen)
    else:
        bonus = mean_loss(algorithm.bonus, *seen, data)
    return total + bonus_weight * bonus


Descent = Callable[[Any, Table, Examples, Any], Any]  # theta, log reference, data, bonus's weight


def descent(algorithm: Algorithm, world: World, settings: Settings, steps: int) -> Descent:
    """Makes a function that fits theta to data by gradient descent, with a bound on its norm."""

    def fit(theta, log_reference, data, bonus_weight):
        return minimise(
            lambda th: loss(algorithm, world, settings, th, log_reference, data, bonus_weight),
            theta, world, settings, steps, adam=algorithm.optimizer == "adam",
        )  # fmt: skip

    return fit


def minimise(
    cost: Callable[[Any], Scalar],
    theta: Float[Array, " dimension"],
    world: World,
    settings: Settings,
    steps: int,
    *,
    adam: bool = False,
) -> Float[Array, " dimension"]:
    """Takes descent steps from theta within the policy class, with momentum or with Adam."""
    optimizer = optax.scale_by_adam() if adam else optax.trace(0.9, nesterov=True)
    rate = settings.rate * (1.0 if adam else (settings.assumed / world.beta) ** 2)
    radius = settings.bound * jnp.linalg.norm(world.theta_star)
    slope = jax.grad(cost)

    def step(carry, _):
        theta, state = carry
        change, state = optimizer.update(slope(theta), state)
        theta = theta - rate * change
        theta = theta * jnp.minimum(1.0, radius / jnp.maximum(jnp.linalg.norm(theta), 1e-12))
        return (theta, state), None

    (theta, _), _ = jax.lax.scan(step, (theta, optimizer.init(theta)), None, steps)
    return theta


def no_data(algorithm: Algorithm, world: World, length: Length) -> Any:
    """Makes the empty data before the first round: zeros, or examples with weight 0."""
    if algorithm.exact_data:
        return jnp.zeros((*world.log_reference.shape, world.log_reference.shape[-1]))
    places = length.queries * (length.rounds if algorithm.kept else 1)
    nothing = jnp.zeros(places, jnp.int32)
    return Examples(nothing, nothing, nothing, nothing, jnp.zeros(places))


def ask(
    key: Key[Array, ""],
    t: Scalar,
    world: World,
    algorithm: Algorithm,
    settings: Settings,
    queries: int,
    tables: Mapping[str, Table],
    kept: Any,
) -> tuple[Examples, Any, Scalar]:
    """Collects one round of pairs with feedback, and adds them to the data kept so far.

    Args:
      t: the round, from 0.
      tables: log-probabilities of each of `SOURCES`.
      kept: the data kept so far.

    Returns:
      The data to fit, the data kept from all rounds, and the share of the round's pairs whose
      chosen response is truly at least as good.
    """
    slots = tuple(tables[s.source] for s in algorithm.slots)
    if algorithm.exact_data:
        new = every_pair(world, slots[0], slots[1], settings)
        kept = kept + new if algorithm.kept else new
        correct = jnp.sum(new * (world.reward[:, :, None] >= world.reward[:, None, :]))
        return as_examples(kept), kept, correct
    temperatures = tuple(s.temperature for s in algorithm.slots)
    new = sample(
        jax.random.fold_in(key, t), world, slots, temperatures, settings, queries,
        algorithm.explore or 0,
    )  # fmt: skip
    at = t * queries if algorithm.kept else 0
    kept = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, (at,)), kept, new)
    better = world.reward[new.prompt, new.chosen] >= world.reward[new.prompt, new.rejected]
    return kept, kept, jnp.mean(better)


def run(
    key: Key[Array, ""],
    world: World,
    algorithm: Algorithm,
    settings: Settings,
    length: Length,
) -> Trace:
    """Runs one algorithm on a world. Equal keys give equal noise, whatever the bonus weight."""
    fit = descent(algorithm, world, settings, length.steps)
    uniform = jnp.full_like(world.log_reference, -jnp.log(world.log_reference.shape[-1]))

    def one_round(carry, t):
        theta, judged, log_reference, kept = carry
        tables = {
            "policy": world.log_policy(theta), "reference": log_reference,
            "start": world.log_reference, "uniform": uniform,
        }  # fmt: skip
        data, kept, correct = ask(key, t, world, algorithm, settings, length.queries, tables, kept)
        weighted = weight(algorithm, world, settings, t + 1.0, length.rounds)
        if algorithm.split:
            theta = fit(theta, log_reference, data, weighted * settings.asker)
            judged = fit(judged, log_reference, data, weighted * settings.judged)
        else:
            theta = judged = fit(theta, log_reference, data, weighted)
        log_policy = world.log_policy(judged)
        seen = Trace(
            exact.regret(world, log_policy),
            exact.mean(world, log_policy, world.reward),
            exact.kl(world, world.log_reference, log_policy),
            exact.kl(world, log_policy, world.log_reference),
            exact.mass_on_good(world, log_policy),
            correct,
        )
        log_reference = log_policy if algorithm.moving else log_reference
        return (theta, judged, log_reference, kept), seen

    zero = jnp.zeros_like(world.theta_star)
    start = zero, zero, world.log_reference, no_data(algorithm, world, length)
    _, trace = jax.lax.scan(one_round, start, jnp.arange(length.rounds))
    return trace
