"""Makes small worlds whose policy is a real decoder, and trains it with the real update.

The vocabulary is a few letters and an end token, and a response is at most a few tokens, so every
response can be listed, packed as a branch of one prompt tree, and scored in one pass. The policy is
therefore known exactly, as a `World` needs it, but its parameters are those of a language model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from selm_jax.lab import algorithms, exact, stats
from selm_jax.lab.rounds import Examples, sample
from selm_jax.lab.worlds import Table, World
from selm_jax.models import families
from selm_jax.models.decoder import Decoder, Params
from selm_jax.objectives.losses import Objective, selm
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import PreferenceBatch, Shape, common_shape, pack
from selm_jax.training.optimizer import optimizer
from selm_jax.training.state import TrainState
from selm_jax.training.update import Update, make_update, response_logps

LETTERS = 4
END = LETTERS  # the vocabulary's last token
CONFIG = families.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": LETTERS + 1,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
    }
)
ROUNDS, RATE = 12, 1e-3  # of a run
CHUNK = 64  # tokens whose logits are computed at a time
PACKED = Shape(rows=8, time=64, scored=64, segments=32, branches=3)  # of the examples


class DecoderWorld(NamedTuple):
    """A world, the tokens of its prompts and responses, and the decoder that is its policy.

    Attributes:
      world: tables over `prompts` and `responses`; its reference is the decoder with `params`.
      prompts: the tokens of every prompt.
      responses: the tokens of every response: letters ended by END, or cut off at full length.
      decoder, params: the decoder and its first parameters.
      tree: all responses of all prompts, packed.
    """

    world: World
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    decoder: Decoder
    params: Params
    tree: PreferenceBatch


def make(seed: int = 0, *, prompts: int = 3, length: int = 4, beta: float = 0.1) -> DecoderWorld:
    """Makes a world with a random decoder and a reward with two peaks.

    A prompt is one letter. Repeating it gives a reward of up to 0.6; the single response with the
    next letters in order gives 1. No path of rising reward leads from the first to the second.
    """
    if not 1 <= prompts <= LETTERS:
        raise ValueError(
            f"prompts is {prompts}; a prompt is one letter, so expected 1 to {LETTERS}"
        )
    ended = [
        (*letters, END)
        for n in range(length)
        for letters in itertools.product(range(LETTERS), repeat=n)
    ]
    responses = (*ended, *itertools.product(range(LETTERS), repeat=length))
    asked = tuple((i,) for i in range(prompts))
    roles = {role: 0 for role in ROLES}
    examples = [Example(f"every response to {p}", p, responses, roles) for p in asked]
    shape = common_shape([examples], rows=prompts, time=examples[0].tokens)
    (tree,) = pack(examples, shape)

    decoder = Decoder(CONFIG)
    tokens = jnp.zeros((1, 2), jnp.int32)
    variables = decoder.init(jax.random.key(seed), tokens, tokens)
    params = nn.unbox(variables)["params"]
    log_reference = jax.jit(log_policy, static_argnums=0)(decoder, params, tree)

    def reward(prompt: int, response: tuple[int, ...]) -> float:
        if response == tuple((prompt + 1 + i) % LETTERS for i in range(length)):
            return 1.0
        return 0.6 * response.count(prompt) / length

    rewards = jnp.array([[reward(p, y) for y in responses] for (p,) in asked])
    world = World(
        prompts=jnp.full(prompts, 1 / prompts),
        log_reference=log_reference,
        reward=rewards,
        turn=jnp.zeros((*rewards.shape, 2)),
        balance=jnp.zeros((prompts, 2)),
        features=None,
        theta_star=jnp.zeros(0),  # a decoder of this size may not be able to reach the optimum
        good=(rewards == 1).astype(jnp.float32),
        beta=beta,
    )
    return DecoderWorld(world, asked, responses, decoder, params, tree)


def log_policy(decoder: Decoder, params: Params, tree: PreferenceBatch) -> Table:
    """Computes log pi(response | prompt) for every response, one row per prompt."""
    return response_logps(decoder, params, tree, CHUNK)[:, 0]


def examples(dw: DecoderWorld, data: Examples, log_reference: Table) -> list[Example]:
    """Turns pairs into a run's examples; a response with two roles is stored only once."""
    reference = np.asarray(log_reference)
    out = []
    for i, (x, *played) in enumerate(zip(*map(np.asarray, data[:4]), strict=True)):
        distinct = list(dict.fromkeys(played))
        out.append(
            Example(
                str(i),
                dw.prompts[x],
                tuple(dw.responses[y] for y in distinct),
                {role: distinct.index(y) for role, y in zip(ROLES, played, strict=True)},
                tuple(reference[x, distinct]),
            )
        )
    return out


def packed_gradient(
    update: Update, params: Params, found: list[Example]
) -> tuple[Params, dict[str, Array]]:
    """Returns the gradient and the metrics of one update, each summed over the examples."""
    lengths = [[len(e.responses[e.roles[role]]) for role in ROLES] for e in found]
    means = np.mean(lengths, axis=0, dtype=np.float32)
    first, *rest = pack(found, PACKED)
    gradients, sums = update.gradients(params, first, means)
    for batch in rest:
        gradients, sums = update.add(gradients, sums, params, batch, means)
    return gradients, sums


@functools.cache
def compiled(decoder: Decoder, objective: Objective):
    """Returns the update, the optimiser and the function log_policy(params, tree), compiled."""
    step = optimizer("adamw", b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0)
    update = make_update(decoder, objective, step, chunk=CHUNK, clip=1.0)
    return update, step, jax.jit(lambda params, tree: log_policy(decoder, params, tree))


def run(
    dw: DecoderWorld,
    objective: Objective,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
    queries: int = 8,
    updates: int = 4,
    rate: float = RATE,
    settings: algorithms.Settings | None = None,
) -> list[float]:
    """Runs SELM (Algorithm 2, fixed reference); returns the exact regret after each round.

    Each round compares `queries` pairs (policy against reference, whose response is also y_ref),
    and makes `updates` steps of Adam on all pairs so far. The objective's beta should be that of
    the world divided by `settings.temperature` (see `rounds`).
    """
    settings = settings or algorithms.Settings()
    update, step, table = compiled(cast(Any, dw.decoder), objective)  # modules are hashable
    state = TrainState.create(jax.tree.map(jnp.copy, dw.params), step)
    key = jax.random.key(seed)
    data: list[Example] = []
    regrets = []
    for t in range(rounds):
        slots = table(state.params, dw.tree), dw.world.log_reference
        new = sample(
            jax.random.fold_in(key, t), dw.world, slots, (1.0, 1.0), settings, queries, explore=1
        )
        data += examples(dw, new, dw.world.log_reference)
        for _ in range(updates):
            gradients, sums = packed_gradient(update, state.params, data)
            state, _ = update.apply(state, gradients, sums, np.float32(rate))
        regrets.append(float(exact.regret(dw.world, table(state.params, dw.tree))))
    return regrets


def regret(
    alphas: Sequence[float], seeds: int, seed: int = 0, *, rounds: int = ROUNDS, rate: float = RATE
) -> list[stats.Record]:
    """Compares SELM's cumulative regret with DPO's (alpha 0) for a real decoder, seed by seed.

    `still` is the regret of the untrained decoder over the same number of rounds. If a
    regret is not well below it, the decoder has learnt nothing.
    """
    worlds = [make(seed + s) for s in range(seeds)]
    totals = np.zeros((1 + len(alphas), seeds))
    for i, alpha in enumerate((0.0, *alphas)):
        objective = selm(worlds[0].world.beta / algorithms.Settings().temperature, alpha)
        for s, dw in enumerate(worlds):
            totals[i, s] = sum(run(dw, objective, seed=seed + s, rounds=rounds, rate=rate))
    still = [float(exact.regret(dw.world, dw.world.log_reference)) for dw in worlds]
    return stats.correct(
        [
            {"alpha": alpha, "still": float(np.mean(still)) * rounds}
            | stats.compare(total, totals[0])
            for alpha, total in zip(alphas, totals[1:], strict=True)
        ]
    )
