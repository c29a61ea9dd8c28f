"""Times what the sampling filters add to a decoding step of SmolLM2-135M-Instruct.

    python benchmarks/sampler_filters.py [--slots 16] [--rounds 5]

Each setting of the sampler decodes the same 16 prompts for 32 tokens; the settings take turns. The
time of a step is the whole time minus that of the prefill, divided by the number of steps. Results
are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.bench.limits import cpu_name
from selm_jax.models.decoder import Decoder
from selm_jax.models.families import read_config
from selm_jax.parallel.mesh import decode_mesh, make_mesh
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.weights import huggingface, sources

PROMPT, RESPONSE = 64, 32  # tokens
SETTINGS = {
    "no filter": Sampling(),
    "min_p 0.1": Sampling(min_p=0.1),
    "top_k 50": Sampling(top_k=50),
    "top_p 0.9": Sampling(top_p=0.9),
    "top_k 50, top_p 0.9": Sampling(top_k=50, top_p=0.9),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--slots", type=int, default=16)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} CPUs, jax {jax.__version__}")

    folder = Path(sources.resolve("HuggingFaceTB/SmolLM2-135M-Instruct").path)
    config = read_config(folder)
    mesh = decode_mesh(make_mesh((1, -1, 1)), 1)
    params = decoding_params(
        huggingface.load(folder, config), jnp.float32, decoding_shardings(config, mesh)
    )
    rng = np.random.default_rng(0)
    requests = [
        Request(i, tuple(map(int, rng.integers(0, config.vocab_size, PROMPT))), 0, 1)
        for i in range(given.slots)
    ]

    def answer(sampling: Sampling, new_tokens: int):
        engine = Engine.fitted(
            decoder=Decoder(config, jnp.float32, scan=False), sampling=sampling,
            slots=given.slots, max_prompt=PROMPT, max_new_tokens=new_tokens, stop_ids=(),
            prefill_rows=given.slots, mesh=mesh,
        )  # fmt: skip
        return partial(engine.generate, params, requests, seed=0, iteration=1)

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    prefill = answer(Sampling(), 1)
    wholes = {name: answer(sampling, RESPONSE) for name, sampling in SETTINGS.items()}
    for work in (prefill, *wholes.values()):
        work()  # compiles
    taken = {name: [] for name in wholes}
    for _ in range(given.rounds):
        before = seconds(prefill)
        for name, whole in wholes.items():
            taken[name].append((seconds(whole) - before) / (RESPONSE - 1))
    plain = statistics.median(taken["no filter"])
    for name, steps in taken.items():
        step = statistics.median(steps)
        print(f"{name:20s} {1e3 * step:6.1f} ms a step   {step / plain:.2f} of no filter")


if __name__ == "__main__":
    main()
