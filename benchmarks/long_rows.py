"""Times the gradients of one long row with each attention back end, in turn, in one process.

    python benchmarks/long_rows.py --rounds 3 --time 512 1024 2048

The shape of SmolLM2-135M with random weights, one row packed with prompts of 210 tokens and three
responses of 230 (in rows of 512, of 60 and 65), float32 on CPU, `remat: full`. Losses are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.bench.command import SHAPES
from selm_jax.bench.limits import cpu_name
from selm_jax.models.decoder import Decoder
from selm_jax.objectives.losses import selm
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import common_shape, pack
from selm_jax.training.loop import mean_lengths
from selm_jax.training.optimizer import optimizer
from selm_jax.training.update import make_update

BACK_ENDS = ("einsum", "blocks")


def examples(length: int) -> list[Example]:
    """Examples with prompts and responses of realistic lengths, as many as fit in a row."""
    rng = np.random.default_rng(0)
    prompt, response = (210, 230) if length >= 1024 else (60, 65)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(5, 40000, count)))

    roles = {"chosen": 0, "rejected": 1, "explore": 2}
    return [
        Example(str(i), ids(prompt), tuple(ids(response) for _ in range(3)), roles, (-1.0,) * 3)
        for i in range(length // (prompt + 3 * response))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--time", type=int, nargs="+", default=[512, 1024, 2048])
    options = parser.parse_args()
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} CPUs, jax {jax.__version__}")
    config = SHAPES["135m"]
    two = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), two, two)["params"])
    adamw = optimizer("adamw", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    for length in options.time:
        found = examples(length)
        (batch,) = pack(found, common_shape([found], rows=1, time=length))
        means = mean_lengths(found)
        steps, memory, losses = {}, {}, {}
        for name in BACK_ENDS:
            decoder = Decoder(config, remat="full", back_end=name)
            update = make_update(decoder, selm(0.01, 0.001), adamw, chunk=32)
            steps[name] = update.gradients.lower(params, batch, means).compile()
            memory[name] = steps[name].memory_analysis().temp_size_in_bytes / 2**20
        seconds: dict[str, list[float]] = {name: [] for name in BACK_ENDS}
        for _ in range(options.rounds):
            for name, step in steps.items():
                started = time.perf_counter()
                _, sums = jax.block_until_ready(step(params, batch, means))
                seconds[name].append(time.perf_counter() - started)
                losses[name] = float(sums["loss"])
        assert abs(losses["blocks"] / losses["einsum"] - 1) < 1e-5, losses
        for name, own in seconds.items():
            print(
                f"{length:6}  {name:8} {statistics.median(own):8.2f} s, "
                f"temporaries {memory[name]:6.0f} MiB"
            )
        ratios = [a / b for a, b in zip(seconds["einsum"], seconds["blocks"], strict=True)]
        print(
            f"{length:6}  blocks are {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f}-{max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
