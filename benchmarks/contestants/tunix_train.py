"""Contestant: full fine-tuning on pairs with Tunix's DPOTrainer.

usage: tunix_train.py MODEL DATA KIND        KIND: live, or none (Tunix then drops the reference
term from the loss: the time is that of a cached reference, but the loss differs)
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import jax
import numpy as np
import optax
import tunix_model
from flax import nnx
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
from worker import jax_worker, read_data, versions


def main(model_folder, data_file, kind):
    data = read_data(data_file)
    s, steps = data["settings"], data["train"]
    model, _ = tunix_model.load(model_folder)
    reference = tunix_model.load(model_folder)[0] if kind == "live" else None
    worker = jax_worker()
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(s["learning_rate"], weight_decay=0.0)
        ),
        training_config=DPOTrainingConfig(
            eval_every_n_steps=10**9, max_steps=len(steps) + 1, beta=s["beta"]
        ),
    )

    rows = [row for step in steps for row in step]
    longest = (
        max(len(row["prompt"]) for row in rows),
        max(len(response) for row in rows for response in row["responses"][:2]),
    )

    def feed():
        # The trainer requests a batch after queueing the previous step: wait for that step here.
        worker.ready(versions("google-tunix", "jax", "flax"))
        for i, rows in enumerate(steps):
            if i:
                jax.block_until_ready(nnx.state(trainer.model))
                worker.end()
            if not worker.wait():
                sys.exit(0)
            worker.begin()
            yield batch(rows, longest)
        jax.block_until_ready(nnx.state(trainer.model))
        worker.end()

    trainer.train(feed())


def batch(rows, longest):
    """Prompts padded on the left and responses on the right, as Tunix expects them."""

    def ids(lists, time, left=False):
        x, mask = np.zeros((len(lists), time), np.int32), np.zeros((len(lists), time), bool)
        for i, tokens in enumerate(lists):
            at = slice(time - len(tokens), time) if left else slice(len(tokens))
            x[i, at], mask[i, at] = tokens, True
        return x, mask

    prompt, prompt_mask = ids([row["prompt"] for row in rows], longest[0], left=True)
    chosen, chosen_mask = ids([row["responses"][0] for row in rows], longest[1])
    rejected, rejected_mask = ids([row["responses"][1] for row in rows], longest[1])
    return TrainingInput(
        prompt_ids=prompt, prompt_mask=prompt_mask, chosen_ids=chosen, chosen_mask=chosen_mask,
        rejected_ids=rejected, rejected_mask=rejected_mask,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
