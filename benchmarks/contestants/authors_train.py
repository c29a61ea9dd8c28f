"""Contestant: the SELM authors' training step (their scripts/selm_trainer.py), in plain torch.

usage: authors_train.py MODEL DATA

The policy does one forward pass over [chosen; rejected] and a second one over the reference
response, with full logits. The reference model does the same in each step, without gradients. Then
come the backward pass, clipping to norm 1, and AdamW. Their own code cannot be used because it
needs outdated versions of its libraries.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM
from worker import read_data, torch_worker, versions


def main(model_folder, data_file):
    data = read_data(data_file)
    s = data["settings"]

    def load():
        return AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=torch.float32, attn_implementation="sdpa"
        )

    model, reference = load().train(), load().eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["learning_rate"], weight_decay=0.0)
    worker = torch_worker()
    worker.ready(versions("torch", "transformers"))
    for rows in data["train"]:
        if not worker.wait():
            return
        pairs = padded([(row["prompt"], row["responses"][i]) for i in range(2) for row in rows])
        thirds = padded([(row["prompt"], row["responses"][2]) for row in rows])
        worker.begin()
        policy = three(model, pairs, thirds)
        with torch.no_grad():
            stored = three(reference, pairs, thirds)
        chosen, rejected, explore = (p - r for p, r in zip(policy, stored, strict=True))
        dpo = -logsigmoid(s["beta"] * (chosen - rejected))
        loss = (dpo + s["alpha"] * s["beta"] * explore).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        worker.end(loss=loss.item())


def padded(texts):
    """Token ids, attention mask and mask of response tokens, padded to the longest text."""
    time = max(len(prompt) + len(response) for prompt, response in texts)
    ids, seen, scored = torch.zeros(3, len(texts), time, dtype=torch.long)
    for i, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        seen[i, :end] = 1
        scored[i, len(prompt) : end] = 1
    return ids, seen, scored


def three(model, pairs, thirds):
    """Log-probabilities of the chosen, rejected and reference responses of each example."""
    return *logps(model, *pairs).chunk(2), logps(model, *thirds)


def logps(model, ids, seen, scored):
    logits = model(ids, attention_mask=seen, use_cache=False).logits.float()
    of_token = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (of_token * scored[:, 1:]).sum(-1)


if __name__ == "__main__":
    main(*sys.argv[1:])
