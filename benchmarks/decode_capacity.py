"""Times decoding with room for long prompts against decoding with room for short ones.

    python benchmarks/decode_capacity.py [--slots 16] [--rounds 5]

Three engines take turns at answering the same prompts of 64 tokens with 64 tokens. The first allows
prompts of 64 tokens, the second of 4,096, and the third is the second with a cache that always has
its greatest capacity. The model has the shape of SmolLM2-135M and random weights. The time of a
step is the whole time minus that of answers of one token, divided by the number of steps. Ratios
are of medians over the rounds, and all answers must be equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.bench import limits
from selm_jax.bench.command import SHAPES
from selm_jax.models.decoder import Decoder
from selm_jax.rollout import schedule
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling

SHORT, LONG, ANSWER = 64, 4096, 64  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config = SHAPES["135m"]
    two = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), two, two)["params"])
    params = decoding_params(params, jnp.float32)
    rng = np.random.default_rng(0)
    requests = [
        Request(i, tuple(map(int, rng.integers(0, config.vocab_size, SHORT))), 0, 1)
        for i in range(options.slots)
    ]

    def answers(longest: int, new_tokens: int, least: int) -> Callable[[], list]:
        engine = Engine(
            Decoder(config, scan=False), Sampling(), options.slots, longest, new_tokens, stop_ids=()
        )

        def run():
            with mock.patch.object(schedule, "_LEAST", least):
                return engine.generate(params, requests, seed=0, iteration=1)

        return run

    usual = schedule._LEAST
    kinds = {"64 + 64": (SHORT, usual), "4096 + 64": (LONG, usual), "always whole": (LONG, LONG)}
    work = {
        (name, count): answers(longest, count, least)
        for name, (longest, least) in kinds.items()
        for count in (1, ANSWER)
    }
    found = {key: run() for key, run in work.items()}  # compiles
    assert all(found[name, ANSWER] == found["64 + 64", ANSWER] for name in kinds)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in work}
    for _ in range(options.rounds):
        for key, run in work.items():
            started = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - started)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    wholes = {name: medians[name, ANSWER] for name in kinds}
    steps = {name: (wholes[name] - medians[name, 1]) / (ANSWER - 1) for name in kinds}
    print(f"{limits.cpu_name()}, {os.cpu_count()} CPUs, {options.slots} slots, medians")
    for name in kinds:
        whole, step = wholes[name] / wholes["64 + 64"], steps[name] / steps["64 + 64"]
        print(
            f"{name:13} whole {wholes[name]:6.2f} s ({whole:5.2f})   "
            f"step {1e3 * steps[name]:6.1f} ms ({step:5.2f})"
        )


if __name__ == "__main__":
    main()
