"""Compares our PairRM with the same model in torch: pairs per second, taking turns in one process.

    python benchmarks/pairrm_torch.py --rounds 5

Both compute the same logits from the same random weights (this is checked first), in float32 on
CPU. Ours starts from texts. The torch side (transformers' DebertaV2Model with PairRM's head) starts
from token ids, sorted by length and in batches of the same number of tokens. Needs torch.
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

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DebertaV2Config, DebertaV2Model

from selm_jax.feedback.models.pairrm import pairrm

WORDS = [f"w{i}" for i in range(500)]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
BATCH_TOKENS = 1024  # tokens of one forward pass, like the default of `pairrm` on CPU

# Hidden size, layers, heads, MLP size. base is DeBERTa-v3-base without its embedding: 86 M.
SIZES = {"tiny": (128, 4, 4, 512), "base": (768, 12, 12, 3072)}


class TorchPairRM(torch.nn.Module):
    def __init__(self, size: str):
        super().__init__()
        width, layers, heads, mlp = SIZES[size]
        self.config = DebertaV2Config(
            vocab_size=len(SPECIAL) + len(WORDS) + len(PREFIXES), hidden_size=width,
            num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=mlp,
            relative_attention=True, position_buckets=256, max_position_embeddings=512,
            pos_att_type="p2c|c2p", share_att_key=True, norm_rel_ebd="layer_norm",
            position_biased_input=False,
        )  # fmt: skip
        self.pretrained_model = DebertaV2Model(self.config)
        self.head_layer = torch.nn.Sequential(
            torch.nn.Dropout(0.05), torch.nn.Linear(2 * width, width), torch.nn.Tanh(),
            torch.nn.Dropout(0.05), torch.nn.Linear(width, 1),
        )  # fmt: skip
        self.eval()

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, real: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        hidden = self.pretrained_model(input_ids=ids, attention_mask=real).last_hidden_state
        source, *candidates = hidden[torch.arange(len(ids))[:, None], at].unbind(1)
        first, second = (self.head_layer(torch.cat([source, c], -1))[:, 0] for c in candidates)
        return first - second


def write_folder(model: TorchPairRM, folder: Path) -> None:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *PREFIXES])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(PREFIXES)
    tokenizer.save(str(folder / "tokenizer.json"))
    keys = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
    own = {"n_tasks": 1, "drop_out": 0.05} | {
        key: vocab[token] for key, token in zip(keys, PREFIXES, strict=True)
    }
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | own))
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def some_pairs(count: int) -> list[tuple[str, str, str]]:
    """Random pairs: sources of 20 to 120 words, candidates of 30 to 250; each word is a token."""
    rng = random.Random(0)
    sizes = [
        (rng.randint(20, 120), rng.randint(30, 250), rng.randint(30, 250)) for _ in range(count)
    ]
    return [tuple(" ".join(rng.choices(WORDS, k=n)) for n in each) for each in sizes]


def torch_batches(pairs: list[tuple[str, str, str]]):
    """Makes batches for torch: (indices of the pairs, (ids, mask, positions of the prefixes))."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *PREFIXES])}

    def encode(pair):
        segments = [
            [1, vocab[prefix], *(vocab[word] for word in text.split()), 2]
            for prefix, text in zip(PREFIXES, pair, strict=False)
        ]
        starts = np.cumsum([0, *map(len, segments)])[:3] + 1
        return [i for segment in segments for i in segment], starts

    encoded = [encode(pair) for pair in pairs]
    todo = sorted(range(len(pairs)), key=lambda i: -len(encoded[i][0]))
    batches = []
    while todo:
        time_ = len(encoded[todo[0]][0])
        rows = max(1, BATCH_TOKENS // time_)
        part, todo = todo[:rows], todo[rows:]
        ids = torch.zeros(len(part), time_, dtype=torch.long)
        for row, i in enumerate(part):
            ids[row, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
        at = torch.tensor(np.array([encoded[i][1] for i in part]))
        batches.append((part, (ids, (ids != 0).long(), at)))
    return batches


def timed(work) -> tuple[float, np.ndarray]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def compare(size: str, count: int, rounds: int) -> dict:
    torch.manual_seed(0)
    model = TorchPairRM(size)
    pairs = some_pairs(count)
    batches = torch_batches(pairs)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(model, Path(folder))
        ranker = pairrm(folder)

    def in_torch():
        logits = np.zeros(len(pairs))
        for part, inputs in batches:
            logits[part] = model(*inputs).numpy()
        return logits

    both = {"ours": lambda: ranker.logits(pairs), "torch": in_torch}
    found = {name: work() for name, work in both.items()}  # compiles, and warms up
    np.testing.assert_allclose(found["ours"], found["torch"], atol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(rounds):
        for name in sorted(both, reverse=bool(turn % 2)):
            seconds[name].append(timed(both[name])[0])
    tokens = sum(int(real.sum()) for _, (_, real, _) in batches)
    return {
        "size": size,
        "parameters": sum(p.numel() for p in model.pretrained_model.encoder.parameters()),
        "tokens_per_pair": tokens / count,
        "seconds": seconds,
        "pairs_per_second": {n: count / statistics.median(s) for n, s in seconds.items()},
        "ratios": sorted(t / o for t, o in zip(seconds["torch"], seconds["ours"], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds")
    parser.add_argument(
        "--pairs", type=int, default=16, help="pairs for the base model (8x for the tiny one)"
    )
    parser.add_argument("--json", type=Path, help="file for all measured times")
    settings = parser.parse_args()
    results = [
        compare("tiny", 8 * settings.pairs, settings.rounds),
        compare("base", settings.pairs, settings.rounds),
    ]
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; jax {jax.__version__}, torch "
          f"{torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    names = ("model", "tokens a pair", "ours, pairs/s", "torch, pairs/s", "ratio", "per round")
    table = Table(*names)
    for r in results:
        speed = r["pairs_per_second"]
        table.add_row(
            f"{r['size']}, {r['parameters'] / 1e6:.1f} M", f"{r['tokens_per_pair']:.0f}",
            f"{speed['ours']:.2f}", f"{speed['torch']:.2f}",
            f"{statistics.median(r['ratios']):.2f}",
            f"{r['ratios'][0]:.2f}-{r['ratios'][-1]:.2f}",
        )  # fmt: skip
    Console().print(table)
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
