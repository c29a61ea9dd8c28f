"""The limits of a device: how fast it can calculate, and how fast it reads its memory.

Data sheets give both for TPUs and GPUs. On CPU they are measured, because a virtual core is not
always a whole one.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from selm_jax.shell.data_sheets import BANDWIDTHS, PEAKS, known

_COPIED = 128 * 2**20  # bytes; more than the caches of a processor


@dataclasses.dataclass(frozen=True)
class Limit:
    """A rate that the devices cannot exceed.

    Attributes:
      rate: the rate of all devices together; None if it is unknown or measured.
      source: where the rate is from, in words.
      measure: measures the rate; None if it is known or cannot be measured.
    """

    rate: float | None
    source: str
    measure: Callable[[], float] | None = None

    def now(self) -> float | None:
        """The rate at this moment; None if it is unknown."""
        return self.measure() if self.measure else self.rate


def arithmetic(given: float | None, dtype: str) -> Limit:
    """The peak TFLOP/s of all devices.

    Args:
      given: the user's figure for one device; None looks it up, or measures it on CPU.
    """
    kind = jax.devices()[0].device_kind
    if given is None and jax.default_backend() == "cpu":
        source = "rate of a 2048^3 float32 matrix product, measured before and after each step"
        return Limit(None, source, _matmul())
    rate = known(PEAKS, kind) if dtype == "bfloat16" else None
    unknown = f"unknown for {kind} in {dtype}; give it with --peak"
    return _of_all(given, "TFLOP/s", rate, "bfloat16 TFLOP/s", unknown)


def memory(given: float | None) -> Limit:
    """The GB/s at which all devices read and write their memory.

    Args:
      given: the user's figure for one device; None looks it up, or measures it on CPU.
    """
    kind = jax.devices()[0].device_kind
    if given is None and jax.default_backend() == "cpu":
        source = "rate of copying 128 MiB, read and written, measured before and after each step"
        return Limit(None, source, _copy())
    unknown = f"unknown for {kind}; give it with --bandwidth"
    return _of_all(given, "GB/s", known(BANDWIDTHS, kind), "GB/s", unknown)


def _of_all(
    given: float | None, unit: str, sheet: float | None, sheet_unit: str, unknown: str
) -> Limit:
    """The limit of all devices: the user's figure for each, or the data sheet's, or `unknown`."""
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    if given is not None:
        return Limit(given * count, f"{given:g} {unit} per device, as given")
    if sheet is None:
        return Limit(None, unknown)
    return Limit(sheet * count, f"{sheet:g} {sheet_unit} per {kind}, from its data sheet")


def _matmul() -> Callable[[], float]:
    """Makes a function that measures the TFLOP/s of a 2048^3 float32 matrix product."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    return lambda: 2e-12 * 2048**3 / _best(lambda: product(x))


def _copy() -> Callable[[], float]:
    """Makes a function that measures the GB/s of a copy into memory that is already there.

    A fresh array would cost page faults, which take several times as long. The arrays are let go
    after each measurement, so that they are not part of a step's peak memory.
    """
    into = jax.jit(lambda old, new: old.at[:].set(new), donate_argnums=0)

    def measure() -> float:
        source = jnp.ones(_COPIED // 4, jnp.float32)
        held = jnp.zeros_like(source)

        def copy() -> jax.Array:
            nonlocal held
            held = into(held, source)
            return held

        copy()
        return 2e-9 * _COPIED / _best(copy)

    return measure


def _best(work: Callable[[], jax.Array]) -> float:
    """The smaller number of seconds of two runs: the first may pay for memory given back before."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        work().block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def cpu_name() -> str:
    """The processor's name, with its family and model if the system tells them.

    Virtual machines often name only the maker's line, such as "AMD EPYC".
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        text = ""
    facts = dict(re.findall(r"^([a-z ]+?)\s*: (.+)$", text, re.MULTILINE))
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    if "cpu family" not in facts:
        return facts["model name"]
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
