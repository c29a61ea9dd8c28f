"""The command `selm bench`: checks its arguments, measures, and prints a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from selm_jax.bench import limits
from selm_jax.bench.clock import Clock
from selm_jax.bench.work import BenchError, MakeParams, Sizes, generation, training
from selm_jax.config.kinds import ParameterDtype
from selm_jax.models.config import DecoderConfig, LayerKind, Rope
from selm_jax.models.decoder import REMAT, Decoder, parameter_count
from selm_jax.policy.sizes import LEAST
from selm_jax.shell import artifacts
from selm_jax.shell.memory import peak_mib, release
from selm_jax.shell.progress import terminal
from selm_jax.weights import sources
from selm_jax.weights.huggingface import checked_config, load

QUIET = 0.15  # spread of the times above which the machine is called not quiet

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_LLAMA = "LlamaForCausalLM"

# Shapes to fill with random numbers: SmolLM2-135M, Llama 3.2 1B, and four of the 32 layers of
# Llama 3 8B, whose training fits on one device.
SHAPES = {
    "135m": DecoderConfig(
        49152, 576, 9, 3, 64, 1536, (LayerKind(Rope(1e5)),) * 30, 1e-5, True, 8192, _LLAMA
    ),
    "1b": DecoderConfig(
        128256, 2048, 32, 8, 64, 8192, (LayerKind(Rope(5e5)),) * 16, 1e-5, True, 131072, _LLAMA
    ),
    "8b-layers": DecoderConfig(
        128256, 4096, 32, 8, 128, 14336, (LayerKind(Rope(5e5)),) * 4, 1e-5, False, 8192, _LLAMA
    ),
}


# Without options, rows of a quarter of this length are measured too, and a cache with room for
# eight times the tokens.
ON_CPU = Sizes(prompt=64, response=64, rows=1, row_length=1024, slots=16)
ON_ACCELERATOR = Sizes(prompt=256, response=512, rows=2, row_length=8192, slots=64)


def main(
    model: str = MODEL,
    *,
    shape: str | None = None,
    prompt: int | None = None,
    response: int | None = None,
    examples: int | None = None,
    rows: int | None = None,
    row_length: Sequence[int] | None = None,
    slots: int | None = None,
    capacity: Sequence[int] | None = None,
    steps: int | None = None,
    dtype: str = "auto",
    remat: str = LEAST.remat,
    peak: float | None = None,
    bandwidth: float | None = None,
    json: Path | None = None,
) -> None:
    """Runs the benchmark of `selm bench` and prints a table of the measurements.

    Args:
      model: a folder, Hub id or GGUF file.
      shape: a key of `SHAPES`, to measure random weights of that shape instead of `model`.
      prompt, response, examples, rows, slots, steps: see `Sizes`; None uses what suits the
        platform.
      row_length, capacity: see `Sizes`; every one is measured.
      dtype: number format of the computation: auto (float32 on CPU, else bfloat16), float32 or
        bfloat16.
      remat: what the backward pass keeps (`models.decoder.REMAT`).
      peak, bandwidth: TFLOP/s and GB/s of one device, if the tables of `limits` do not have it.
      json: a file for everything that was measured.

    Raises:
      BenchError: if shape, dtype or remat is unknown, or a size is too small.
    """
    asked = {
        "prompt": prompt, "response": response, "examples": examples, "slots": slots,
        "steps": steps,
    }  # fmt: skip
    default = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    sizes = dataclasses.replace(default, **{k: v for k, v in asked.items() if v is not None})
    devices, used = jax.device_count(), sizes.prompt + sizes.response

    def of_length(length: int) -> Sizes:
        full = -(-default.rows * default.row_length // (max(length, 1) * devices)) * devices
        count = full if rows is None else rows
        return dataclasses.replace(sizes, row_length=length, rows=count)

    trained = [of_length(n) for n in row_length or (sizes.row_length // 4, sizes.row_length)]
    generated = [dataclasses.replace(sizes, capacity=n) for n in capacity or (used, 8 * used)]
    console = terminal()
    with console.status("measuring; the first steps compile"):
        result = run(
            model, shape=shape, trained=trained, generated=generated, dtype=dtype, remat=remat,
            peak=peak, bandwidth=bandwidth,
        )  # fmt: skip
    show(result, console)
    if json is not None:
        artifacts.write_json(json, result)


def run(
    model: str,
    *,
    shape: str | None,
    trained: Sequence[Sizes],
    generated: Sequence[Sizes],
    dtype: str = "auto",
    remat: str = LEAST.remat,
    peak: float | None = None,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """Runs the benchmark; returns the measurements as values for JSON.

    These include the seconds of every counted repetition. Rates are those of the median repetition.

    Args:
      trained, generated: the sizes with which updates and generation are measured, in turn.
    """
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    for what, value, known in (
        ("dtype", dtype, get_args(ParameterDtype)),
        ("remat", remat, REMAT),
        ("shape", shape, (None, *SHAPES)),
    ):
        if value not in known:
            raise BenchError(
                f"--{what} is {value!r}; expected one of {', '.join(filter(None, known))}"
            )
    name, config, make_params = _model(model, shape)
    clock = Clock(limits.arithmetic(peak, dtype), limits.memory(bandwidth))
    generations, trainings = [], []
    release()
    for sizes in generated:
        generations.append(generation(config, make_params, sizes, dtype, clock))
    generation_peak = peak_mib()
    release()
    for sizes in trained:
        trainings.append(training(config, make_params, sizes, dtype, remat, clock))
    device = jax.devices()[0]
    return {
        "device": {
            "kind": limits.cpu_name() if device.platform == "cpu" else device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "peak_tflops": clock.peak.rate,
            "peak_from": clock.peak.source,
            "bandwidth_gb": clock.bandwidth.rate,
            "bandwidth_from": clock.bandwidth.source,
        },
        "versions": {p: version(p) for p in ("jax", "jaxlib", "flax", "optax")},
        "model": {"name": name, "parameters": parameter_count(config), "dtype": dtype},
        "remat": remat,
        "training": trainings,
        "generation": generations,
        "memory": {
            "what": "resident memory" if device.platform == "cpu" else "memory of one device",
            "generation_mib": generation_peak,
            "training_mib": peak_mib(),
        },
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the result as one table and what its columns mean; 60 columns are enough."""
    device, model, used = result["device"], result["model"], result["memory"]
    title = f"{model['name']}, {model['parameters'] / 1e6:.0f} M parameters, {model['dtype']}"
    table = Table(title=f"{title}; {device['count']} x {device['kind']}", box=SIMPLE_HEAD)
    table.add_column("")
    for head in ("seconds", "tokens/s", "MFU", "memory"):
        table.add_column(head, justify="right")

    def add(name: str, part: dict[str, Any], rate: float, memory: str = "") -> None:
        seconds = f"{statistics.median(part['seconds']):.3g}"
        table.add_row(name, seconds, f"{rate:,.0f}", _percent(part["mfu"]), memory)

    for part in result["training"]:
        name = f"train, {part['rows']} x {part['row_length']:,}"
        add(name, part, part["tokens_per_second"]["useful"])
    for part in result["generation"]:
        prefill, decode, room = part["prefill"], part["decode"], f"{part['capacity']:,}"
        add(f"prefill, room {room}", prefill, prefill["tokens_per_second"])
        memory = _percent(decode["share_of_bandwidth"])
        add(f"decode, room {room}", decode, decode["tokens_per_second"], memory)
    console.print(table)
    for part in result["training"]:
        tokens = part["tokens"]
        console.print(
            f"Rows of {part['row_length']:,}: {1 - tokens['useful'] / tokens['padded']:.0%} of the "
            f"positions are padding; {part['examples_per_second']:.3g} examples/s."
        )
    for part in result["generation"]:
        decode = part["decode"]
        console.print(
            f"Decoding with room for {part['capacity']:,} tokens per answer: "
            f"{decode['ms_per_step']:.3g} ms a step, in which at least "
            f"{decode['bytes_per_step'] / 1e6:,.0f} MB must be read."
        )
    console.print(
        f"MFU: share of the {device['peak_from']}. Padding, masked scores and recomputation do not "
        "count as work.\n"
        f"memory: share of the {device['bandwidth_from']}."
    )
    noise = max(max(x["seconds"]) / min(x["seconds"]) - 1 for x in result["training"])
    if noise > QUIET:
        console.print(f"The machine was not quiet: the times of an update differ by {noise:.0%}.")
    console.print(
        f"Most {used['what']}: {used['generation_mib']:,.0f} MiB in generation, "
        f"{used['training_mib']:,.0f} MiB in training"
    )


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def _model(model: str, shape: str | None) -> tuple[str, DecoderConfig, MakeParams]:
    """Returns a model's name, its configuration, and a function that makes its parameters."""
    if shape is None:
        folder = sources.resolve(model).path
        config = checked_config(folder)
        return model, config, lambda where: load(folder, config, shardings=where)
    return of_shape(shape)


def of_shape(shape: str) -> tuple[str, DecoderConfig, MakeParams]:
    """Returns the same of a model of random weights; `shape` is a key of `SHAPES`."""
    config = SHAPES[shape]

    def init(key):
        tokens = jnp.zeros((1, 2), jnp.int32)
        return nn.unbox(Decoder(config).init(key, tokens, tokens)["params"])

    def make_params(where):
        return jax.jit(init, out_shardings=where)(jax.random.key(0))

    return f"random {shape}", config, make_params
