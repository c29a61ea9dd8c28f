"""The texts that all contestants get: the same token ids, of fixed or of realistic lengths."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lengths:
    """Number of tokens of an example's prompt and of its three responses."""

    prompt: int
    responses: tuple[int, int, int]


def fixed(prompt: int, response: int, examples: int) -> list[Lengths]:
    return [Lengths(prompt, (response,) * 3)] * examples


def realistic(examples: int, seed: int) -> list[Lengths]:
    """Lengths like those of UltraFeedback with answers of a small model.

    Log-normal: prompts with a median of 120 tokens, cut to 16 to 512, as in the paper; answers with
    a median of 280, cut to 100 to 1,000. Answers to one prompt are alike in length. Medians and
    spread are assumed, not measured.
    """
    rng = random.Random(seed)

    def draw(median: float, sigma: float, least: int, most: int) -> int:
        return min(max(round(median * math.exp(rng.gauss(0, sigma))), least), most)

    def example() -> Lengths:
        prompt = draw(120, 1.0, 16, 512)
        median = 280 * math.exp(rng.gauss(0, 0.45))
        first, second, third = (draw(median, 0.55, 100, 1000) for _ in range(3))
        return Lengths(prompt, (first, second, third))

    return [example() for _ in range(examples)]


def make_data(
    model: Path,
    lengths: list[Lengths],
    *,
    steps: int,
    prompts: int,
    prompt: int,
    response: int,
    seed: int,
) -> dict:
    """Makes the data for all contestants, from words of one token, so that texts match the ids.

    Args:
      model: a folder with the tokenizer.
      lengths: of the examples of a training step. All steps have the same lengths and other tokens,
        so that their times can be compared.
      prompts, prompt, response: number and tokens of the prompts to answer, and new tokens.
    """
    words = one_token_words(model)
    eos = json.loads((model / "config.json").read_text())["eos_token_id"]
    eos = eos[0] if isinstance(eos, list) else eos
    rng = random.Random(seed)

    def draw(count):
        ids = rng.choices(list(words), k=count)
        return ids, "".join(words[i] for i in ids)

    def row(of: Lengths):
        prompt, prompt_text = draw(of.prompt)
        responses = [draw(length - 1) for length in of.responses]
        return {
            "prompt": prompt, "prompt_text": prompt_text,
            "responses": [[*ids, eos] for ids, _ in responses],
            "texts": [text for _, text in responses],
        }  # fmt: skip

    def question():
        ids, text = draw(prompt - 1)
        return {"ids": [eos, *ids], "text": text}

    return {
        "settings": {
            "prompt": prompt, "response": response, "beta": 0.01, "alpha": 0.001,
            "learning_rate": 1e-6,
        },
        "train": [[row(of) for of in lengths] for _ in range(steps)],
        "generate": [question() for _ in range(prompts)],
    }  # fmt: skip


def one_token_words(model: Path) -> dict[int, str]:
    """English words with a leading space that are one token each, by id."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    words = {}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        text = " " + token[1:]
        word = token[0] == "\u0120" and len(token) > 3 and token[1:].isascii()
        if (
            word
            and token[1:].isalpha()
            and token[1:].islower()
            and tokenizer.encode(text, add_special_tokens=False).ids == [i]
        ):
            words[i] = text
    return words
