"""`selm bench` on a model that is measured in no time: what it says must follow from its times."""

from __future__ import annotations

import dataclasses
import json
import statistics

import jax
import pytest
from rich.console import Console

from selm_jax import bench
from selm_jax.bench import clock, command
from selm_jax.bench.work import _examples
from selm_jax.models.config import DecoderConfig, LayerKind, Rope
from selm_jax.shell import memory

SIZES = bench.Sizes(prompt=8, response=24, examples=5, rows=8, row_length=96, slots=4, steps=2)


KINDS = (LayerKind(Rope(1e4)),) * 2
TINY = DecoderConfig(96, 32, 4, 2, 8, 64, KINDS, 1e-5, False, 2048, "LlamaForCausalLM")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(command.SHAPES, "tiny", TINY)


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command.SHAPES, "tiny", TINY)
        return bench.run("", shape="tiny", sizes=SIZES, peak=2.0)


def test_rates_follow_from_times(result):
    training, sizes = result["training"], result["sizes"]
    assert len(training["seconds"]) == sizes["steps"]
    seconds = statistics.median(training["seconds"])
    examples = _examples(SIZES, 96)
    assert training["tokens"]["useful"] == sum(e.tokens for e in examples)
    assert training["tokens"]["padded"] == training["microbatches"] * 8 * 96
    assert training["tokens_per_second"]["useful"] == training["tokens"]["useful"] / seconds
    assert training["examples_per_second"] == 5 / seconds
    prefill = statistics.median(result["prefill"]["seconds"])
    assert result["prefill"]["tokens_per_second"] == 4 * 8 / prefill
    decode = statistics.median(result["decode"]["seconds"])
    assert result["decode"]["tokens_per_second"] == 4 * 23 / decode


def test_shares_are_of_all_devices_together(result):
    assert result["device"]["peak_tflops"] == 2.0 * jax.device_count()
    training = result["training"]
    each = [training["tflop"] / s / (2.0 * jax.device_count()) for s in training["seconds"]]
    assert training["share_of_peak"] == pytest.approx(statistics.median(each))


def test_the_result_is_json_and_the_table_shows_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "bench.json"
    bench.main(
        shape="tiny", prompt=8, response=24, row_length=96, slots=4, steps=1, peak=1.0, json=file
    )
    found = json.loads(file.read_text())
    assert found["model"]["name"] == "random tiny"
    assert found["sizes"]["rows"] % jax.device_count() == 0
    assert found["memory"]["training_mib"] > 0
    shown = capsys.readouterr().out
    assert f"{found['training']['tokens_per_second']['useful']:,.0f} useful" in shown
    assert "peak: 1 TFLOP/s per device, as given" in shown


def test_an_unknown_peak_is_not_made_up(result, capsys, monkeypatch):
    unknown = {k: result[k] | {"share_of_peak": None} for k in ("training", "prefill", "decode")}
    monkeypatch.setenv("COLUMNS", "160")
    command.show(result | unknown, Console())
    assert capsys.readouterr().out.count("unknown") == 3


def test_on_cpu_the_peak_is_measured_around_each_step():
    watch = clock.Clock.make(None, "float32")
    times = watch.measure(lambda: None, 2)
    assert watch.peak is None and all(peak > 0 for peak in times.peak)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v6 lite", 918), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("Radeon", None),
    ],
)  # fmt: skip
def test_the_table_of_peaks_takes_the_right_line(kind, tflops, monkeypatch):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = clock.Clock.make(None, "bfloat16")
    assert found.peak == (None if tflops is None else 4 * tflops)
    # The table is of bfloat16; nothing is said of another type.
    assert clock.Clock.make(None, "float32").peak is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": "9t"}, "--shape is '9t'; expected one of 135m, 1b"),
        ({"dtype": "int8"}, "--dtype is 'int8'; expected one of float32, bfloat16"),
        ({"remat": "some"}, "--remat is 'some'; expected one of none"),
        ({"sizes": dataclasses.replace(SIZES, response=1)}, "response is 1"),
    ],
)
def test_what_cannot_be_measured_is_said(wrong, message):
    with pytest.raises(bench.BenchError, match=message):
        bench.run("", **({"shape": "tiny", "sizes": SIZES} | wrong))


def test_sizes_below_one_are_refused():
    with pytest.raises(bench.BenchError, match="slots is 0"):
        dataclasses.replace(SIZES, slots=0)


def test_release_starts_the_peak_anew():
    block = bytearray(512 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    with_block = memory.peak_mib()
    del block
    memory.release()
    assert memory.peak_mib() < with_block - 400
