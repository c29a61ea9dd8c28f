"""`selm bench`: how fast this machine trains and answers, and how near that is to its peak.

One model, synthetic tokens, the same functions as a run uses: updates on packed prompt trees of
three distinct responses with stored reference log-probabilities, and the rollout engine. Times are
held against hand-counted floating point operations (`models.flops`).
"""

from __future__ import annotations

import dataclasses
import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from selm_jax import artifacts
from selm_jax.config import Training
from selm_jax.models import flops
from selm_jax.models.decoder import Decoder, Params, abstract_params, parameter_count
from selm_jax.models.families import DecoderConfig, read_config
from selm_jax.objectives.losses import selm
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, partition, shardings
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import PreferenceBatch, common_shape, pack
from selm_jax.rollout.engine import Engine, Request, decoding_params
from selm_jax.rollout.sampling import Sampling
from selm_jax.training.loop import mean_lengths
from selm_jax.training.optimizer import optimizer
from selm_jax.training.state import TrainState
from selm_jax.training.update import Shardings, make_update
from selm_jax.weights import sources
from selm_jax.weights.huggingface import load

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Shapes to fill with random numbers: SmolLM2-135M, and Llama 3.2 1B.
SHAPES = {
    "135m": DecoderConfig(
        49152, 576, 30, 9, 3, 64, 1536, 1e-5, 1e5, True, None, 8192, "LlamaForCausalLM"
    ),
    "1b": DecoderConfig(
        128256, 2048, 16, 32, 8, 64, 8192, 1e-5, 5e5, True, None, 131072, "LlamaForCausalLM"
    ),
}

# Peak bfloat16 TFLOP/s of one device, without sparsity, from the makers' data sheets. The first
# entry that occurs in the device's kind counts. A device of TPU v2 and v3 is a core, half a chip.
PEAKS = (
    ("TPU v2", 22.5), ("TPU v3", 61.5), ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197),
    ("TPU v5", 459), ("TPU v6 lite", 918), ("TPU v6e", 918), ("H100 PCIe", 756), ("H100", 989),
    ("H200", 989), ("GH200", 989), ("B200", 2250), ("A100", 312), ("A10G", 70), ("L40S", 362),
    ("L4", 121), ("V100", 125), ("T4", 65),
)  # fmt: skip


class BenchError(ValueError):
    """A measurement that cannot be made as asked."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      prompt, response: most tokens of each; examples draw lengths from half of it to all of it, so
        that rows have the padding that packing leaves in practice. Generation has full lengths.
      examples: per update.
      rows, row_length: of the packed batch.
      slots: responses that decode together.
      steps: repetitions, after one that is not counted.
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
                raise BenchError(f"{name} is {value}; at least 1 was expected")


ON_CPU = Sizes(prompt=64, response=64, examples=4, rows=4, row_length=256, slots=16)
ON_ACCELERATOR = Sizes(prompt=256, response=512, examples=16, rows=8, row_length=2048, slots=64)


def main(
    model: str = MODEL,
    *,
    shape: str | None = None,
    dtype: str = "auto",
    remat: str = Training.remat,
    peak: float | None = None,
    json: Path | None = None,
    **sizes: int | None,
) -> None:
    """Measures and prints a table.

    Args:
      model: folder, Hub id or GGUF file.
      shape: a key of `SHAPES`; random weights of that shape instead of `model`.
      dtype: of the computation: auto (float32 on CPU, else bfloat16), float32 or bfloat16.
      remat: what the backward pass keeps (`models.decoder.REMAT`).
      peak: TFLOP/s of one device, where the table does not know it.
      json: everything measured, as a file.
      sizes: fields of `Sizes` that are not to have their default; None keeps it.

    Raises:
      BenchError: an unknown shape, or sizes that do not fit together.
    """
    default = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    chosen = dataclasses.replace(default, **{k: v for k, v in sizes.items() if v is not None})
    console = Console()
    with console.status("measuring; the first steps compile"):
        result = run(model, shape=shape, sizes=chosen, dtype=dtype, remat=remat, peak=peak)
    show(result, console)
    if json is not None:
        artifacts.write_json(json, result)


def run(
    model: str,
    *,
    shape: str | None,
    sizes: Sizes,
    dtype: str = "auto",
    remat: str = Training.remat,
    peak: float | None = None,
) -> dict[str, Any]:
    """Measures; arguments as for `main`. Everything in the result is plain JSON."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    name, config, make_params = _model(model, shape)
    clock = _Clock.make(peak, dtype)
    generation = _generation(config, make_params, sizes, dtype, clock)
    generation_peak = peak_memory()
    gc.collect()  # the decoding parameters, before training's
    training = _training(config, make_params, sizes, dtype, remat, clock)
    device = jax.devices()[0]
    return {
        "device": {
            "kind": _cpu_name() if device.platform == "cpu" else device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "peak_tflops": clock.peak,
            "peak_from": clock.source,
        },
        "versions": {p: version(p) for p in ("jax", "jaxlib", "flax", "optax")},
        "model": {"name": name, "parameters": parameter_count(config), "dtype": dtype},
        "sizes": dataclasses.asdict(sizes) | {"remat": remat},
        "training": training,
        **generation,
        "memory": {
            "what": "resident memory" if device.platform == "cpu" else "memory of one device",
            "generation_mib": generation_peak,
            "training_mib": peak_memory(),
        },
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The result as a table."""
    device, model, memory = result["device"], result["model"], result["memory"]
    title = f"{model['name']}, {model['parameters'] / 1e6:.0f} M parameters, {model['dtype']}"
    table = Table(title=f"{title}; {device['count']} x {device['kind']}")
    table.add_column("")
    for head in ("seconds, median (min-max)", "tokens/s", "TFLOP", "TFLOP/s", "share of peak"):
        table.add_column(head, justify="right")
    for key in ("training", "prefill", "decode"):
        part = result[key]
        seconds = part["seconds"]
        spread = f"{statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"
        rate = part["tokens_per_second"]
        rates = f"{rate:,.0f}" if key != "training" else (
            f"{rate['useful']:,.0f} useful\n{rate['padded']:,.0f} padded"
        )  # fmt: skip
        share = "unknown" if part["share_of_peak"] is None else f"{part['share_of_peak']:.0%}"
        table.add_row(key, spread, rates, f"{part['tflop']:.3g}", f"{part['tflops']:.3g}", share)
    console.print(table)
    console.print(f"training: {result['training']['examples_per_second']:.3g} examples/s")
    console.print(f"peak: {device['peak_from']}")
    console.print(
        f"most {memory['what']}: {memory['generation_mib']:,.0f} MiB to the end of generation, "
        f"{memory['training_mib']:,.0f} MiB to the end of training"
    )


# What is measured


def _training(config, make_params, sizes: Sizes, dtype, remat, clock: _Clock) -> dict[str, Any]:
    mesh = make_mesh((1, -1, 1))
    where = Shardings(shardings(abstract_params(config), mesh, TRAINING), _replicated(mesh))
    adamw = optimizer("adamw", b1=Training.b1, b2=Training.b2, eps=Training.eps, weight_decay=0.0)
    update = make_update(
        Decoder(config, jnp.dtype(dtype), remat), selm(0.01, 0.001), adamw,
        chunk=Training.logprob_chunk, clip=Training.clip, shardings=where,
    )  # fmt: skip
    examples = _examples(sizes, config.vocab_size)
    shape = common_shape([examples], rows=sizes.rows, time=sizes.row_length)
    batches = pack(examples, shape)
    means = mean_lengths(examples)
    state = TrainState.create(make_params(where.params), adamw)

    def step():
        nonlocal state
        first, *rest = (_place(batch, mesh) for batch in batches)
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


def _generation(config, make_params, sizes: Sizes, dtype, clock: _Clock) -> dict[str, Any]:
    if sizes.response < 2:
        raise BenchError("response is 1: the first token comes from the prefill, none is decoded")
    mesh = make_mesh((1, -1, 1))
    params = decoding_params(
        make_params(shardings(abstract_params(config), mesh, TRAINING)), jnp.dtype(dtype)
    )
    rng = np.random.default_rng(0)
    requests = [
        Request(i, tuple(map(int, rng.integers(0, config.vocab_size, sizes.prompt))), 0, 1)
        for i in range(sizes.slots)
    ]

    def answer(new_tokens: int) -> Callable[[], None]:
        engine = Engine(
            Decoder(config, jnp.dtype(dtype), scan=False), Sampling(), slots=sizes.slots,
            max_prompt=sizes.prompt, max_new_tokens=new_tokens, stop_ids=(),
            prefill_rows=min(sizes.slots, 16),
        )  # fmt: skip
        return lambda: _discard(engine.generate(params, requests, seed=0, iteration=1))

    prefill, whole = answer(1), answer(sizes.response)
    for once in (prefill, whole):
        clock.measure(once, 1)
    prefill_times = clock.measure(prefill, sizes.steps)
    whole_times = clock.measure(whole, sizes.steps)
    before = statistics.median(prefill_times.seconds)
    decode_times = dataclasses.replace(
        whole_times, seconds=[max(s - before, 1e-9) for s in whole_times.seconds]
    )
    steps = sizes.response - 1
    read = flops.forward(config, rows=sizes.slots, time=sizes.prompt, keys=sizes.prompt, scored=1)
    written = flops.forward(
        config, rows=sizes.slots * steps, time=1, keys=sizes.prompt + sizes.response, scored=1
    )
    decode = statistics.median(decode_times.seconds)
    return {
        "prefill": prefill_times.against(read)
        | {"tokens_per_second": sizes.slots * sizes.prompt / before},
        "decode": decode_times.against(written)
        | {"tokens_per_second": sizes.slots * steps / decode, "ms_per_step": 1e3 * decode / steps},
    }


# How it is measured


@dataclasses.dataclass(frozen=True)
class _Times:
    """Seconds of each repetition, and what the devices could do meanwhile (TFLOP/s; None unknown)."""

    seconds: list[float]
    peak: list[float | None]

    def against(self, work: flops.Flops) -> dict[str, Any]:
        tflop = work.total / 1e12
        shares = [tflop / s / peak for s, peak in zip(self.seconds, self.peak, strict=True) if peak]
        return {
            "seconds": self.seconds,
            "tflop": tflop,
            "tflop_parts": {k: v / 1e12 for k, v in dataclasses.asdict(work).items()},
            "tflops": tflop / statistics.median(self.seconds),
            "share_of_peak": statistics.median(shares) if shares else None,
            "peak_tflops": self.peak,
        }


@dataclasses.dataclass(frozen=True)
class _Clock:
    """Times repetitions. `peak` is of all devices together; `matmul` measures it where none is."""

    peak: float | None
    source: str
    matmul: Callable[[], float] | None

    @classmethod
    def make(cls, peak: float | None, dtype: str) -> _Clock:
        count, kind = jax.device_count(), jax.devices()[0].device_kind
        if peak is not None:
            return cls(peak * count, f"{peak:g} TFLOP/s a device, as given", None)
        if jax.default_backend() == "cpu":
            return cls(
                None, "a 2048^3 float32 matrix product before and after each step", _matmul()
            )
        known = next((tflops for name, tflops in PEAKS if name in kind), None)
        if known is None or dtype != "bfloat16":
            return cls(None, f"not known for {kind} in {dtype}; --peak says it", None)
        return cls(known * count, f"{known:g} bfloat16 TFLOP/s a {kind}, data sheet", None)

    def measure(self, step: Callable[[], None], count: int) -> _Times:
        seconds, peaks = [], []
        for _ in range(count):
            before = self.matmul() if self.matmul else self.peak
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
            after = self.matmul() if self.matmul else self.peak
            peaks.append((before + after) / 2 if before and after else None)
        return _Times(seconds, peaks)


def _matmul() -> Callable[[], float]:
    """Measures TFLOP/s of a 2048^3 float32 product: virtual cores are not always whole ones."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()

    def measure() -> float:
        best = float("inf")
        for _ in range(2):  # the first may pay for memory that a step gave back
            began = time.perf_counter()
            product(x).block_until_ready()
            best = min(best, time.perf_counter() - began)
        return 2e-12 * 2048**3 / best

    return measure


def peak_memory() -> float:
    """MiB: the most that any device ever held, or, where devices do not say, this process."""
    held = [device.memory_stats() for device in jax.local_devices()]
    if all(stats and "peak_bytes_in_use" in stats for stats in held):
        return max(stats["peak_bytes_in_use"] for stats in held if stats) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _model(model: str, shape: str | None) -> tuple[str, DecoderConfig, Callable[[Any], Params]]:
    """Its name, its facts, and a function that makes its parameters under given shardings."""
    if shape is None:
        folder = sources.resolve(model).path
        config = read_config(folder)
        return model, config, lambda where: _load(folder, config, where)
    if shape not in SHAPES:
        raise BenchError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    config = SHAPES[shape]

    def init(key):
        tokens = jnp.zeros((1, 2), jnp.int32)
        mask = jnp.ones((1, 2, 2), bool)
        return nn.unbox(Decoder(config).init(key, tokens, tokens, mask)["params"])

    def make_params(where):
        return jax.jit(init, out_shardings=where)(jax.random.key(0))

    return f"random {shape}", config, make_params


def _load(folder: Path, config: DecoderConfig, where: Any) -> Params:
    from flax.traverse_util import flatten_dict

    flat = flatten_dict(where)
    return load(folder, config, place=lambda path, x: jax.device_put(x, flat[path]))


def _examples(sizes: Sizes, vocab: int) -> list[Example]:
    """Three distinct responses each; prompts and responses of half to all of their most tokens."""
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


def _place(batch: PreferenceBatch, mesh: jax.sharding.Mesh) -> PreferenceBatch:
    def put(x):
        axes = ("rows",) + (None,) * (x.ndim - 1)
        return jax.device_put(x, partition("batch", axes, x.shape, mesh, TRAINING))

    return jax.tree.map(put, batch)


def _replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _discard(responses: Sequence[Any]) -> None:
    """Answers are not what is measured."""


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        text = ""
    names = [x.split(": ")[1] for x in text.splitlines() if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
