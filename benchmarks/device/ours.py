"""Measures updates and decoding of this package on one device, for `device.sh`.

usage: ours.py [--rehearse] OUT prepare | train SHAPE | decode SHAPE...

Appends each measurement to OUT/results.jsonl as soon as it is made. `prepare` writes the shapes and
the lengths of the examples to OUT/work.json, from which TRL makes the same ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from selm_jax.bench import Sizes, command, limits
from selm_jax.bench.clock import Clock
from selm_jax.bench.work import MakeParams, generation, synthetic, training
from selm_jax.models.config import DecoderConfig, LayerKind, Rope
from selm_jax.shell import data_sheets

TINY = DecoderConfig(
    512, 64, 4, 2, 16, 128, (LayerKind(Rope(1e4)),) * 2, 1e-5, False, 8192, "LlamaForCausalLM"
)
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes at which training and generation are measured.

    Attributes:
      row_lengths: tokens of a row; prompts have at most 1/16 of them, responses 1/8.
      batch: tokens of a packed batch.
      prompt, response, slots: sizes of generation; capacities: of its cache.
    """

    row_lengths: tuple[int, ...]
    batch: int
    prompt: int
    response: int
    slots: int
    capacities: tuple[int, ...]

    def trained(self) -> list[Sizes]:
        return [
            Sizes(
                prompt=n // 16, response=n // 8, rows=self.batch // n, row_length=n, slots=1,
                steps=STEPS,
            )
            for n in self.row_lengths
        ]  # fmt: skip

    def generated(self) -> list[Sizes]:
        return [
            Sizes(
                prompt=self.prompt, response=self.response, rows=1, row_length=1, slots=self.slots,
                capacity=n, steps=STEPS,
            )
            for n in self.capacities
        ]  # fmt: skip


PLAN = Plan((1024, 2048, 4096, 8192), 16384, 128, 128, 64, (256, 4096))
REHEARSAL = Plan((128, 256), 256, 8, 96, 8, (104, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("out", type=Path)
    parser.add_argument("what", choices=("prepare", "train", "decode"))
    parser.add_argument("shapes", nargs="*")
    a = parser.parse_args()
    plan = REHEARSAL if a.rehearse else PLAN
    command.SHAPES["tiny"] = TINY
    {"prepare": prepare, "train": train, "decode": decode}[a.what](a.out, plan, a.shapes)


def prepare(out: Path, plan: Plan, shapes: list[str]) -> None:
    """Writes what is measured, and where; `shapes` is not used, since all are written."""
    device = jax.devices()[0]
    work = {
        "device": {
            "kind": limits.cpu_name() if device.platform == "cpu" else device.device_kind,
            "platform": device.platform,
            "peak_tflops": data_sheets.known(data_sheets.PEAKS, device.device_kind),
            "bandwidth_gb": data_sheets.known(data_sheets.BANDWIDTHS, device.device_kind),
        },
        "shapes": {
            name: {
                "vocab_size": c.vocab_size, "hidden_size": c.embed, "num_attention_heads": c.heads,
                "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
                "intermediate_size": c.mlp, "num_hidden_layers": c.layers,
                "tie_word_embeddings": c.tied, "max_position_embeddings": c.max_positions,
            }
            for name, c in command.SHAPES.items()
        },
        "steps": STEPS,
        # For each row length: tokens of the prompt and of the responses of each example of a step.
        "examples": {
            sizes.row_length: [
                [len(e.prompt), *map(len, e.responses)] for e in synthetic(sizes, TINY.vocab_size)
            ]
            for sizes in plan.trained()
        },
    }  # fmt: skip
    (out / "work.json").write_text(json.dumps(work, indent=1))


def train(out: Path, plan: Plan, shapes: list[str]) -> None:
    def measured(config: DecoderConfig, make_params: MakeParams, sizes: Sizes) -> dict:
        return training(config, make_params, sizes, dtype(), "full", clock())

    every(out, "train", shapes, plan.trained(), measured)


def decode(out: Path, plan: Plan, shapes: list[str]) -> None:
    def measured(config: DecoderConfig, make_params: MakeParams, sizes: Sizes) -> dict:
        return generation(config, make_params, sizes, dtype(), clock())

    every(out, "decode", shapes, plan.generated(), measured)


def every(out: Path, what: str, shapes: list[str], those: list[Sizes], measured: Callable) -> None:
    """Measures each shape at each of the sizes, and records each result as it comes."""
    for shape in shapes:
        _, config, make_params = command.of_shape(shape)
        for sizes in those:
            head = {"what": what, "by": "selm_jax", "shape": shape, "slots": sizes.slots}
            head |= {"row_length": sizes.row_length, "capacity": sizes.capacity}
            record(out, head, partial(measured, config, make_params, sizes))


def dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def clock() -> Clock:
    return Clock(limits.arithmetic(None, dtype()), limits.memory(None))


def record(out: Path, head: dict, measure: Callable[[], dict]) -> None:
    """Appends a measurement, or why there is none: the next one may still fit in memory."""
    try:
        found = measure()
    except Exception as e:  # noqa: BLE001 (of the compiler, the device, or our own)
        traceback.print_exc()
        found = {"error": f"{type(e).__name__}: {e}".splitlines()[0][:200]}
    gc.collect()
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(head | found) + "\n")


if __name__ == "__main__":
    main()
