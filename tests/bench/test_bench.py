"""`selm bench` on a model that is measured in no time: what it says must follow from its times."""

from __future__ import annotations

import dataclasses
import json
import statistics

import jax
import numpy as np
import pytest
from rich.console import Console

from selm_jax import bench
from selm_jax.bench import clock, command, limits
from selm_jax.bench.work import decode_bytes, synthetic
from selm_jax.models.config import DecoderConfig, LayerKind, Rope
from selm_jax.models.sight import Sight
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import assign_rows, common_shape, pack
from selm_jax.shell import memory
from selm_jax.training.work import useful

SIZES = bench.Sizes(prompt=8, response=24, examples=5, rows=8, row_length=96, slots=4, steps=2)
KINDS = (LayerKind(Rope(1e4)),) * 2
TINY = DecoderConfig(96, 32, 4, 2, 8, 64, KINDS, 1e-5, False, 2048, "LlamaForCausalLM")
# 2 layers: queries and outputs 32 x 32, keys and values 32 x 16, three matrices of 32 x 64.
WEIGHTS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
SCALES = 2 * 2 * 32 + 32  # of norms


def counted(step) -> float:
    """The seconds of a step by a clock on which every token that is drawn takes a millisecond.

    By a real one, decoding may seem to take no time on a busy machine, and is refused.
    """
    return 1e-3 * (sum(len(response.tokens) for response in step() or ()) or 5)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(command.SHAPES, "tiny", TINY)
    monkeypatch.setattr(clock.Clock, "_seconds", staticmethod(counted))


def test_a_clock_measures_each_repetition(monkeypatch):
    monkeypatch.undo()
    quiet = clock.Clock(limits.arithmetic(1.0, "float32"), limits.memory(2.0))
    times = quiet.measure(lambda: None, 3)
    assert len(times.seconds) == 3 and 0 <= min(times.seconds)
    assert times.peak == [quiet.peak.now()] * 3
    assert times.bandwidth == [quiet.bandwidth.now()] * 3


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock.Clock, "_seconds", staticmethod(counted))
        patch.setitem(command.SHAPES, "tiny", TINY)
        roomy = dataclasses.replace(SIZES, capacity=128)
        return bench.run(
            "", shape="tiny", trained=[SIZES], generated=[SIZES, roomy], peak=2.0, bandwidth=3.0
        )


def test_rates_follow_from_times(result):
    (training,) = result["training"]
    assert len(training["seconds"]) == SIZES.steps
    seconds = statistics.median(training["seconds"])
    examples = synthetic(SIZES, 96)
    assert training["tokens"]["useful"] == sum(e.tokens for e in examples)
    assert training["tokens"]["padded"] == training["microbatches"] * 8 * 96
    assert training["tokens_per_second"]["useful"] == training["tokens"]["useful"] / seconds
    assert training["examples_per_second"] == 5 / seconds
    assert [part["capacity"] for part in result["generation"]] == [32, 128]
    for part in result["generation"]:
        prefill = statistics.median(part["prefill"]["seconds"])
        assert part["prefill"]["tokens_per_second"] == 4 * 8 / prefill
        decode = statistics.median(part["decode"]["seconds"])
        assert part["decode"]["tokens_per_second"] == 4 * 23 / decode


def test_shares_are_of_all_devices_together(result):
    count = jax.device_count()
    assert result["device"]["peak_tflops"] == 2.0 * count
    (training,) = result["training"]
    each = [training["tflop"] / s / (2.0 * count) for s in training["seconds"]]
    assert training["mfu"] == pytest.approx(statistics.median(each))
    decode = result["generation"][0]["decode"]
    each = [23e-9 * decode["bytes_per_step"] / s / (3.0 * count) for s in decode["seconds"]]
    assert decode["share_of_bandwidth"] == pytest.approx(statistics.median(each))


def test_the_operations_are_those_counted_by_hand(result):
    """Two examples, of 2 + 1 + 3 and of 3 + 2 tokens, drawn as the keys that each token sees."""
    examples = [
        Example("a", (1, 2), ((3,), (4, 5, 6)), {}),
        Example("b", (1, 2, 3), ((4, 5),), {}),
    ]
    seen = [1, 2, 3, 3, 4, 5, 1, 2, 3, 4, 5]
    assert dataclasses.asdict(useful(TINY, examples)) == {
        "dense": 2 * 11 * WEIGHTS,
        "attention": 4 * sum(seen) * 2 * 32,
        "head": 2 * 6 * 32 * 96,
    }
    prefill, decode = (
        result["generation"][0][name]["tflop_parts"] for name in ("prefill", "decode")
    )
    assert prefill == pytest.approx({
        "dense": 1e-12 * 2 * 4 * 8 * WEIGHTS,
        "attention": 1e-12 * 4 * 4 * sum(range(1, 9)) * 2 * 32,
        "head": 1e-12 * 2 * 4 * 32 * 96,
    })  # fmt: skip
    # The first of 24 tokens comes from the prefill; the others see 9 to 31 keys.
    assert decode == pytest.approx({
        "dense": 1e-12 * 2 * 4 * 23 * WEIGHTS,
        "attention": 1e-12 * 4 * 4 * sum(range(9, 32)) * 2 * 32,
        "head": 1e-12 * 2 * 4 * 23 * 32 * 96,
    })  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_pairs_are_those_of_the_mask_of_a_packed_batch(seed):
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(1, 9, rng.integers(2, 5)) for _ in range(6)]
    ids = lambda count: tuple(range(1, count + 1))
    examples = [
        Example(str(i), ids(prompt), tuple(map(ids, responses)), {})
        for i, (prompt, *responses) in enumerate(sizes)
    ]
    batches = pack(examples, common_shape([examples], rows=2, time=40))
    masks = [Sight(b.position, b.position, b.end).mask() for b in batches]
    pairs = sum(int(mask[b.segment > 0].sum()) for mask, b in zip(masks, batches, strict=True))
    assert pairs * 4 * 2 * 32 == useful(TINY, examples).attention


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_bytes_of_a_step_are_those_counted_by_hand(tied, itemsize):
    # Each token reads the unembedding, but only one vector of the embedding.
    numbers = WEIGHTS + SCALES + 96 * 32
    each_key = 2 * 2 * 2 * 8  # keys and values in 2 layers, 2 heads of 8
    config = dataclasses.replace(TINY, tied=tied)
    found = decode_bytes(config, copies=3, keys=7, itemsize=itemsize)
    assert found == itemsize * (3 * numbers + 7 * each_key)


def test_room_that_is_not_used_is_no_work(result):
    tight, roomy = (part["decode"] for part in result["generation"])
    assert tight["bytes_per_step"] == roomy["bytes_per_step"]
    assert tight["tflop"] == roomy["tflop"]
    copies = jax.device_count()
    assert tight["bytes_per_step"] == decode_bytes(TINY, copies=copies, keys=4 * 20, itemsize=4)


def test_a_batch_is_filled_unless_the_examples_are_counted():
    sizes = dataclasses.replace(SIZES, examples=None, rows=3)
    examples = synthetic(sizes, 96)
    assert len(assign_rows(examples, 96)) == 3
    longer = synthetic(dataclasses.replace(SIZES, examples=len(examples) + 1), 96)
    assert longer[:-1] == examples and len(assign_rows(longer, 96)) == 4


@pytest.mark.slow
def test_the_result_is_json_and_the_table_fits_in_60_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    file = tmp_path / "bench.json"
    bench.main(
        shape="tiny", prompt=8, response=24, row_length=[96, 1024], rows=jax.device_count(),
        examples=8, slots=4, capacity=[32, 1024], steps=1, peak=1.0, bandwidth=1.0, json=file,
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert found["model"]["name"] == "random tiny"
    assert [part["row_length"] for part in found["training"]] == [96, 1024]
    assert found["memory"]["training_mib"] > 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60
    for rate in (
        found["training"][1]["tokens_per_second"]["useful"],
        found["generation"][1]["decode"]["tokens_per_second"],
    ):
        assert f"{rate:,.0f}" in shown
    lines = " ".join(shown.split())
    assert "MFU: share of the 1 TFLOP/s per device, as given" in lines
    assert "memory: share of the 1 GB/s per device, as given" in lines


def test_without_options_rows_and_capacities_are_measured_short_and_long(monkeypatch):
    asked = {}
    monkeypatch.setattr(command, "run", lambda model, **sizes: asked.update(sizes) or {})
    monkeypatch.setattr(command, "show", lambda *_: None)
    bench.main(shape="tiny")
    devices = jax.device_count()
    assert [(s.rows % devices, s.row_length) for s in asked["trained"]] == [(0, 256), (0, 1024)]
    assert [s.capacity for s in asked["generated"]] == [128, 1024]


def test_an_unknown_limit_is_not_made_up(result, capsys, monkeypatch):
    (training,) = result["training"]
    part = result["generation"][0]
    prefill, decode = part["prefill"] | {"mfu": None}, part["decode"] | {"mfu": None}
    unknown = {
        "training": [training | {"mfu": None}],
        "generation": [
            part | {"prefill": prefill, "decode": decode | {"share_of_bandwidth": None}}
        ],
    }
    monkeypatch.setenv("COLUMNS", "160")
    command.show(result | unknown, Console())
    assert capsys.readouterr().out.count("unknown") == 4


@pytest.mark.parametrize(("times", "said"), [([1.0, 1.1], False), ([1.0, 1.2], True)])
def test_a_machine_that_is_not_quiet_is_called_so(times, said, result, capsys):
    (training,) = result["training"]
    command.show(result | {"training": [training | {"seconds": times}]}, Console())
    assert ("not quiet" in capsys.readouterr().out) == said


@pytest.mark.slow
def test_on_cpu_the_limits_are_measured_around_each_step():
    watch = clock.Clock(limits.arithmetic(None, "float32"), limits.memory(None))
    times = watch.measure(lambda: None, 2)
    assert watch.peak.rate is None and watch.bandwidth.rate is None
    assert len(times.peak) == 2 and all(rate > 0 for rate in (*times.peak, *times.bandwidth))


@pytest.mark.parametrize(
    ("kind", "tflops", "gb"),
    [
        ("TPU v5 lite", 197, 819), ("TPU v5", 459, 2765), ("TPU v6 lite", 918, 1638),
        ("NVIDIA H100 80GB HBM3", 989, 3350), ("NVIDIA H100 PCIe", 756, 2000),
        ("NVIDIA A100-SXM4-40GB", 312, 1555), ("NVIDIA A10", 125, None),
        ("NVIDIA L40S", 362, 864), ("NVIDIA L4", 121, 300), ("NVIDIA B200", 2250, 8000),
        ("Radeon", None, None),
    ],
)  # fmt: skip
def test_the_tables_of_limits_take_the_right_line(kind, tflops, gb, monkeypatch):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert limits.arithmetic(None, "bfloat16").now() == (None if tflops is None else 4 * tflops)
    assert limits.memory(None).now() == (None if gb is None else 4 * gb)
    # The table is of bfloat16; nothing is said of another type.
    assert limits.arithmetic(None, "float32").now() is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": "9t"}, "--shape is '9t'; expected one of 135m, 1b"),
        ({"dtype": "int8"}, "--dtype is 'int8'; expected one of float32, bfloat16"),
        ({"remat": "some"}, "--remat is 'some'; expected one of none"),
        ({"generated": [dataclasses.replace(SIZES, response=1)]}, "response is 1"),
    ],
)
def test_what_cannot_be_measured_is_said(wrong, message):
    right = {"shape": "tiny", "trained": [SIZES], "generated": [SIZES]}
    with pytest.raises(bench.BenchError, match=message):
        bench.run("", **(right | wrong))


@pytest.mark.parametrize(
    ("size", "message"), [({"slots": 0}, "slots is 0"), ({"capacity": 31}, "take 32 tokens")]
)
def test_sizes_that_cannot_be_are_refused(size, message):
    with pytest.raises(bench.BenchError, match=message):
        dataclasses.replace(SIZES, **size)


def test_release_starts_the_peak_anew():
    block = bytearray(512 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    with_block = memory.peak_mib()
    del block
    memory.release()
    assert memory.peak_mib() < with_block - 400
