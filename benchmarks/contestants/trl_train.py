"""Contestant: full fine-tuning on pairs with TRL's DPOTrainer.

usage: trl_train.py MODEL DATA KIND        KIND: cached (precomputed reference) or live
"""

import os
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
from worker import read_data, torch_worker, versions


class Orders(TrainerCallback):
    """Makes TRL's trainer wait for a request on standard input before each step."""

    def __init__(self, worker):
        self.worker, self.said = worker, False

    def on_step_begin(self, *_, **__):
        if not self.said:  # the reference log-probabilities have just been computed
            self.worker.ready(versions("trl", "torch", "transformers"))
            self.said = True
        if not self.worker.wait():
            sys.exit(0)
        self.worker.begin()

    def on_step_end(self, *_, **__):
        self.worker.end()


def main(model_folder, data_file, kind):
    data = read_data(data_file)
    s, steps = data["settings"], data["train"]
    # The trainer itself appends the end token to each response.
    pairs = [
        {"prompt": row["prompt_text"], "chosen": row["texts"][0], "rejected": row["texts"][1]}
        for rows in steps
        for row in rows
    ]

    def load():
        return AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=torch.float32, attn_implementation="sdpa"
        )

    worker = torch_worker()
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(steps[0]),
        max_steps=len(steps), learning_rate=s["learning_rate"], lr_scheduler_type="constant",
        beta=s["beta"], max_length=None, train_sampling_strategy="sequential", max_grad_norm=1.0,
        optim="adamw_torch", bf16=False, gradient_checkpointing=False,
        precompute_ref_log_probs=kind == "cached", logging_steps=10**9, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=load(),
        ref_model=load() if kind == "live" else None,
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        callbacks=[Orders(worker)],
    )
    trainer.training_step = checked(trainer.training_step, steps[0])
    trainer.train()


def checked(step, rows):
    """Wraps the training step; raises if its batch is not that of the other contestants.

    All steps have examples of the lengths of `rows`.
    """
    pairs = [(len(row["prompt"]), len(row["responses"][i])) for i in range(2) for row in rows]
    expected = (
        (len(pairs), max(map(sum, pairs))),
        sum(map(sum, pairs)),
        sum(response for _, response in pairs),
    )

    def training_step(model, inputs, *rest, **named):
        found = (
            tuple(inputs["input_ids"].shape),
            int(inputs["attention_mask"].sum()),
            int(inputs["completion_mask"].sum()),
        )
        if found != expected:
            raise ValueError(
                f"TRL made a batch of {found}, but the others have {expected}. Check its settings"
            )
        return step(model, inputs, *rest, **named)

    return training_step


if __name__ == "__main__":
    main(*sys.argv[1:])
