"""Writes what the experiments of the middle world start from, all of it from one seed.

    PYTHONPATH=. python -m experiments.middle.make

writes into runs/middle/inputs: a model with random weights and its tokenizer (model/), answers of
the language's speakers (speakers.jsonl), instructions with two answers each (train.jsonl), and
held-out instructions (heldout.jsonl).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from experiments.middle import language
from selm_jax.models.decoder import Decoder
from selm_jax.models.families import from_hf, to_hf
from selm_jax.shell import artifacts
from selm_jax.weights.huggingface import save

FOLDER = Path("runs/middle/inputs")
SPEAKERS = 12_288  # answers that the start model learns from
HELDOUT = 64  # instructions
UNKNOWN, ASKS, ANSWERS, END = SPECIAL = ("<unknown>", "<asks>", "<answers>", "<end>")
TEMPLATE = (
    "{% for m in messages %}{{ '<asks>' if m.role == 'user' else '<answers>' }}{{ m.content }}"
    "{{ '<end>' if m.role == 'assistant' }}{% endfor %}"
    "{{ '<answers>' if add_generation_prompt }}"
)
SIZES = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 512, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def make(folder: Path, seed: int = language.SEED) -> None:
    """Writes the inputs into a folder, which is replaced."""
    with artifacts.whole(folder, replaces_folder=True) as partial:
        partial.mkdir(parents=True)
        write_model(partial / "model", seed)
        for name, found in rows(seed).items():
            lines = "".join(json.dumps(row) + "\n" for row in found)
            (partial / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def rows(seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of each data set; no held-out instruction is in another one."""
    asked = language.instructions()
    order, speakers, answers = np.random.default_rng(seed + 1).spawn(3)
    order.shuffle(asked)
    held, train = asked[:HELDOUT], asked[HELDOUT:]
    repeated = [train[i % len(train)] for i in range(SPEAKERS)]
    return {
        "speakers": [
            _row(f"s{i}", each, chosen=language.answer(each, speakers))
            for i, each in enumerate(repeated)
        ],
        "train": [
            _row(
                f"t{i}",
                each,
                chosen=language.answer(each, answers),
                rejected=language.answer(each, answers, uniform=True),
            )
            for i, each in enumerate(train)
        ],
        "heldout": [_row(f"h{i}", each) for i, each in enumerate(held)],
    }


def write_model(folder: Path, seed: int) -> None:
    """Writes a model with random weights, whose tokens are the words of the language."""
    folder.mkdir(parents=True)
    known = {word: i for i, word in enumerate([*SPECIAL, *language.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(each, special=True, normalized=False) for each in SPECIAL]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END},
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    end = {"eos_token_id": known[END], "pad_token_id": known[END]}
    _write_json(folder / "generation_config.json", end)
    config = from_hf(SIZES | {"vocab_size": len(known)})
    _write_json(folder / "config.json", to_hf(config) | end)
    two = jnp.zeros((1, 2), jnp.int32)
    save(nn.unbox(Decoder(config).init(jax.random.key(seed), two, two)["params"]), config, folder)


def _row(name: str, asked: language.Instruction, **answers: str) -> dict[str, Any]:
    """An instruction, and answers to it as whole conversations, by column."""
    ask = {"role": "user", "content": asked.text}
    said = {k: [ask, {"role": "assistant", "content": text}] for k, text in answers.items()}
    return {"prompt": asked.text, "prompt_id": name} | said


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(FOLDER)
    print(f"inputs: {FOLDER}")
