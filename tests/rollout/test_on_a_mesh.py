"""Generation on several devices: the same answers, and next to nothing sent between copies."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models.decoder import Decoder, abstract_params
from selm_jax.parallel.mesh import MeshError, decode_mesh, make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.rollout import slots as module
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling

WARM = Sampling(temperature=1.2, top_p=0.97, min_p=0.01)


@pytest.fixture(scope="module")
def on(tiny, random_params):
    """on(mesh sizes, tensor) -> engine, decoding parameters, resharded from training's."""
    config = tiny(tied=True)

    def make(sizes, tensor):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod(sizes))])
        copies = decode_mesh(mesh, tensor)
        at = shardings(abstract_params(config), mesh, TRAINING)
        params = jax.tree.map(jax.device_put, random_params(config), at)
        where = decoding_shardings(config, copies)
        engine = Engine.fitted(
            decoder=Decoder(config, scan=False), sampling=WARM, slots=10, max_prompt=16,
            max_new_tokens=8, stop_ids=(5, 17), prefill_rows=3, mesh=copies,
        )  # fmt: skip
        return engine, decoding_params(params, jnp.float32, where)

    return make


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    return [
        Request(i, tuple(map(int, rng.integers(0, 96, rng.integers(1, 17)))), 1, int(i % 4))
        for i in range(14)
    ]


@pytest.fixture(scope="module")
def alone(on, requests):
    engine, params = on((1, 1, 1), 1)
    return engine.generate(params, requests, seed=3, iteration=1)


@pytest.mark.parametrize(("sizes", "tensor"), [((1, 8, 1), 1), ((1, 8, 1), 2), ((2, 2, 2), 2)])
def test_copies_say_what_one_device_says(sizes, tensor, on, requests, alone):
    engine, params = on(sizes, tensor)
    copies = 8 // tensor
    assert (engine.slots, engine.prefill_rows) == (
        -(-10 // copies) * copies,
        -(-3 // copies) * copies,
    )
    assert engine.generate(params, requests, seed=3, iteration=1) == alone


def test_few_groups_of_prompts_wait_and_a_copy_with_free_slots_has_no_rows_left(
    on, requests, monkeypatch
):
    engine, params = on((1, 8, 1), 1)
    waiting = []

    def refill(engine, params, slots, board, queue, *rest):
        slots, groups = real(engine, params, slots, board, queue, *rest)
        for copy in range(8):
            assert not board.free(copy) or not any(group.rows[copy] for group in groups)
        assert not queue or len(groups) == engine.groups or not all(map(board.free, range(8)))
        waiting.append(len(groups))
        return slots, groups

    real = Engine._refill
    monkeypatch.setattr(Engine, "_refill", refill)
    many = [dataclasses.replace(r, index=100 * i + r.index) for i in range(3) for r in requests]
    found = engine.generate(params, many, seed=3, iteration=1)
    assert len(found) == sum(len(r.wanted()) for r in many)
    assert 1 < max(waiting) <= engine.groups


def collectives(compiled) -> list[str]:
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= (\S+) (?:{kinds})(?:-start)?\(", compiled.as_text())


def decode(engine, params):
    slots = module.empty(engine, 24)
    one_slot = slots.cache[0].keys.sharding.shard_shape(slots.cache[0].keys.shape)
    assert one_slot[0] == engine.slots // engine.mesh.shape["data"]
    return module.decode.lower(engine, params, slots, np.int32(1), np.int32(8)).compile()


def test_copies_exchange_the_count_of_idle_slots_and_nothing_else(on):
    """In a step; when all steps are done the host is shown five small arrays of all slots."""
    engine, params = on((1, 8, 1), 1)
    n = engine.slots
    shapes = [re.sub(r"\{.*", "", s) for s in collectives(decode(engine, params))]
    seen = [f"pred[{n}]", f"s32[{n}]", f"s32[{n},8]", f"f32[{n},8]", f"f32[{n},8]"]
    assert sorted(shapes) == sorted(["s32[]", *seen])


@pytest.mark.parametrize("tensor", [1, 2])
def test_no_cache_travels_from_a_prefill_to_the_slots(tensor, on):
    engine, params = on((1, 8, 1), tensor)
    tokens = np.zeros((engine.prefill_rows, 16), np.int32)
    lengths = np.ones(engine.prefill_rows, np.int32)
    prefill = module.prefill.lower(engine, params, tokens, lengths).compile()
    cache, scores = module.prefill(engine, params, tokens, lengths)
    for x in (*scores, cache[0].keys, cache[0].values):
        assert x.sharding.shard_shape(x.shape)[0] == engine.prefill_rows // engine.copies
    n = engine.slots
    flags = np.zeros((n, 2), np.uint32), np.zeros(n, bool)
    insert = module.insert.lower(
        engine, module.empty(engine, 24), cache, scores, *np.zeros((2, n), np.int32), *flags
    )
    assert not collectives(insert.compile())
    if tensor == 1:
        assert not collectives(prefill)
    else:  # hidden states and logits, inside each copy
        shapes = [re.sub(r"\{.*", "", s) for s in collectives(prefill)]
        assert shapes and all(shape.count(",") < cache[0].keys.ndim - 1 for shape in shapes)


def test_no_weight_travels_while_a_cut_model_decodes(on):
    engine, params = on((1, 8, 1), 2)
    weights = {x.shape for x in jax.tree.leaves(params) if x.ndim > 1}
    weights |= {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(params) if x.ndim > 1}
    sent = collectives(decode(engine, params))
    sizes = {
        tuple(map(int, filter(None, s[s.index("[") + 1 : s.index("]")].split(",")))) for s in sent
    }
    assert sizes and not sizes & weights


def test_what_the_copies_cannot_be_cut_into_is_named(on):
    with pytest.raises(MeshError, match=r"layers/attention/k.*'kv_heads' of size 2.*4"):
        on((1, 8, 1), 4)
    with pytest.raises(MeshError, match="decode_tensor is 3"):
        on((1, 8, 1), 3)
