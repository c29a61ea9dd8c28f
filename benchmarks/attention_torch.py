"""Times attention over packed prompt trees, forward and backward: our back ends and torch in turn.

    python benchmarks/attention_torch.py --rounds 5                     # times, one process
    python benchmarks/attention_torch.py --rounds 1 --alone blocks --time 4096      # and memory

One row, the heads of SmolLM2-135M (9 query heads, 3 key-value heads of 64), float32 on CPU. The row
is packed with prompts of 210 tokens and three responses of 230 each. The torch contestant is
scaled_dot_product_attention with a boolean mask of time x time that is made beforehand; it is left
out if torch is not installed. Outputs are compared first. `--alone` runs one contestant in the
process and shows how much its resident memory grew after the arrays were made.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable

# Before torch starts its threads: spinning, they would take the cores from the other side's turn.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.bench.limits import cpu_name
from selm_jax.models.attention import attention
from selm_jax.models.sight import Sight

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
PROMPT, RESPONSE, RESPONSES = 210, 230, 3

Step = Callable[[], np.ndarray]  # one forward and backward pass; gives the gradient of the queries


def packed_row(length: int) -> Sight:
    position, end = np.zeros((2, 1, length), np.int32)
    for first in range(0, length, PROMPT + RESPONSES * RESPONSE):
        at = first + PROMPT
        tree_end = min(at + RESPONSES * RESPONSE, length)
        position[0, first:at] = np.arange(len(position[0, first:at]))
        end[0, first:at] = tree_end
        for begin in range(at, tree_end, RESPONSE):
            stop = min(begin + RESPONSE, length)
            position[0, begin:stop] = PROMPT + np.arange(stop - begin)
            end[0, begin:stop] = stop
    return Sight(jnp.asarray(position), jnp.asarray(position), jnp.asarray(end))


def arrays(length: int) -> tuple[np.ndarray, ...]:
    """Queries, keys, values and the gradient of the output, [1, length, heads, head_dim]."""
    rng = np.random.default_rng(0)
    return tuple(
        rng.normal(size=(1, length, heads, HEAD_DIM)).astype(np.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )


def ours(back_end: str, length: int) -> Step:
    def both(query, keys, values, gradient, sight):
        how = {"scale": HEAD_DIM**-0.5, "back_end": back_end}
        _, backward = jax.vjp(lambda *x: attention(*x, sight, **how), query, keys, values)
        return backward(gradient)

    given = (*map(jnp.asarray, arrays(length)), packed_row(length))
    compiled = jax.jit(both).lower(*given).compile()
    return lambda: np.asarray(jax.block_until_ready(compiled(*given))[0])


def torchs(length: int) -> Step:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    query, keys, values, gradient = (
        torch.from_numpy(x).transpose(1, 2).contiguous() for x in arrays(length)
    )
    mask = torch.from_numpy(np.array(packed_row(length).mask()))[:, None]
    for x in (query, keys, values):
        x.requires_grad_()

    def step() -> np.ndarray:
        query.grad = keys.grad = values.grad = None
        out = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=True
        )
        out.backward(gradient)
        return query.grad.transpose(1, 2).numpy()

    return step


CONTESTANTS = {
    "einsum": lambda length: ours("einsum", length),
    "blocks": lambda length: ours("blocks", length),
    "torch": torchs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--time", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--alone", choices=CONTESTANTS)
    options = parser.parse_args()
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} CPUs, jax {jax.__version__}")
    for length in options.time:
        steps: dict[str, Step] = {}
        for name in [options.alone] if options.alone else CONTESTANTS:
            try:
                steps[name] = CONTESTANTS[name](length)
            except ImportError:
                print("torch is not installed, so it is not timed")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = [step() for step in steps.values()]
        for each in found[1:]:
            np.testing.assert_allclose(each, found[0], rtol=1e-4, atol=1e-5)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
        show(length, seconds)
        if options.alone:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(f"{length:6}  resident memory grew by {grown / 1024:.0f} MiB")


def show(length: int, seconds: dict[str, list[float]]) -> None:
    """Prints median times, and the median, least and greatest time relative to `blocks`."""
    for name, own in seconds.items():
        line = f"{length:6}  {name:8} {statistics.median(own):8.4f} s"
        if "blocks" in seconds and name != "blocks":
            ratios = [a / b for a, b in zip(own, seconds["blocks"], strict=True)]
            line += f"   {statistics.median(ratios):6.2f} times the blocks' "
            line += f"({min(ratios):.2f}-{max(ratios):.2f})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
