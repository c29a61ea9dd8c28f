"""Contestant: generation with the rollout engine of this package.

usage: selm_generate.py MODEL DATA
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
from worker import jax_worker, read_data, versions

from selm_jax.models.decoder import Decoder
from selm_jax.models.families import read_config
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.weights.huggingface import load


def main(model, data_file):
    data = read_data(data_file)
    s, prompts = data["settings"], data["generate"]
    config = read_config(Path(model))
    params = decoding_params(load(Path(model), config), jnp.float32)
    engine = Engine(
        Decoder(config, scan=False), Sampling(), slots=len(prompts), max_prompt=s["prompt"],
        max_new_tokens=s["response"], stop_ids=(), prefill_rows=len(prompts),
    )  # fmt: skip
    requests = [Request(i, tuple(p["ids"]), 0, 1) for i, p in enumerate(prompts)]
    worker = jax_worker()
    worker.ready(versions("jax", "flax"))
    step = 0
    while worker.wait():
        worker.begin()
        responses = engine.generate(params, requests, seed=0, iteration=step)
        worker.end(tokens=sum(len(r.tokens) for r in responses))
        step += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
