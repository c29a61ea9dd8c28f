"""Compares our reward models with transformers in torch: answers per second, taking turns.

    python benchmarks/reward_model_torch.py --rounds 5

Both run in one process and compute the same scores from the same random weights (this is checked
first), in float32 on CPU, for four answers to each prompt. Ours starts from texts. The torch side
(LlamaForSequenceClassification) starts from token ids, sorted by length and in batches of the same
number of tokens. Needs torch and an idle machine: on a busy one XLA's threads wait for each other,
and the ratio of times is not reliable. The table also has the ratio of CPU seconds, which is less
affected.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

# Set before torch starts its threads: spinning threads would slow down the other side's turn.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification

from selm_jax.feedback.models.reward_model import RewardModel, reward_model
from selm_jax.feedback.ranker import Question
from selm_jax.text.prompts import Message

WORDS = [f"w{i}" for i in range(500)]
SPECIAL = ["[PAD]", "[UNK]", "[USER]", "[ASSISTANT]", "[END]"]
TEMPLATE = "{% for m in messages %}[{{ m.role | upper }}] {{ m.content }} [END] {% endfor %}"
ANSWERS = 4  # per prompt
BATCH_TOKENS = 1024  # tokens of one forward pass, like the default of `reward_model` on CPU

# Width, layers, heads, key-value heads, MLP width. small is SmolLM2-135M without its embedding.
SIZES = {"tiny": (128, 4, 4, 2, 384), "small": (576, 30, 9, 3, 1536)}


def make(size: str, folder: Path) -> LlamaForSequenceClassification:
    """Makes a random reward model and writes it to the folder, with a tokenizer of whole words."""
    width, layers, heads, kv_heads, mlp = SIZES[size]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=mlp,
        max_position_embeddings=2048, num_labels=1, pad_token_id=0, bos_token_id=None,
        eos_token_id=vocab["[END]"],
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "[END]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return model


def some_texts(prompts: int) -> tuple[list[Question], list[list[str]]]:
    """Random prompts of 20 to 200 words with answers of 30 to 250; each word is a token."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    asked = [text(20, 200) for _ in range(prompts)]
    questions = [Question(p, (Message("user", p),), {}, str(i)) for i, p in enumerate(asked)]
    return questions, [[text(30, 250) for _ in range(ANSWERS)] for _ in asked]


def torch_batches(folder: Path, questions, answers):
    """Makes batches for torch: (indices of the answers, (ids, mask))."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = [
        tokenizer.encode(f"[USER] {q.prompt} [END] [ASSISTANT] {text} [END]").ids
        for q, texts in zip(questions, answers, strict=True)
        for text in texts
    ]
    todo = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    batches = []
    while todo:
        rows = max(1, BATCH_TOKENS // len(encoded[todo[0]]))
        part, todo = todo[:rows], todo[rows:]
        ids = torch.zeros(len(part), len(encoded[part[0]]), dtype=torch.long)
        for row, i in enumerate(part):
            ids[row, : len(encoded[i])] = torch.tensor(encoded[i])
        batches.append((part, {"input_ids": ids, "attention_mask": (ids != 0).long()}))
    return batches


def timed(work) -> tuple[float, float]:
    """Runs `work`; returns the elapsed seconds and the CPU seconds of all cores."""
    began = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def compare(size: str, prompts: int, rounds: int) -> dict:
    questions, answers = some_texts(prompts)
    count = ANSWERS * prompts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make(size, folder)
        batches = torch_batches(folder, questions, answers)
        ranker: RewardModel = reward_model(name)
        params = ranker._load()  # read once: the benchmark compares only scoring
        ranker._load = lambda: params

        def in_torch() -> np.ndarray:
            scores = np.zeros(count)
            with torch.inference_mode():
                for part, inputs in batches:
                    scores[part] = model(**inputs, use_cache=False).logits[:, 0].numpy()
            return scores

        def ours() -> np.ndarray:
            return np.concatenate(ranker.scores(questions, answers))

        both = {"ours": ours, "torch": in_torch}
        found = {name: work() for name, work in both.items()}  # compiles, and warms up
        np.testing.assert_allclose(found["ours"], found["torch"], atol=1e-4)
        seconds: dict[str, list[float]] = {name: [] for name in both}
        of_cores: dict[str, list[float]] = {name: [] for name in both}
        for turn in range(rounds):
            for name in sorted(both, reverse=bool(turn % 2)):
                wall, cores = timed(both[name])
                seconds[name].append(wall)
                of_cores[name].append(cores)
    return {
        "size": size,
        "parameters": sum(p.numel() for p in model.model.layers.parameters()),
        "tokens_per_answer": sum(int(x["attention_mask"].sum()) for _, x in batches) / count,
        "computed_per_answer": ranker.report()["tokens"] / count,
        "seconds": seconds,
        "cpu_seconds": of_cores,
        "answers_per_second": {n: count / statistics.median(s) for n, s in seconds.items()},
        "ratio": ratio(seconds),
        "cpu_ratio": ratio(of_cores),
    }


def ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(t / o for t, o in zip(seconds["torch"], seconds["ours"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds")
    parser.add_argument("--prompts", type=int, default=8, help="prompts for small (8x for tiny)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", type=Path, help="file for all measured times")
    settings = parser.parse_args()
    results = [
        compare(size, settings.prompts * (8 if size == "tiny" else 1), settings.rounds)
        for size in settings.sizes
    ]
    table = Table(
        "model", "tokens an answer", "computed", "ours, answers/s", "torch, answers/s", "ratio",
        "of CPU seconds",
    )  # fmt: skip
    for r in results:
        speed = r["answers_per_second"]
        table.add_row(
            f"{r['size']}, {r['parameters'] / 1e6:.1f} M", f"{r['tokens_per_answer']:.0f}",
            f"{r['computed_per_answer']:.0f}", f"{speed['ours']:.2f}", f"{speed['torch']:.2f}",
            f"{r['ratio']:.2f}", f"{r['cpu_ratio']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
