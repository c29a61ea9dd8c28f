"""An oracle that hides its optimum from SmolLM2: openings that the start model rarely uses.

The reward of an answer is 1 if its first token is one of its class's openings, and 0 otherwise. The
classes are what the quickstart's prompts ask for (`CLASSES`). A class's openings are drawn from
words with which the start model seldom begins, until it uses them with a probability of `COVERAGE`.
That probability is known exactly, from one forward pass to each prompt. So are a policy's value
(`value`) and the optimum (`best_value`), because the reward depends on the first token alone.

`opening` is the ranker that the experiments name. It reads the openings from the data's rows, which
`experiments.needle.make` writes once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tokenizers import Tokenizer

from selm_jax.models.decoder import Decoder, logits
from selm_jax.policy.policy import Policy
from selm_jax.text.chat import Turn

FOLDER = Path("runs/needle/inputs")  # of what `make` writes
CLASSES = ("place", "weather", "book_film", "review")  # values of the quickstart's `category`
COVERAGE = 0.05
OBVIOUS = 0.5  # the probability of a class's likeliest first tokens, which are no openings
SMALLEST = 0.005  # of an opening's probability, so that a class has few of them
BETA = 0.1  # the strength of the KL penalty, in units of reward, as in the laboratory
WORD = re.compile(r"[A-Z][a-z]{2,}")
ROWS = 16  # prompts that are read at once

Probabilities = Float[np.ndarray, "prompts vocab"]


def hide(
    likely: Float[np.ndarray, " vocab"], words: Int[np.ndarray, " words"], rng: np.random.Generator
) -> list[int]:
    """Draws the openings of a class, whose total probability is `COVERAGE`.

    They are drawn among the words of at least `SMALLEST` that are not obvious, in a random order,
    as long as they fit. A last word, which may be smaller, fills the gap best.

    Args:
      likely: the start model's probability of each first token, as a mean over the class's prompts.
      words: the tokens that may be openings.

    Raises:
      ValueError: there are too few such words.
    """
    order = np.argsort(-likely, kind="stable")
    before = np.cumsum(likely[order]) - likely[order]
    hidden = np.setdiff1d(words, order[before < OBVIOUS])
    chosen: list[int] = []
    gap = COVERAGE
    for token in rng.permutation(hidden[likely[hidden] >= SMALLEST]):
        if likely[token] <= gap:
            chosen.append(int(token))
            gap -= likely[token]
    rest = np.setdiff1d(hidden, chosen)
    if len(rest):
        last = rest[np.abs(likely[rest] - gap).argmin()]
        if abs(gap - likely[last]) < gap:
            chosen.append(int(last))
            gap -= likely[last]
    if abs(gap) > COVERAGE / 20:
        raise ValueError(
            f"the openings have a probability of {COVERAGE - gap:.3f}; expected {COVERAGE}. Choose "
            "another class, or lower SMALLEST"
        )
    return chosen


def words_of(tokenizer: Tokenizer) -> Int[np.ndarray, " words"]:
    """The tokens that begin a word with a capital letter and have three letters or more."""
    texts = (tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size()))
    return np.array([i for i, text in enumerate(texts) if WORD.fullmatch(text)])


def first_tokens(policy: Policy, conversations: Sequence[Sequence[Turn]]) -> Probabilities:
    """The policy's probability of each first token of its answer to each conversation."""
    prompts = policy.prompt_ids(conversations)
    longest = max(map(len, prompts))
    decoder = Decoder(policy.config, policy.dtype)
    params = policy.weights.to_score()
    found = []
    for start in range(0, len(prompts), ROWS):
        some = prompts[start : start + ROWS]
        rows = np.zeros((ROWS, longest), np.int32)  # causal: what follows a prompt is not seen
        for row, ids in zip(rows, some, strict=False):
            row[: len(ids)] = ids
        last = np.zeros(ROWS, np.int32)
        last[: len(some)] = [len(ids) - 1 for ids in some]
        found.append(np.asarray(_next(decoder, params, rows, last))[: len(some)])
    return np.concatenate(found).astype(np.float64)


@partial(jax.jit, static_argnums=0)
def _next(decoder: Decoder, params: Any, rows: jax.Array, last: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    hidden, _ = decoder.apply({"params": params}, rows, positions)
    ends = hidden[jnp.arange(len(rows)), last]
    return jax.nn.softmax(logits(decoder.config, params, ends))


def hits(likely: Probabilities, openings: Sequence[Sequence[int]]) -> Float[np.ndarray, " prompts"]:
    """The probability that the answer to each prompt begins with one of its openings."""
    return np.array([row[list(mine)].sum() for row, mine in zip(likely, openings, strict=True)])


def divergence(likely: Probabilities, start: Probabilities) -> Float[np.ndarray, " prompts"]:
    """KL(policy || start model) of the first token, in nats: a lower bound of the answers' KL."""
    tiny = np.finfo(np.float64).tiny
    return (likely * (np.log(likely + tiny) - np.log(start + tiny))).sum(-1)


def value(
    likely: Probabilities, start: Probabilities, openings: Sequence[Sequence[int]]
) -> Float[np.ndarray, " prompts"]:
    """A policy's mean reward minus `BETA` times the KL of its first token, for each prompt."""
    return hits(likely, openings) - BETA * divergence(likely, start)


def best_value(covered: Float[np.ndarray, " prompts"]) -> Float[np.ndarray, " prompts"]:
    """The largest value that a policy can have, if the start model covers so much of the optimum.

    It is beta log E[exp(reward / beta)] over the start model's answers.
    """
    return BETA * np.log1p(covered * np.expm1(1 / BETA))


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def opening(prompt: str, response: str, row: dict) -> float:
    """Ranks an answer: 1 if its first token is one of the row's openings, otherwise 0."""
    tokenizer = _tokenizer(FOLDER)
    tokens = tokenizer.encode(response, add_special_tokens=False).ids
    return float(bool(tokens) and tokenizer.decode(tokens[:1]) in row["openings"])
