"""Measures the speed of updates and of generation on synthetic tokens."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from selm_jax.bench.clock import Clock, Times
from selm_jax.config import Training
from selm_jax.models import flops
from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Decoder, Params, abstract_params
from selm_jax.objectives.losses import selm
from selm_jax.parallel.mesh import decode_mesh, make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import common_shape, pack
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.training.loop import mean_lengths
from selm_jax.training.optimizer import optimizer
from selm_jax.training.state import TrainState
from selm_jax.training.update import Shardings, make_update

MakeParams = Callable[[Any], Params]  # from a tree of shardings


class BenchError(ValueError):
    """The requested measurement cannot be made."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the measured work: token lengths, batch sizes and repetitions.

    Attributes:
      prompt, response: the most tokens of a prompt and of a response. Examples have half to all of
        them, so that rows have as much padding as in practice. Generation uses full lengths.
      examples: number of examples per update.
      rows, row_length: rows of a packed batch, and tokens of a row.
      slots: number of responses that are decoded together.
      steps: number of repetitions, after one that does not count.
    """

    prompt: int
    response: int
    examples: int
    rows: int
    row_length: int
    slots: int
    steps: int = 5

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise BenchError(f"{name} is {value}; expected at least 1")


def training(
    config: DecoderConfig,
    make_params: MakeParams,
    sizes: Sizes,
    dtype: str,
    remat: str,
    clock: Clock,
) -> dict[str, Any]:
    """Measures the speed of SELM's updates with stored reference log-probabilities, as in runs."""
    mesh = make_mesh((1, -1, 1))
    where = Shardings(shardings(abstract_params(config), mesh, TRAINING), _replicated(mesh))
    adamw = optimizer("adamw", b1=Training.b1, b2=Training.b2, eps=Training.eps, weight_decay=0.0)
    update = make_update(
        Decoder(config, jnp.dtype(dtype), remat, mesh=mesh), selm(0.01, 0.001), adamw,
        chunk=Training.logprob_chunk, clip=Training.clip, shardings=where,
    )  # fmt: skip
    examples = _examples(sizes, config.vocab_size)
    shape = common_shape([examples], rows=sizes.rows, time=sizes.row_length)
    batches = pack(examples, shape)
    means = mean_lengths(examples)
    state = TrainState.create(make_params(where.params), adamw)

    def step():
        nonlocal state
        first, *rest = (place_rows(batch, mesh) for batch in batches)
        gradients, sums = update.gradients(state.params, first, means)
        for batch in rest:
            gradients, sums = update.add(gradients, sums, state.params, batch, means)
        state, _ = update.apply(state, gradients, sums, np.float32(1e-6))
        del gradients
        jax.block_until_ready(state)

    clock.measure(step, 1)
    times = clock.measure(step, sizes.steps)
    tokens = sum(e.tokens for e in examples)
    padded = len(batches) * shape.rows * shape.time
    work = flops.forward_and_backward(
        config, rows=len(batches) * shape.rows, time=shape.time, keys=shape.time,
        scored=shape.scored,
    )  # fmt: skip
    median = statistics.median(times.seconds)
    return times.against(work) | {
        "examples_per_second": len(examples) / median,
        "tokens_per_second": {"useful": tokens / median, "padded": padded / median},
        "tokens": {"useful": tokens, "padded": padded},
        "microbatches": len(batches),
    }


def generation(
    config: DecoderConfig, make_params: MakeParams, sizes: Sizes, dtype: str, clock: Clock
) -> dict[str, Any]:
    """Measures the speed of the prefill, and of decoding all tokens after the first."""
    if sizes.response < 2:
        raise BenchError(
            "response is 1: the prefill gives the first token, so none is decoded. Use 2 or more"
        )
    mesh = make_mesh((1, -1, 1))
    decoding = decode_mesh(mesh, 1)
    decoder = Decoder(config, jnp.dtype(dtype), scan=False, mesh=decoding)
    params = decoding_params(
        make_params(shardings(abstract_params(config), mesh, TRAINING)),
        jnp.dtype(dtype),
        decoding_shardings(config, decoding),
    )
    rng = np.random.default_rng(0)
    requests = [
        Request(i, tuple(map(int, rng.integers(0, config.vocab_size, sizes.prompt))), 0, 1)
        for i in range(sizes.slots)
    ]

    def answer(new_tokens: int) -> Callable[[], Any]:
        engine = Engine.fitted(
            decoder=decoder, sampling=Sampling(), slots=sizes.slots, max_prompt=sizes.prompt,
            max_new_tokens=new_tokens, stop_ids=(), prefill_rows=min(sizes.slots, 16),
            mesh=decoding,
        )  # fmt: skip
        return partial(engine.generate, params, requests, seed=0, iteration=1)

    prefill, whole = answer(1), answer(sizes.response)
    clock.measure(prefill, 1)
    clock.measure(whole, 1)
    prefills, wholes = Times([], []), Times([], [])
    for _ in range(sizes.steps):  # in turns, so that a slow minute is in both
        prefills += clock.measure(prefill, 1)
        wholes += clock.measure(whole, 1)
    before = statistics.median(prefills.seconds)
    decodes = dataclasses.replace(wholes, seconds=[s - before for s in wholes.seconds])
    if min(decodes.seconds) <= 0:
        raise BenchError(
            f"decoding {sizes.response} tokens per response took no longer than the prefill "
            f"({before:.4f} s), which is too little to measure. Use longer responses (--response)"
        )
    steps = sizes.response - 1
    read = flops.forward(config, rows=sizes.slots, time=sizes.prompt, keys=sizes.prompt, scored=1)
    written = flops.forward(
        config, rows=sizes.slots * steps, time=1, keys=sizes.prompt + sizes.response, scored=1
    )
    decode = statistics.median(decodes.seconds)
    return {
        "prefill": prefills.against(read)
        | {"tokens_per_second": sizes.slots * sizes.prompt / before},
        "decode": decodes.against(written)
        | {"tokens_per_second": sizes.slots * steps / decode, "ms_per_step": 1e3 * decode / steps},
    }


def _examples(sizes: Sizes, vocab: int) -> list[Example]:
    """Makes random examples with three responses, each half to all of the maximum length."""
    rng = np.random.default_rng(0)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(0, vocab, rng.integers(-(-most // 2), most + 1))))

    return [
        Example(
            f"synthetic {i}",
            ids(sizes.prompt),
            (ids(sizes.response), ids(sizes.response), ids(sizes.response)),
            {"chosen": 0, "rejected": 1, "explore": 2},
            (0.0, 0.0, 0.0),
        )
        for i in range(sizes.examples)
    ]


def _replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
