"""The recipe of the SELM authors in plain torch (scripts/selm_trainer.py of their repository).

usage: authors_train.py MODEL DATA

Policy: one forward pass over [chosen; rejected], a second one over the reference response, full
logits. The reference model does the same, live, without gradients. Then backward, clipping to norm
1, AdamW. Their own code needs versions of its libraries that are long gone.
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
        # [role, example, time]
        ids = torch.tensor(
            [[row["prompt"] + row["responses"][i] for row in rows] for i in range(3)]
        )
        worker.begin()
        policy = three(model, ids, s["prompt"])
        with torch.no_grad():
            stored = three(reference, ids, s["prompt"])
        chosen, rejected, explore = (p - r for p, r in zip(policy, stored, strict=True))
        dpo = -logsigmoid(s["beta"] * (chosen - rejected))
        loss = (dpo + s["alpha"] * s["beta"] * explore).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        worker.end(loss=loss.item())


def three(model, ids, prompt):
    """Log-probability of the chosen, the rejected and the reference response of each example."""
    both = logps(model, ids[:2].flatten(0, 1), prompt)
    return *both.chunk(2), logps(model, ids[2], prompt)


def logps(model, ids, prompt):
    logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    of_token = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return of_token[:, prompt - 1 :].sum(-1)


if __name__ == "__main__":
    main(*sys.argv[1:])
