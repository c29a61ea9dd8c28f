"""What `selm plan` says of TPUs is what their compiler says: every slice, its chips, its memory."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import pytest

from selm_jax.plan.topology import GENERATIONS, GIB, Target, local_target, target

pytestmark = [pytest.mark.slow, pytest.mark.libtpu]


@pytest.mark.parametrize("name", GENERATIONS)
def test_every_slice_opens_and_takes_a_program_on_all_its_chips(name, tried):
    for shape in GENERATIONS[name].shapes:
        where = target(f"{name}:{shape}")
        assert where.chips == math.prod(map(int, shape.split("x")))
        assert len(where.devices) == where.chips * GENERATIONS[name].devices_per_chip
        program = compiled_sum(where)
        assert len(program.input_shardings[0][0].device_set) == len(where.devices)
        assert "all-reduce" in program.as_text() or len(where.devices) == 1
    tried(f"{name}: compiled for {', '.join(GENERATIONS[name].shapes)}")


def compiled_sum(where: Target) -> jax.stages.Compiled:
    """A product of matrices, summed over all devices."""
    mesh = jax.make_mesh((len(where.devices),), ("x",), devices=where.devices)
    cut, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P("x"), jax.P()))
    x = jax.ShapeDtypeStruct((8 * len(where.devices), 128), "bfloat16", sharding=cut)
    w = jax.ShapeDtypeStruct((128, 128), "bfloat16", sharding=whole)
    return jax.jit(lambda x, w: (x @ w).sum()).lower(x, w).compile()


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_compiler_takes_what_is_just_within_the_bound_and_refuses_what_is_just_beyond(name):
    where = target(f"{name}:{GENERATIONS[name].shapes[0]}")
    assert compiled_double(where, where.hbm - 0.01 * GIB)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ran out of memory on HBM"):
        compiled_double(where, where.hbm + 0.01 * GIB)


def compiled_double(where: Target, memory: float) -> jax.stages.Compiled:
    """A program of one device whose argument and result take this many bytes."""
    device = jax.sharding.SingleDeviceSharding(where.devices[0])
    x = jax.ShapeDtypeStruct((int(memory / 2 / 4096), 8, 128), "float32", sharding=device)
    return jax.jit(lambda x: 2 * x).lower(x).compile()


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_slice_that_is_here_is_known_by_what_it_calls_its_chips(name, monkeypatch):
    planned = target(f"{name}:{GENERATIONS[name].shapes[2]}")
    kind = planned.devices[0].device_kind
    device = SimpleNamespace(platform="tpu", device_kind=kind, memory_stats=lambda: None)
    monkeypatch.setattr(jax, "devices", lambda: [device] * len(planned.devices))
    here = local_target()
    assert (here.chips, here.peak, here.bandwidth) == (
        planned.chips, planned.peak, planned.bandwidth,
    )  # fmt: skip
