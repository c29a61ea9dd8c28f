"""Times what filters and kept log-probabilities add to a decoding step of SmolLM2-135M-Instruct.

    python benchmarks/sampler_filters.py [--slots 16] [--rounds 5] [--only "no log-probabilities"]

Each setting of the sampler decodes the same 16 prompts for 32 tokens. The settings take turns, in
the other order in every second round, and are compared with no filter. The time of a step is the
whole time minus that of the prefill, divided by the number of steps. On CPU it is the time of all
processors, which other work disturbs less. Results are medians over the rounds, and ratios are
medians of each round's ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.bench.limits import cpu_name
from selm_jax.models.decoder import Decoder
from selm_jax.models.families import read_config
from selm_jax.parallel.mesh import decode_mesh, make_mesh
from selm_jax.rollout import slots
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Drawn, Sampling, next_tokens
from selm_jax.weights import huggingface, sources

PROMPT, RESPONSE = 64, 32  # tokens
SETTINGS = {
    "no filter": Sampling(),
    "min_p 0.1": Sampling(min_p=0.1),
    "top_k 50": Sampling(top_k=50),
    "top_p 0.9": Sampling(top_p=0.9),
    "top_k 50, top_p 0.9": Sampling(top_k=50, top_p=0.9),
}
BARE = "no log-probabilities"


class Bare(Engine):
    """An engine that keeps no log-probabilities; as another class it has programs of its own."""


def bare_tokens(*given) -> Drawn:
    token = next_tokens(*given).token
    return Drawn(token, *[jnp.zeros(token.shape)] * 2)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--slots", type=int, default=16)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", action="append", choices=[*SETTINGS, BARE])
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

    def answer(sampling: Sampling, new_tokens: int, kind: type[Engine] = Engine):
        engine = kind.fitted(
            decoder=Decoder(config, jnp.float32, scan=False), sampling=sampling,
            slots=given.slots, max_prompt=PROMPT, max_new_tokens=new_tokens, stop_ids=(),
            prefill_rows=given.slots, mesh=mesh,
        )  # fmt: skip
        return partial(engine.generate, params, requests, seed=0, iteration=1)

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def seconds(work) -> float:
        started = clock()
        work()
        return clock() - started

    prefill = answer(Sampling(), 1)
    wholes = {name: answer(sampling, RESPONSE) for name, sampling in SETTINGS.items()}
    wholes[BARE] = answer(Sampling(), RESPONSE, Bare)
    wholes = {k: v for k, v in wholes.items() if k in ("no filter", *(given.only or wholes))}
    prefill()  # compiles, as do the others
    for name, whole in wholes.items():
        found = bare_tokens if name == BARE else next_tokens
        with mock.patch.object(slots, "next_tokens", found):
            whole()
    taken = {name: [] for name in wholes}
    for round in range(given.rounds):
        before = seconds(prefill)
        for name in list(wholes)[:: -1 if round % 2 else 1]:
            taken[name].append((seconds(wholes[name]) - before) / (RESPONSE - 1))
    for name, steps in taken.items():
        ratio = statistics.median(a / b for a, b in zip(steps, taken["no filter"], strict=True))
        step = 1e3 * statistics.median(steps)
        print(f"{name:20s} {step:6.1f} ms a step   {ratio:.3f} of no filter")


if __name__ == "__main__":
    main()
