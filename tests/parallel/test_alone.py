"""The devices on which a process can run a program alone."""

from __future__ import annotations

import jax
import pytest

from selm_jax.parallel.alone import own_devices
from selm_jax.plan.topology import target


class Device:
    def __init__(self, process: int, kind: str):
        self.process_index, self.device_kind = process, kind


def slice_of(kind: str, hosts: int, first: int = 0) -> list[Device]:
    return [Device(first + i // 4, kind) for i in range(4 * hosts)]


@pytest.mark.parametrize(
    "kind, hosts, count",
    [("TPU v5 lite", 4, 4), ("TPU v5 lite", 8, 1), ("TPU v5", 8, 4), ("TPU v6 lite", 8, 4)],
)
def test_on_a_large_v5e_slice_a_process_uses_one_chip_alone(kind, hosts, count):
    devices = slice_of(kind, hosts)
    assert own_devices(devices) == devices[:count]


def test_on_this_machine_a_process_uses_all_devices():
    assert own_devices() == jax.local_devices()


@pytest.mark.slow
@pytest.mark.libtpu
def test_the_compiler_refuses_four_chips_of_a_larger_v5e_slice_and_takes_one():
    """The reason for the rule: where this fails, the rule is no longer needed."""

    def double_on(devices):
        mesh = jax.make_mesh((len(devices),), ("x",), devices=devices)
        where = jax.sharding.NamedSharding(mesh, jax.P("x"))
        x = jax.ShapeDtypeStruct((8 * len(devices),), "float32", sharding=where)
        return jax.jit(lambda x: 2 * x).lower(x).compile()

    devices = target("v5e:4x8").devices
    assert double_on(own_devices(devices))
    assert double_on(devices)
    with pytest.raises(jax.errors.JaxRuntimeError, match="limited ICI routing"):
        double_on([d for d in devices if d.process_index == devices[0].process_index])
