"""What a judge on a real server is asked, and what its model says here: the oracle."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from selm_jax.feedback.judge.answer import Completion, Usage
from selm_jax.feedback.judge.client import Client
from selm_jax.feedback.judge.prompts import LOGPROB, Template, weighted_preference
from selm_jax.feedback.ranker import Question
from selm_jax.models.decoder import Decoder, Params
from selm_jax.run.run import Run
from selm_jax.text.conversations import Message

QUESTIONS = [
    Question(text, (Message("user", text),), {}, f"p{i}")
    for i, text in enumerate(["Praise a river.", "Sell a chair.", "Describe a coat."])
]
CANDIDATES = [[f"{each.prompt} It is blue.", "No."] for each in QUESTIONS]
TEMPLATE = Template.parse(LOGPROB, [["conversation"], ["response_a"], ["response_b"]], "here")
# Both orders of each question's two candidates, as the ranker asks.
CONVERSATIONS = [
    TEMPLATE.fill({"conversation": each.prompt, "response_a": a, "response_b": b})
    for each, (one, other) in zip(QUESTIONS, CANDIDATES, strict=True)
    for a, b in ((one, other), (other, one))
]


def told(url: str, model: str, cache: Path) -> list[Completion]:
    """The server's answers of one token, with the five likeliest."""

    async def ask() -> list[Completion]:
        async with Client(model, cache=cache, base_url=url, concurrency=4, timeout=600) as client:
            return await client.complete_all(
                CONVERSATIONS, max_tokens=1, temperature=0.0, top_logprobs=5
            )

    return asyncio.run(ask())


def expected(run: Run, params: Params, all_logits) -> list[Completion]:
    """The same by the model here; texts that are no whole characters are left out."""
    found = []
    for each in CONVERSATIONS:
        ids = run.chat.prompt_ids([Message(m["role"], m["content"]) for m in each])
        tokens = jnp.asarray([ids])
        logps = jax.nn.log_softmax(all_logits(Decoder(run.model.facts), params, tokens)[0, -1])
        five = jax.lax.top_k(logps, 5)[1].tolist()
        first = {run.chat.text([token]): float(logps[token]) for token in five}
        found.append(Completion("", (whole(first),), Usage(len(ids), 1), None))
    return found


def wins(answers: list[Completion]) -> list[float]:
    """How far each question's first candidate wins, over both orders."""
    second = [weighted_preference(each) for each in answers]
    return [(1 - one + other) / 2 for one, other in zip(second[::2], second[1::2], strict=True)]


def whole(first: Mapping[str, float]) -> dict[str, float]:
    """Without texts that servers write in several ways: half a character, control characters."""
    return {t: logp for t, logp in first.items() if t and t.isascii() and t.isprintable()}
