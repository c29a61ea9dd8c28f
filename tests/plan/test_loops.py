"""Collectives in the loops of compiled programs: which there are, and which are needless."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selm_jax.parallel.mesh import make_mesh
from selm_jax.plan.loops import in_loops

TURNS, WIDTH, VOCABULARY = 4, 64, 512
MESH = ((1, 8, 1), 8)


def compiled(function, weights: tuple[int, ...], spec: P) -> str:
    """The HLO of a function's gradient on 8 devices; hidden states are [8, turns * 16, width]."""
    mesh = make_mesh(MESH[0], jax.devices()[: MESH[1]])
    rows, where = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, spec)
    hidden = jax.ShapeDtypeStruct((8, TURNS * 16, WIDTH), jnp.float32, sharding=rows)
    matrix = jax.ShapeDtypeStruct(weights, jnp.float32, sharding=where)
    gradients = jax.grad(lambda h, w: function(h, w).sum(), argnums=(0, 1))
    made = jax.jit(gradients, out_shardings=(rows, where)).lower(hidden, matrix).compile()
    return made.as_text() or ""


def by_chunks(hidden, unembedding):
    """The normaliser of every token, for a chunk of tokens at a time."""
    chunks = jnp.moveaxis(hidden.reshape(8, TURNS, 16, WIDTH), 1, 0)
    normaliser = jax.checkpoint(lambda h: jax.nn.logsumexp(h @ unembedding.T, axis=-1))
    found = jax.lax.map(normaliser, chunks)
    return jnp.moveaxis(found, 0, 1)


def by_layers(hidden, matrices):
    """A stack of layers, each with a matrix of its own."""
    return jax.lax.scan(lambda h, matrix: (jnp.tanh(h @ matrix), None), hidden, matrices)[0]


def gathered_before(hidden, unembedding):
    whole = jax.lax.with_sharding_constraint(
        unembedding, NamedSharding(make_mesh(MESH[0], jax.devices()[: MESH[1]]), P())
    )
    return by_chunks(hidden, whole)


def gathers(hlo: str, least: int = 0):
    return [each for each in in_loops(hlo, least) if each.kind == "all-gather"]


def test_an_array_that_every_turn_gathers_again_is_found():
    hlo = compiled(by_chunks, (VOCABULARY, WIDTH), P(None, "fsdp"))
    found = gathers(hlo)
    assert found
    for each in found:
        assert each.same  # the layout is the compiler's choice
        assert each.array in (f"f32[{VOCABULARY},{WIDTH}]", f"f32[{WIDTH},{VOCABULARY}]")
        assert each.bytes == 4 * VOCABULARY * WIDTH and "while" in each.source
    assert not gathers(hlo, least=found[0].bytes + 1)


def test_the_weights_of_a_layer_are_another_array_in_every_turn():
    found = gathers(compiled(by_layers, (TURNS, WIDTH, WIDTH), P(None, "fsdp")))
    assert found and not any(each.same for each in found)
    assert {each.bytes for each in found} == {4 * WIDTH * WIDTH}


def test_a_gather_before_the_loop_is_not_in_it():
    hlo = compiled(gathered_before, (VOCABULARY, WIDTH), P(None, "fsdp"))
    assert "all-gather" in hlo and not gathers(hlo)


def test_a_loop_without_collectives_has_none():
    assert not gathers(compiled(by_chunks, (VOCABULARY, WIDTH), P()))


TPU = """\
%fused (p: bf16[8192,128]) -> bf16[8192,1024] {
  %p = bf16[8192,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag = bf16[8192,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), dimensions={1}
}

%body (state: (s32[], bf16[8192,128], f32[4,8])) -> (s32[], bf16[8192,128], f32[4,8]) {
  %state = (s32[]{:T(128)}, bf16[8192,128]{1,0:T(8,128)(2,1)S(1)}, f32[4,8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %w = bf16[8192,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %out = f32[4,8]{1,0} get-tuple-element(%state), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %start = (bf16[8192,128]{1,0}, bf16[8192,1024]{1,0}) all-gather-start(%w), metadata={op_name="f"}
  %done = bf16[8192,1024]{1,0} all-gather-done(%start)
  %called = bf16[8192,1024]{1,0} fusion(%w), kind=kCustom, calls=%fused
  %sum = f32[4,8]{1,0} all-reduce(%out), to_apply=%add
  ROOT %state.2 = (s32[]{:T(128)}, bf16[8192,128]{1,0}, f32[4,8]) tuple(%next, %w, %sum)
}

ENTRY %main (a: bf16[8192,128]) -> bf16[8192,128] {
  %loop = (s32[], bf16[8192,128], f32[4,8]) while(%init), condition=%until, body=%body
  %outside = bf16[8192,1024]{1,0} all-gather(%a), dimensions={1}
}
"""


def test_the_forms_that_the_tpu_compiler_writes_are_read():
    """Asynchronous collectives, those in fusions, and types with layouts."""
    found = [(each.kind, each.array, each.same, each.source) for each in in_loops(TPU, 0)]
    gathered = "bf16[8192,1024]"
    assert found == [
        ("all-gather", gathered, True, "f"),
        ("all-gather", gathered, True, ""),
        ("all-reduce", "f32[4,8]", False, ""),
    ]
