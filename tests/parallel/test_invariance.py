"""An experiment gives the same answers, losses and weights on any mesh."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from safetensors.numpy import load_file

# Name -> (devices of a process, processes, settings)
EIGHT = ("training.rows=8",)
SHAPES = {
    "1 device": (1, 1, ()),
    "1 device, 1 row": (1, 1, ("training.rows=1",)),
    "1 device, least sizes": (
        1, 1, ("training.rows=1", "training.remat=full", "training.logprob_chunk=1"),
    ),
    "1 device, greatest sizes": (
        1, 1, ("training.rows=16", "training.logprob_chunk=512", "rollout.prefill_rows=32"),
    ),
    "1 device, 4 rows": (1, 1, ("training.rows=4",)),
    "1 device, remat full": (1, 1, ("training.remat=full",)),
    "8 devices, data": (8, 1, (*EIGHT, "compute.data=8", "compute.fsdp=1")),
    "8 devices, fsdp": (8, 1, (*EIGHT, "compute.preset=fsdp", "compute.decode_tensor=2")),
    "8 devices, all axes": (8, 1, (*EIGHT, "compute.data=2", "compute.tensor=2")),
    "2 x 4 devices, fsdp": (4, 2, (*EIGHT, "compute.decode_tensor=2")),
}  # fmt: skip
TRIED = ("1 device, least sizes", "8 devices, all axes", "2 x 4 devices, fsdp")  # in every CI
# Without dropout: its masks are drawn for the shape of a microbatch, so they follow `rows`.
LORA = "lora={rank: 2, alpha: 4, targets: q_proj|down_proj}"


def results(folder: Path):
    responses, losses, weights = [], [], {}
    for t in (1, 2):
        for part in sorted((folder / f"iteration_{t}/responses").glob("*.parquet")):
            responses += pq.read_table(part).to_pylist()
        for file in (folder / f"iteration_{t}/model").glob("*.safetensors"):
            weights |= {f"{t}/{name}": x for name, x in load_file(file).items()}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["stage"] == "train":
            losses.append(line["loss"])
    parts = sorted(p.name for p in folder.glob("iteration_*/responses/*"))
    return responses, np.array(losses), weights, parts


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariance")
    # Adam's first steps are +-rate wherever there is any gradient, so that a gradient of 1e-12, or
    # its rounding, moves a weight by the whole rate. Above eps a step is as exact as its gradient.
    # Rows that hold one example: the four of a batch are 4, 2 or 1 microbatches.
    file = tiny.experiment(
        folder, output="run", training__rows=2, training__eps=1e-3, training__row_length=80,
        training__learning_rate=[1e-2, 1e-2],
    )  # fmt: skip

    def run(name, *more):
        devices, processes, settings = SHAPES[name]
        label = "_".join([name, *(each.partition("=")[0] for each in more)])
        where = folder / label.replace(" ", "_")
        selm = forked.Selm(
            ["run", file, *settings, *more], folder=where,
            cache=folder / f"cache-{devices}-{processes}",
            devices=devices, processes=processes, log=folder / f"{label}.log",
        )  # fmt: skip
        assert selm.wait(900) == [0] * processes, selm.output()
        return results(where / "run")

    return run


@pytest.fixture(scope="module")
def plain(go):
    """The run on one device, with two rows at a time and no rematerialisation."""
    return go("1 device")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [each if each in TRIED else pytest.param(each, marks=pytest.mark.long) for each in SHAPES][1:],
)
def test_results_do_not_depend_on_devices_and_processes(name, go, plain, tried):
    tried(f"{name}: {compare(plain, go(name))}")


@pytest.mark.slow
def test_adapters_are_the_same_on_several_processes(go, tried):
    name = "2 x 4 devices, fsdp"
    tried(f"{name}, adapters: {compare(go('1 device', LORA), go(name, LORA))}")


def without_logps(responses) -> list[dict]:
    return [{k: v for k, v in each.items() if not k.endswith("logps")} for each in responses]


def kept_logps(responses) -> np.ndarray:
    kept = [each[k] or [] for each in responses for k in ("logps", "sampled_logps")]
    return np.concatenate([np.zeros(0), *kept])


def compare(here, there) -> str:
    """Compares two runs and reports by how much they differ."""
    responses, losses, weights, parts = here
    others, losses_there, weights_there, parts_there = there
    assert parts_there == parts
    assert without_logps(others) == without_logps(responses)
    # What the sampler kept of each token: the policies are rounded, and so is this.
    worst_logp = np.max(np.abs(kept_logps(others) - kept_logps(responses)))
    assert worst_logp < 1e-4
    assert len(losses) == len(losses_there) > 4 and weights.keys() == weights_there.keys()
    worst_loss = np.max(np.abs(losses_there - losses) / losses)
    worst = max(np.abs(weights_there[k] - x).max() for k, x in weights.items())
    moved = max(np.abs(weights[f"2{k[1:]}"] - x).max() for k, x in weights.items() if k[0] == "1")
    assert moved > 1e-4
    assert worst_loss < 1e-5
    assert worst < 1e-6
    tokens = sum(len(r["token_ids"]) for r in responses)
    return (
        f"{tokens:,} tokens the same; largest differences: their log-probabilities "
        f"{worst_logp:.1e} nats, loss {worst_loss:.1e} of it, weights "
        f"{worst:.1e} (an iteration moves them by up to {moved:.1e})"
    )
