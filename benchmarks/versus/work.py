"""Counts the operations that each contestant's method requires, by hand (`models.flops`).

Only real tokens, scores that a token may see, and logits of response tokens count: no padding, no
recomputation. A method's own detours do count, such as a prompt that is computed once for each of
its responses, and a reference model that runs in every step.
"""

from __future__ import annotations

from selm_jax.models import flops
from selm_jax.models.config import DecoderConfig

# Forward passes that a contestant's step is worth: three for forward and backward, one more for a
# reference model, and the number of responses that it trains on.
SEQUENCES = {
    "authors": (4, 3), "trl_cached": (3, 2), "trl_live": (4, 2), "tunix_none": (3, 2),
    "tunix_live": (4, 2),
}  # fmt: skip
# Distinct responses of an example in our updates; `selm_train` says which examples share.
TREES = {"selm": 3, "selm_dpo": 2}


def gflop(key: str, config: DecoderConfig, data: dict, prompts: int) -> float:
    """The useful operations of a contestant's step, in 1e9.

    Args:
      key: of the contestant.
      prompts: number of prompts that a step of generation answers; 0 in training.
    """
    if prompts:
        s = data["settings"]
        return 1e-9 * prompts * _answer(config, s["prompt"], s["response"])
    rows = data["train"][0]
    if key in SEQUENCES:
        passes, count = SEQUENCES[key]
        each = [
            _pass(config, len(row["prompt"]), [len(response)])
            for row in rows
            for response in row["responses"][:count]
        ]
        return 1e-9 * passes * sum(each)
    each = [
        _pass(config, len(row["prompt"]), [len(r) for r in row["responses"][: _count(key, i)]])
        for i, row in enumerate(rows)
    ]
    return 1e-9 * 3 * sum(each)


def _count(key: str, number: int) -> int:
    return (3 if number % 3 == 2 else 2) if key == "selm_shared" else TREES[key]


def _pass(config: DecoderConfig, prompt: int, responses: list[int]) -> int:
    return flops.passed(
        config,
        tokens=prompt + sum(responses),
        pairs=flops.visible_pairs(prompt, responses),
        scored=sum(responses),
    ).total


def _answer(config: DecoderConfig, prompt: int, new: int) -> int:
    """The operations of an answer: a prefill, and one pass for each new token but the last."""
    tokens = prompt + new - 1
    pairs = flops.visible_pairs(tokens)
    return flops.passed(config, tokens=tokens, pairs=pairs, scored=new).total
