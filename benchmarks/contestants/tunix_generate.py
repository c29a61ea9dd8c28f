"""Contestant: generation with Tunix's Sampler.

usage: tunix_generate.py MODEL DATA
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tunix_model
from transformers import AutoTokenizer
from tunix.generate.sampler import CacheConfig, Sampler
from worker import jax_worker, read_data, versions


def main(model_folder, data_file):
    data = read_data(data_file)
    s, prompts = data["settings"], data["generate"]
    model, config = tunix_model.load(model_folder)
    sampler = Sampler(
        model,
        AutoTokenizer.from_pretrained(model_folder),
        CacheConfig(
            cache_size=s["prompt"] + s["response"] + 8,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        ),
    )
    # The sampler takes texts and adds its own first token.
    texts = [p["text"] for p in prompts]
    worker = jax_worker()
    worker.ready(versions("google-tunix", "jax", "flax"))
    step = 0
    while worker.wait():
        worker.begin()
        out = sampler(
            texts, max_generation_steps=s["response"], max_prompt_length=s["prompt"],
            temperature=1.0, top_p=1.0, seed=step, eos_tokens=[config.vocab_size - 1],
        )  # fmt: skip
        worker.end(tokens=sum(len(t) for t in out.tokens))
        step += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
