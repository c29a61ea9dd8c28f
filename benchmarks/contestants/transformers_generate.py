"""Contestant: generation with transformers' `generate`.

usage: transformers_generate.py MODEL DATA
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM
from worker import read_data, torch_worker, versions


def main(model_folder, data_file):
    data = read_data(data_file)
    new, prompts = data["settings"]["response"], data["generate"]
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None  # every response has its full length
    ids = torch.tensor([p["ids"] for p in prompts])
    worker = torch_worker()
    worker.ready(versions("torch", "transformers"))
    while worker.wait():
        worker.begin()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        worker.end(tokens=out[:, ids.shape[1] :].numel())


if __name__ == "__main__":
    main(*sys.argv[1:])
