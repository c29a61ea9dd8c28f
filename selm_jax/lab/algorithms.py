"""Algorithms: rounds of sampling, feedback and fitting, on a `World`.

    theta = 0                                                  the policy is the reference
    for each round:
        candidates ~ the algorithm's slots (policy, reference, ...), prompts ~ the world
        chosen, rejected = best and worst of them, as noisy feedback sees it
        theta = some descent steps on  mean over the data of fit(logps) + weight * bonus(logps)

`fit` and `bonus` are objectives of `objectives.losses`, the very functions that train the language
model: they see `Logps` and nothing of the world. An objective's settings are plain numbers; what
differs between runs of one program (alpha, noise, coverage) is in `Settings`, as arrays.

Feedback at temperature tau shows rewards in units of tau: sigmoid((r1 - r2) / tau). A learner whose
optimum is the world's must take that into account, or it fits r / tau and leaves the reference
1 / tau times too far behind. So the losses see log-probabilities divided by tau, which is the same
as a `beta` of beta / tau, the one value at which DPO fitted to endless data gives the optimum.

Everything here can be jitted and vmapped over keys and settings.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from selm_jax.lab import exact, theory
from selm_jax.lab.worlds import Scalar, Table, World
from selm_jax.objectives.losses import CONVENTIONS, Logps, Objective, dpo, optimism, xpo

SOURCES = ("policy", "reference", "start", "uniform")
SCHEDULES = ("constant", "inverse_sqrt", "theory")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one candidate comes from, and at what temperature (0: the most probable response).

    policy: the current one; reference: the current reference, which moves if the algorithm's does;
    start: the first reference; uniform: every response alike.
    """

    source: str
    temperature: float = 1.0

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source {self.source!r}; expected one of {SOURCES}")


POLICY, REFERENCE, START, UNIFORM = map(Slot, SOURCES)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What is done in a round; static.

    Attributes:
      slots: the candidates of a prompt; the best becomes chosen, the worst rejected.
      fit: the objective; None is the oracle, which is told the optimum and fits it.
      bonus: a second objective, whose loss is multiplied by the round's weight.
      convention: the weight is alpha * beta or alpha, as in `losses.weighted_optimism`, where beta
        is the losses': beta / temperature.
      schedule: of alpha: constant; inverse_sqrt, alpha / sqrt(round); theory, the theorem's.
      explore: which slot is y_ref; None: the bonus is its exact expectation over the reference.
      exact_data: no sampling at all: every pair with its probability (two slots only).
      moving: after each round the policy becomes the reference (of losses and slots, not of J).
      kept: pairs are kept for ever; otherwise only the round's are trained on.
      split: the policy that asks (the `policy` of slots) and the policy that is judged are fitted
        apart, each with its own share of the bonus (`Settings.asker`, `Settings.judged`). So what
        better data do is told from what a different fit to the same data does.
      optimizer: momentum, which goes for the argmax; adam, as language models are trained.
    """

    name: str
    slots: tuple[Slot, ...] = (POLICY, REFERENCE)
    fit: Objective | None = None
    bonus: Objective | None = None
    convention: str = "alpha_beta"
    schedule: str = "constant"
    explore: int | None = None
    exact_data: bool = False
    moving: bool = False
    kept: bool = True
    split: bool = False
    optimizer: str = "momentum"

    def __post_init__(self):
        for found, known in (
            (self.convention, CONVENTIONS),
            (self.schedule, SCHEDULES),
            (self.optimizer, ("momentum", "adam")),
        ):
            if found not in known:
                raise ValueError(f"{self.name}: {found!r}; expected one of {known}")
        if self.exact_data and (
            len(self.slots) != 2 or any(s.temperature != 1 for s in self.slots)
        ):
            raise ValueError(f"{self.name}: exact data need two slots at temperature 1")
        if self.moving and self.split:
            raise ValueError(f"{self.name}: with two policies, which would the reference follow?")
        if self.explore is None:
            for o in (self.fit, self.bonus):
                if o is not None and "explore" in o.roles and o.roles != ("explore",):
                    raise ValueError(
                        f"{self.name}: {o} reads y_ref beside other responses, so its expectation "
                        "is not taken exactly; say which slot is y_ref with explore=0 or 1"
                    )


def replace(algorithm: Algorithm, **changes: Any) -> Algorithm:
    return dataclasses.replace(algorithm, **changes)


def zoo(beta: float, alpha: float = 0.0) -> dict[str, Algorithm]:
    """The algorithms of the literature, by name.

    `alpha` is that of XPO, whose loss carries it inside; the others take `Settings.alpha`.
    """
    fit, term = dpo(beta), optimism(1.0, beta)
    selm = Algorithm("selm", fit=fit, bonus=term)
    data = (START, START)  # the data set's own two responses
    made = [
        # SELM's Algorithm 2 as written, in both readings of its last line.
        replace(selm, name="selm_fixed", convention="alpha"),
        replace(selm, name="selm_moving", convention="alpha", moving=True),
        # SELM's Algorithm 1: best and worst of y_ref and the data's pair, only the newest data.
        replace(
            selm, name="selm_practice", slots=(REFERENCE, *data), explore=0, moving=True, kept=False
        ),
        # The authors' code: y_ref is greedy, and the optimiser is Adam.
        replace(
            selm, name="selm_code", slots=(Slot("reference", 0), *data), explore=0, moving=True,
            kept=False, optimizer="adam",
        ),
        Algorithm("xpo", fit=xpo(beta, alpha), explore=1),
        Algorithm("dpo_online", fit=fit),
        Algorithm("dpo_on_policy", slots=(POLICY, POLICY), fit=fit),
        Algorithm("dpo_passive", slots=(REFERENCE, REFERENCE), fit=fit),
        Algorithm("greedy", slots=(Slot("policy", 0), REFERENCE), fit=fit),
        Algorithm("best_of_4", slots=(POLICY,) * 4, fit=fit),
        Algorithm("uniform", slots=(UNIFORM, UNIFORM), fit=fit),
        Algorithm("oracle"),
    ]  # fmt: skip
    # Iterative DPO, SELM's own baseline: the same without the term. (selm_fixed's is dpo_online.)
    made += [
        replace(a, name=a.name.replace("selm", "dpo"), bonus=None)
        for a in made
        if a.bonus is not None and a.moving
    ]
    return {a.name: a for a in made}


@flax.struct.dataclass
class Settings:
    """What differs between runs of one compiled program.

    alpha: of the bonus. temperature: of the Bradley-Terry feedback, in units of reward (0: the best
    always wins). assumed: the temperature that the learner reckons with, above 0. flips: probability
    that a label is turned round afterwards. bound: the class is |theta| <= bound * |theta_star|.
    rate: descent step, in units of 1 / (beta / assumed)^2 (momentum) or of theta (adam). asker,
    judged: factors of the bonus's weight in the two fits of an algorithm that is `split`.
    """

    alpha: Any = 0.0
    temperature: Any = 0.1
    assumed: Any = 0.1
    flips: Any = 0.0
    bound: Any = 2.0
    rate: Any = 0.5
    asker: Any = 1.0
    judged: Any = 1.0


class Length(NamedTuple):
    """How long a run is; static. `queries` pairs are compared in each of `rounds` rounds."""

    rounds: int = 32
    queries: int = 4
    steps: int = 16  # descent steps of a round


class Trace(NamedTuple):
    """One number per round, of the policy after the round."""

    regret: Float[Array, " rounds"]
    reward: Float[Array, " rounds"]  # E_pi[r]
    forward_kl: Float[Array, " rounds"]  # KL(pi_ref || pi), pi_ref the first reference
    reverse_kl: Float[Array, " rounds"]  # KL(pi || pi_ref)
    good: Float[Array, " rounds"]  # mass on the best responses
    accuracy: Float[Array, " rounds"]  # pairs of the round whose chosen response is truly no worse


class Examples(NamedTuple):
    """Pairs as indices. `weight` is a count in sampled data, a probability in exact data."""

    prompt: Int[Array, " examples"]
    chosen: Int[Array, " examples"]
    rejected: Int[Array, " examples"]
    explore: Int[Array, " examples"]
    weight: Float[Array, " examples"]


def logps(
    log_policy: Table, log_reference: Table, prompt: Int[Array, " n"], **roles: Int[Array, " n"]
) -> Logps:
    """What a loss sees: the number of each role's response in the tables, all of length 1."""
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
    """The objective's mean over the data."""
    seen = logps(
        log_policy, log_reference, data.prompt,
        chosen=data.chosen, rejected=data.rejected, explore=data.explore,
    )  # fmt: skip
    losses, _ = objective(seen)
    return jnp.sum(data.weight * losses) / jnp.sum(data.weight)


def expected_bonus(
    objective: Objective, world: World, explorer: Table, log_policy: Table, log_reference: Table
) -> Scalar:
    """E_{x~nu, y_ref~explorer}[loss(y_ref)], over all of them; explorer is a table of log pi."""
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
    """Prompts, candidates from each slot's log-probabilities, and noisy feedback on them.

    Scores are r / temperature plus Gumbel noise, whose order is Plackett-Luce; of two candidates
    the first wins with probability sigmoid((r1 - r2) / temperature), which is Bradley-Terry.
    """
    keys = jax.random.split(key, 3 + len(slots))
    prompt = jax.random.categorical(keys[0], jnp.log(world.prompts), shape=(queries,))

    def draw(key, table, temperature):
        noise = jax.random.gumbel(key, (queries * table.shape[-1],))  # flat: see worlds._noise
        return jnp.argmax(table[prompt] + temperature * noise.reshape(queries, -1), axis=-1)

    drawn = [draw(*each) for each in zip(keys[3:], slots, temperatures, strict=True)]
    candidates = jnp.stack(drawn, axis=-1)
    noise = jax.random.gumbel(keys[1], candidates.shape)
    scores = world.reward[prompt[:, None], candidates] + settings.temperature * noise
    flipped = jax.random.uniform(keys[2], (queries,)) < settings.flips
    best, worst = jnp.argmax(scores, -1), jnp.argmin(scores, -1)
    pick = [jnp.where(flipped, worst, best), jnp.where(flipped, best, worst)]
    chosen, rejected = (jnp.take_along_axis(candidates, i[:, None], -1)[:, 0] for i in pick)
    return Examples(prompt, chosen, rejected, candidates[:, explore], jnp.ones(queries))


def every_pair(
    world: World, first: Table, second: Table, settings: Settings
) -> Float[Array, "prompts chosen rejected"]:
    """Probability of each labelled pair: what `sample` draws from, for two slots."""
    gap = world.reward[:, :, None] - world.reward[:, None, :]
    warm = jax.nn.sigmoid(gap / jnp.maximum(settings.temperature, 1e-12))
    wins = jnp.where(settings.temperature > 0, warm, 0.5 + 0.5 * jnp.sign(gap))
    wins = settings.flips + (1 - 2 * settings.flips) * wins
    both = jnp.exp(first)[:, :, None] * jnp.exp(second)[:, None, :]
    return world.prompts[:, None, None] * wins * (both + both.swapaxes(1, 2))


def as_examples(pairs: Float[Array, "prompts chosen rejected"]) -> Examples:
    """Every cell of the table as one weighted example. y_ref has no meaning here."""
    index = jnp.indices(pairs.shape).reshape(3, -1)
    return Examples(index[0], index[1], index[2], index[2], pairs.reshape(-1))


def weight(algorithm: Algorithm, world: World, settings: Settings, t: Scalar, rounds: int) -> Any:
    """What multiplies the bonus in round t = 1, 2, ...

    Both are for log-probabilities in units of the temperature, as `loss` hands them over.
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
    """What a round's descent makes smaller."""
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


def run(
    key: Key[Array, ""],
    world: World,
    algorithm: Algorithm,
    settings: Settings,
    length: Length,
) -> Trace:
    """One run, from theta = 0. Equal keys give equal noise whatever the algorithm's weights."""
    rounds, queries, steps = length
    adam = algorithm.optimizer == "adam"
    optimizer = optax.scale_by_adam() if adam else optax.trace(0.9, nesterov=True)
    rate = settings.rate * (1.0 if adam else (settings.assumed / world.beta) ** 2)
    radius = settings.bound * jnp.linalg.norm(world.theta_star)
    uniform = jnp.full_like(world.log_reference, -jnp.log(world.log_reference.shape[-1]))

    def fit(theta, log_reference, data, bonus_weight):
        slope = jax.grad(
            lambda th: loss(algorithm, world, settings, th, log_reference, data, bonus_weight)
        )

        def step(carry, _):
            theta, state = carry
            change, state = optimizer.update(slope(theta), state)
            theta = theta - rate * change
            theta = theta * jnp.minimum(1.0, radius / jnp.maximum(jnp.linalg.norm(theta), 1e-12))
            return (theta, state), None

        (theta, _), _ = jax.lax.scan(step, (theta, optimizer.init(theta)), None, steps)
        return theta

    def one_round(carry, t):
        theta, judged, log_reference, kept = carry
        log_policy = world.log_policy(theta)
        tables = {
            "policy": log_policy, "reference": log_reference,
            "start": world.log_reference, "uniform": uniform,
        }  # fmt: skip
        slots = tuple(tables[s.source] for s in algorithm.slots)
        if algorithm.exact_data:
            new = every_pair(world, slots[0], slots[1], settings)
            kept = kept + new if algorithm.kept else new
            data = as_examples(kept)
            correct = jnp.sum(new * (world.reward[:, :, None] >= world.reward[:, None, :]))
        else:
            new = sample(
                jax.random.fold_in(key, t), world, slots,
                tuple(s.temperature for s in algorithm.slots), settings, queries,
                algorithm.explore or 0,
            )  # fmt: skip
            at = t * queries if algorithm.kept else 0
            kept = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, (at,)), kept, new)
            data = kept
            better = world.reward[new.prompt, new.chosen] >= world.reward[new.prompt, new.rejected]
            correct = jnp.mean(better)
        weighted = weight(algorithm, world, settings, t + 1.0, rounds)
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

    if algorithm.exact_data:
        empty: Any = jnp.zeros((*world.log_reference.shape, world.log_reference.shape[-1]))
    else:
        places = queries * (rounds if algorithm.kept else 1)
        nothing = jnp.zeros(places, jnp.int32)
        empty = Examples(nothing, nothing, nothing, nothing, jnp.zeros(places))
    zero = jnp.zeros_like(world.theta_star)
    start = zero, zero, world.log_reference, empty
    _, trace = jax.lax.scan(one_round, start, jnp.arange(rounds))
    return trace
