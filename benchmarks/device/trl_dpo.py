"""Measures TRL's DPO on the shapes and lengths that `ours.py` wrote, for `device.sh`.

usage: trl_dpo.py OUT SHAPE

Full fine-tuning of random weights with TRL's own defaults (bfloat16 and gradient checkpointing on a
GPU, PyTorch's attention), stored reference log-probabilities, and a pair for each of our examples.
Appends each measurement to OUT/results.jsonl as soon as it is made. Needs torch and trl, but not
selm_jax.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

LEFT_OUT = 3  # exit status
MICROBATCHES = 4


def main(out: str, shape: str) -> None:
    try:
        import trl  # noqa: F401
    except ImportError as e:
        print(f"TRL is left out: {e}")
        sys.exit(LEFT_OUT)
    work = json.loads((Path(out) / "work.json").read_text())
    for length, examples in work["examples"].items():
        head = {"what": "train", "by": "TRL DPO", "shape": shape, "row_length": int(length)}
        try:
            found = measure(work["shapes"][shape], examples, work["steps"])
        except Exception as e:  # noqa: BLE001 (of torch, of TRL, or for lack of memory)
            traceback.print_exc()
            found = {"error": f"{type(e).__name__}: {e}".splitlines()[0][:200]}
        gc.collect()
        with (Path(out) / "results.jsonl").open("a") as file:
            file.write(json.dumps(head | found) + "\n")


def measure(facts: dict, examples: list[list[int]], steps: int) -> dict:
    """Seconds of each step after the first one; a step trains on all examples."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    on_gpu = torch.cuda.is_available()
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return rng.choices(range(5, facts["vocab_size"]), k=count)

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset, *rest, **named):
            return dataset  # it has token ids already

    class Stopwatch(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, *_, **__):
            if on_gpu:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    pairs = [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected)}
        for _ in range(steps + 1)
        for prompt, chosen, rejected, *_ in examples
    ]
    count = max(n for n in range(1, MICROBATCHES + 1) if len(examples) % n == 0)
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(examples) // count,
        gradient_accumulation_steps=count, max_steps=steps + 1, learning_rate=1e-6,
        lr_scheduler_type="constant", max_length=None, optim="adamw_torch", bf16=on_gpu,
        precompute_ref_log_probs=True, logging_steps=10**9, save_strategy="no", report_to=[],
        use_cpu=not on_gpu, disable_tqdm=True, seed=0,
    )  # fmt: skip
    watch = Stopwatch()
    trainer = Tokenized(
        model=LlamaForCausalLM(LlamaConfig(**facts, pad_token_id=0, eos_token_id=1)),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(facts["vocab_size"]),
        callbacks=[watch],
    )
    trainer.train()
    return {
        "seconds": [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)],
        "microbatches": count,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        "versions": versions("torch", "trl", "transformers"),
    }


def tokenizer(vocab_size: int):
    """A tokenizer that the trainer can hold: the texts are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(min(vocab_size, 8))}
    model = Tokenizer(WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="0", eos_token="1")


def versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in packages}


if __name__ == "__main__":
    main(*sys.argv[1:])
