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
from selm_jax.models.decoder import Decoder, Params, abstract_params, parameter_count
from selm_jax.objectives.losses import selm
from selm_jax.parallel.mesh import decode_mesh, make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings
from selm_jax.policy.sizes import LEAST
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import assign_rows, common_shape, pack
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.training.loop import mean_lengths
from selm_jax.training.optimizer import optimizer
from selm_jax.training.state import TrainState
from selm_jax.training.update import Shardings, make_update
from selm_jax.training.work import useful

MakeParams = Callable[[Any], Params]  # from a tree of shardings


class BenchError(ValueError):
    """The requested measurement cannot be made."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the measured work: token lengths, batch sizes and repetitions.

    Attributes:
      prompt, response: the most tokens of a prompt and of a response. Examples have half to all of
        them, so that rows have as much padding as in practice. Generation uses full lengths.
      rows: number of rows of a packed batch; row_length: tokens of a row.
      examples: number of examples per update; None for as many as fit in one batch.
      slots: number of responses that are decoded together.
      capacity: the most tokens of a prompt and its response that the engine accepts; None for
        those that are generated. More room must not make it slower.
      steps: number of repetitions, after one that does not count.
    """

    prompt: int
    response: int
    rows: int
    row_length: int
    slots: int
    examples: int | None = None
    capacity: int | None = None
    steps: int = 5

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 1:
                raise BenchError(f"{name} is {value}; expected at least 1")
        used = self.prompt + self.response
        if self.capacity is not None and self.capacity < used:
            raise BenchError(
                f"capacity is {self.capacity}, but a prompt and its response take {used} tokens. "
                "Raise --capacity, or lower --prompt or --response"
            )


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
        chunk=LEAST.chunk, clip=Training.clip, shardings=where,
    )  # fmt: skip
    examples = synthetic(sizes, config.vocab_size)
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
    median = statistics.median(times.seconds)
    return times.against(useful(config, examples) * 3) | {
        "rows": shape.rows,
        "row_length": shape.time,
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
    capacity = sizes.capacity or sizes.prompt + sizes.response

    def answer(new_tokens: int) -> Callable[[], Any]:
        engine = Engine.fitted(
            decoder=decoder, sampling=Sampling(), slots=sizes.slots,
            max_prompt=capacity - sizes.response, max_new_tokens=new_tokens, stop_ids=(),
            prefill_rows=min(sizes.slots, 16), mesh=decoding,
        )  # fmt: skip
        return partial(engine.generate, params, requests, seed=0, iteration=1)

    prefill, whole = answer(1), answer(sizes.response)
    clock.measure(prefill, 1)
    clock.measure(whole, 1)
    prefills, wholes = Times([], [], []), Times([], [], [])
    for _ in range(sizes.steps):  # in turns, so that a slow minute is in both
        prefills += clock.measure(prefill, 1)
        wholes += clock.measure(whole, 1)
    before = statistics.median(prefills.seconds)
    decodes = dataclasses.replace(wholes, seconds=[s - before for s in wholes.seconds])
    if min(decodes.seconds) <= 0:
        raise BenchError(
            f"generating {sizes.response} tokens per response took no longer than the prefill "
            f"alone ({before:.4f} s), so the decoding time cannot be measured. Use longer "
            "responses (--response)"
        )
    n, p, steps = sizes.slots, sizes.prompt, sizes.response - 1
    read = flops.passed(config, tokens=n * p, pairs=n * flops.visible_pairs(p), scored=n)
    seen = steps * p + flops.visible_pairs(steps)  # by the tokens of one slot
    written = flops.passed(config, tokens=n * steps, pairs=n * seen, scored=n * steps)
    moved = decode_bytes(
        config, copies=decoding.shape["data"] * decoding.shape["fsdp"], keys=n * seen // steps,
        itemsize=jnp.dtype(dtype).itemsize,
    )  # fmt: skip
    decode = statistics.median(decodes.seconds)
    return {
        "capacity": capacity,
        "prefill": prefills.against(read) | {"tokens_per_second": n * p / before},
        "decode": decodes.against(written)
        | decodes.reading(moved, steps)
        | {"tokens_per_second": n * steps / decode, "ms_per_step": 1e3 * decode / steps},
    }


def decode_bytes(config: DecoderConfig, *, copies: int, keys: int, itemsize: int) -> int:
    """Counts the bytes that one decoding step must read: the weights, and the live keys and values.

    Args:
      copies: number of copies of the model, each of which reads all weights.
      keys: number of keys that the tokens of all slots see.
      itemsize: bytes of a number.
    """
    weights = parameter_count(config)
    if not config.tied:  # of the embedding, a step reads one vector per slot
        weights -= config.vocab_size * config.embed
    each_key = 2 * sum(c.kv_heads * c.head_dim for c in config.each_layer)
    return itemsize * (copies * weights + keys * each_key)


def synthetic(sizes: Sizes, vocab: int) -> list[Example]:
    """Makes random examples with three responses, each half to all of the maximum length.

    The lengths are the same for any vocabulary.
    """
    lengths, tokens = np.random.default_rng(0), np.random.default_rng(1)

    def ids(most: int) -> tuple[int, ...]:
        count = lengths.integers(-(-most // 2), most + 1)
        return tuple(map(int, tokens.integers(0, vocab, count)))

    def example(i: int) -> Example:
        return Example(
            f"synthetic {i}",
            ids(sizes.prompt),
            (ids(sizes.response), ids(sizes.response), ids(sizes.response)),
            {"chosen": 0, "rejected": 1, "explore": 2},
            (0.0, 0.0, 0.0),
        )

    if sizes.examples is not None:
        return [example(i) for i in range(sizes.examples)]
    made = [example(0)]
    while len(assign_rows(longer := [*made, example(len(made))], sizes.row_length)) <= sizes.rows:
        made = longer
    return made


def _replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
