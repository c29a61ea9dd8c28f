"""The command `selm bench`: checks its arguments, measures, and prints a table."""

from __future__ import annotations

import dataclasses
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from selm_jax.bench.clock import Clock
from selm_jax.bench.work import BenchError, MakeParams, Sizes, generation, training
from selm_jax.config import Training
from selm_jax.config.kinds import ParameterDtype
from selm_jax.models.config import DecoderConfig, LayerKind, Rope
from selm_jax.models.decoder import REMAT, Decoder, parameter_count
from selm_jax.shell import artifacts
from selm_jax.shell.memory import peak_mib, release
from selm_jax.shell.progress import terminal
from selm_jax.weights import sources
from selm_jax.weights.huggingface import checked_config, load

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_LLAMA = "LlamaForCausalLM"

# Shapes to fill with random numbers: SmolLM2-135M, and Llama 3.2 1B.
SHAPES = {
    "135m": DecoderConfig(
        49152, 576, 9, 3, 64, 1536, (LayerKind(Rope(1e5)),) * 30, 1e-5, True, 8192, _LLAMA
    ),
    "1b": DecoderConfig(
        128256, 2048, 32, 8, 64, 8192, (LayerKind(Rope(5e5)),) * 16, 1e-5, True, 131072, _LLAMA
    ),
}

ON_CPU = Sizes(prompt=64, response=64, examples=4, rows=4, row_length=256, slots=16)
ON_ACCELERATOR = Sizes(prompt=256, response=512, examples=16, rows=8, row_length=2048, slots=64)


def main(
    model: str = MODEL,
    *,
    shape: str | None = None,
    prompt: int | None = None,
    response: int | None = None,
    examples: int | None = None,
    rows: int | None = None,
    row_length: int | None = None,
    slots: int | None = None,
    steps: int | None = None,
    dtype: str = "auto",
    remat: str = Training.remat,
    peak: float | None = None,
    json: Path | None = None,
) -> None:
    """Runs the benchmark of `selm bench` and prints a table of the measurements.

    Args:
      model: a folder, Hub id or GGUF file.
      shape: a key of `SHAPES`, to measure random weights of that shape instead of `model`.
      prompt, response, examples, rows, row_length, slots, steps: see `Sizes`; None uses what suits
        the platform.
      dtype: number format of the computation: auto (float32 on CPU, else bfloat16), float32 or
        bfloat16.
      remat: what the backward pass keeps (`models.decoder.REMAT`).
      peak: TFLOP/s of one device, if the table of peaks does not have it.
      json: a file for everything that was measured.

    Raises:
      BenchError: if shape, dtype or remat is unknown, or a size is too small.
    """
    asked = {
        "prompt": prompt, "response": response, "examples": examples, "rows": rows,
        "row_length": row_length, "slots": slots, "steps": steps,
    }  # fmt: skip
    default = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    devices = jax.device_count()
    default = dataclasses.replace(default, rows=-(-default.rows // devices) * devices)
    sizes = dataclasses.replace(default, **{k: v for k, v in asked.items() if v is not None})
    console = terminal()
    with console.status("measuring; the first steps compile"):
        result = run(model, shape=shape, sizes=sizes, dtype=dtype, remat=remat, peak=peak)
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
    """Runs the benchmark; returns the measurements as values for JSON.

    These include the seconds of every counted repetition. Rates are those of the median repetition.
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
    clock = Clock.make(peak, dtype)
    release()
    generated = generation(config, make_params, sizes, dtype, clock)
    generation_peak = peak_mib()
    release()
    trained = training(config, make_params, sizes, dtype, remat, clock)
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
        "training": trained,
        **generated,
        "memory": {
            "what": "resident memory" if device.platform == "cpu" else "memory of one device",
            "generation_mib": generation_peak,
            "training_mib": peak_mib(),
        },
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
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
        f"most {memory['what']}: {memory['generation_mib']:,.0f} MiB in generation, "
        f"{memory['training_mib']:,.0f} MiB in training"
    )


def _model(model: str, shape: str | None) -> tuple[str, DecoderConfig, MakeParams]:
    """Returns a model's name, its configuration, and a function that makes its parameters."""
    if shape is None:
        folder = sources.resolve(model).path
        config = checked_config(folder)
        return model, config, lambda where: load(folder, config, shardings=where)
    config = SHAPES[shape]

    def init(key):
        tokens = jnp.zeros((1, 2), jnp.int32)
        return nn.unbox(Decoder(config).init(key, tokens, tokens)["params"])

    def make_params(where):
        return jax.jit(init, out_shardings=where)(jax.random.key(0))

    return f"random {shape}", config, make_params


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        text = ""
    names = [x.split(": ")[1] for x in text.splitlines() if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
