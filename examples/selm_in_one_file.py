"""SELM in one file: Algorithm 1 of arXiv 2405.19332, three iterations on a tiny model, in seconds.

    python examples/selm_in_one_file.py

The model is a random transformer that writes letters, and the judge likes vowels. All else is real:
the functions are those that `selm run` calls on models of any size, and this file is the loop
around them. With pi the policy, pi_ref the policy that the iteration starts from, and

    r(y) = log pi(y | x) - log pi_ref(y | x)

every update takes a step on the mean over pairs of

    -log sigmoid(beta * (r(y_w) - r(y_l)))  +  alpha * beta * r(y_ref)

where y_w is the best answer, y_l the worst, and y_ref the answer that pi_ref gives anyway. The
second term makes that answer less likely, which is the exploration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from string import ascii_lowercase

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid

from selm_jax.models.config import DecoderConfig, LayerKind, Rope
from selm_jax.models.decoder import Decoder, Params
from selm_jax.objectives.losses import Logps, Objective
from selm_jax.preferences.candidates import Candidate, Pair
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import Shape, common_shape, pack, unpack
from selm_jax.preferences.selection import best_worst, greedy, select
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.training.loop import mean_lengths
from selm_jax.training.optimizer import optimizer
from selm_jax.training.state import TrainState
from selm_jax.training.update import Update, make_update

ITERATIONS, PROMPTS, SAMPLES, BATCH = 3, 48, 3, 8
BETA, ALPHA, LEARNING_RATE = 0.1, 0.01, 2e-3
ANSWER = 12  # letters at most
ROWS, ROW_LENGTH = 2, 128  # a packed batch

LETTERS = "." + ascii_lowercase  # token 0 ends an answer
CONFIG = DecoderConfig(
    vocab_size=len(LETTERS), embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, norm_eps=1e-5,
    kinds=(LayerKind(Rope(1e4)),) * 2, tied=True, max_positions=64,
    architecture="LlamaForCausalLM",
)  # fmt: skip
MODEL = Decoder(CONFIG)


def selm(logps: Logps) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The SELM loss of each pair, and two metrics; see the top of this file."""
    margin = logps.log_ratio("chosen") - logps.log_ratio("rejected")
    optimism = logps.log_ratio("explore")
    losses = -log_sigmoid(BETA * margin) + ALPHA * BETA * optimism
    return losses, {"margin": margin, "optimism": optimism}


def judge(answer: str) -> float:
    """The oracle that ranks answers: the share of vowels in the answer."""
    return sum(letter in "aeiou" for letter in answer) / max(len(answer), 1)


def text(tokens: Sequence[int]) -> str:
    return "".join(LETTERS[token] for token in tokens).rstrip(".")


def generate(params: Params, prompts: Sequence[tuple[int, ...]], t: int) -> list[list[Candidate]]:
    """Generates for each prompt the greedy answer, which is y_ref, and a few samples."""
    engine = Engine(
        Decoder(CONFIG, scan=False), Sampling(temperature=1.0), slots=16, max_prompt=8,
        max_new_tokens=ANSWER, stop_ids=(0,),
    )  # fmt: skip
    requests = [Request(i, prompt, 1, SAMPLES) for i, prompt in enumerate(prompts)]
    found: list[list[Candidate]] = [[] for _ in prompts]
    decoding = decoding_params(params, jnp.float32)
    for answer in engine.generate(decoding, requests, seed=0, iteration=t):
        source = "greedy" if answer.greedy else "sample"
        of = Candidate(source, text(answer.tokens), answer.tokens, answer.finish, answer.sample)
        found[answer.index].append(of)
    return found


def pick(
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[Sequence[Candidate]],
    score: Callable[[str], float],
    t: int,
) -> list[Example]:
    """Makes examples of each prompt's best, worst and greedy answers; ties give no example."""
    examples = []
    for i, (prompt, candidates) in enumerate(zip(prompts, answers, strict=True)):
        scores = [score(each.text) for each in candidates]
        pair = select(candidates, scores, rule=best_worst, explore=greedy, seed=(t, i))
        if isinstance(pair, Pair):
            roles = {"chosen": pair.chosen, "rejected": pair.rejected, "explore": pair.explore}
            ids = {role: candidates[place].token_ids or () for role, place in roles.items()}
            examples.append(Example.of(f"prompt {i}", prompt, ids))  # equal answers are stored once
    return examples


def with_reference(
    update: Update, params: Params, examples: Sequence[Example], shape: Shape
) -> list[Example]:
    """Adds log pi_ref of every answer to the examples, so that training needs only one model."""
    logps = [np.asarray(update.logps(params, batch)) for batch in pack(examples, shape)]
    scored = zip(examples, unpack(examples, shape, logps), strict=True)
    return [dataclasses.replace(example, reference_logps=found) for example, found in scored]


def train(
    update: Update, state: TrainState, examples: Sequence[Example], shape: Shape
) -> TrainState:
    """Trains for one pass over the examples, with one batch per update."""
    for start in range(0, len(examples) - BATCH + 1, BATCH):
        batch = examples[start : start + BATCH]
        lengths = mean_lengths(batch)
        first, *others = pack(batch, shape)
        gradients, sums = update.gradients(state.params, first, lengths)
        for more in others:  # gradients of further packed batches are added up
            gradients, sums = update.add(gradients, sums, state.params, more, lengths)
        state, metrics = update.apply(state, gradients, sums, LEARNING_RATE)
        names = ("loss", "margin", "optimism", "grad_norm")
        shown = "  ".join(f"{name} {float(metrics[name]):7.3f}" for name in names)
        print(f"    update {int(state.step)}  {shown}")
    return state


def main() -> list[float]:
    """Runs Algorithm 1; returns the mean score of the answers before and after each iteration."""
    rng = np.random.default_rng(0)
    prompts = [tuple(map(int, rng.integers(1, len(LETTERS), 4))) for _ in range(PROMPTS)]
    two = jnp.zeros((1, 2), jnp.int32)
    policy = nn.unbox(MODEL.init(jax.random.key(0), two, two)["params"])
    steps = optimizer("adamw", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    objective = Objective(("chosen", "rejected", "explore"), selm)
    update = make_update(MODEL, objective, steps, chunk=32, clip=1.0)
    rewards = []
    for t in range(1, ITERATIONS + 2):
        answers = generate(policy, prompts, t)
        rewards.append(float(np.mean([judge(c.text) for each in answers for c in each])))
        print(f"policy {t - 1}: mean score {rewards[-1]:.3f}; it writes {answers[0][1].text!r}")
        if t > ITERATIONS:
            return rewards
        examples = pick(prompts, answers, judge, t)
        shape = common_shape([examples], rows=ROWS, time=ROW_LENGTH)
        examples = with_reference(update, policy, examples, shape)  # pi_ref is the policy itself
        policy = train(update, TrainState.create(policy, steps), examples, shape).params
    return rewards


if __name__ == "__main__":
    main()
