"""What an update reports of its work: tokens by role, operations, speed, and seconds by phase."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from selm_jax.models.config import DecoderConfig, LayerKind, Rope
from selm_jax.preferences.examples import Example
from selm_jax.shell import compiling
from selm_jax.training.laps import Laps
from selm_jax.training.work import Speed, tokens_of, useful

TINY = DecoderConfig(
    96, 32, 4, 2, 8, 64, (LayerKind(Rope(1e4)),) * 2, 1e-5, False, 2048, "LlamaForCausalLM"
)
# The explored answer is the chosen one in the first; in the second two explore, one of them twice.
EXAMPLES = [
    Example.of("a", (1, 2, 3), {"chosen": (4, 5), "rejected": (6,), "explore": (4, 5)}),
    Example.of(
        "b", (1,), {"chosen": (4,), "rejected": (6, 7, 8), "explore": (9, 9), "explore/2": (4,),
                    "explore/3": (9, 9)},
    ),
]  # fmt: skip


def test_tokens_are_counted_by_role_and_shared_answers_in_each():
    assert tokens_of(EXAMPLES, 26) == {
        "tokens": 3 + 2 + 1 + 1 + 1 + 3 + 2, "tokens/prompt": 4, "tokens/chosen": 3,
        "tokens/rejected": 4, "tokens/explore": 2 + 2 + 1, "padded": 26, "padding": 0.5,
    }  # fmt: skip
    pairs = [Example.of("a", (1,), {"chosen": (2,), "rejected": (3,)})]
    assert "tokens/explore" not in tokens_of(pairs, 3)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("live", [False, True])
def test_operations_are_those_that_an_update_cannot_leave_out(adapters, live):
    """Against XLA's own count of dense products, each of which an update makes some times."""

    def count(function, *shapes):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]

    def loss(w, x):
        return jnp.sum(x @ w)

    product = count(jnp.dot, (64, 32), (32, 96))
    ways = count(jax.grad(loss, argnums=(1,) if adapters else (0, 1)), (32, 96), (64, 32))
    backward = round(ways / product)
    assert backward == (1 if adapters else 2)
    found, forward = Speed(TINY, None, adapters, live), 1 + live
    each = useful(TINY, EXAMPLES)
    dense = (forward + backward) * (each.dense + each.head)
    assert found.operations(EXAMPLES) == dense + (forward + 2) * each.attention


def test_speed_leaves_out_compiling_and_is_a_share_only_of_a_known_peak():
    spent = {"data": 1.0, "gradients": 2.0, "apply": 1.0, "compile": 6.0, "checkpoint": 9.0}
    operations = Speed(TINY, None).operations(EXAMPLES)
    unknown = Speed(TINY, None).metrics(EXAMPLES, spent)
    known = Speed(TINY, peak=operations).metrics(EXAMPLES, spent)
    assert unknown["time/seconds"] == 10.0 and "time/mfu" not in unknown
    assert unknown["time/tflops"] == pytest.approx(operations / 4 / 1e12)
    assert known["time/mfu"] == pytest.approx(1 / 4)


def test_laps_charge_every_second_to_one_phase():
    clock, built = itertools.count(0, 10), iter([0, 0, 4, 4, 5])
    laps = Laps(lambda: next(clock), lambda: next(built))
    for phase in ("data", "gradients", "apply"):
        laps(phase)
    found = laps.taken()
    assert {k: v for k, v in found.items() if v} == {
        "data": 10, "gradients": 6, "apply": 10, "compile": 4,
    }  # fmt: skip
    laps("log")
    assert {k: v for k, v in laps.taken().items() if v} == {"log": 9, "compile": 1}


def test_building_a_program_is_counted_once_and_running_it_is_not():
    compiling.spent()
    inner = jax.jit(lambda x: jnp.tanh(x) * 2)
    function = jax.jit(lambda x: inner(inner(x) + 1).sum())
    x = jnp.ones(7)
    laps = Laps()
    function(x).block_until_ready()
    laps("gradients")
    first = laps.taken()
    function(x).block_until_ready()
    laps("gradients")
    assert 0 < first["compile"] and 0 <= first["gradients"]
    assert laps.taken()["compile"] == 0
    spans = sorted(compiling._spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "spans overlap"
