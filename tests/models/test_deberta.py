"""DeBERTa against transformers, and its fast attention against the obvious one."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models.config import UnsupportedModel
from selm_jax.models.config_deberta import DebertaConfig, from_hf
from selm_jax.models.deberta import (
    Deberta,
    LayerNorm,
    PairScorer,
    abstract_params,
    bucket,
    diagonals,
    disentangled_attention,
    slant,
    table_rows,
)
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings

# Like PairRM in everything about distances, otherwise tiny.
TINY = DebertaConfig(
    vocab_size=64, embed=32, layers=2, heads=2, mlp=48, norm_eps=1e-7, buckets=256, max_distance=512
)
HF = {
    "model_type": "deberta-v2", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 48, "hidden_act": "gelu",
    "layer_norm_eps": 1e-7, "relative_attention": True, "position_buckets": 256,
    "max_position_embeddings": 512, "max_relative_positions": -1, "pos_att_type": "p2c|c2p",
    "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    "type_vocab_size": 0,
}  # fmt: skip


def random_params(config: DebertaConfig, seed: int = 0):
    """Norm scales are random too: at 1 they would hide mistakes."""
    rng = np.random.default_rng(seed)

    def some(path, x):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.25, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(some, nn.unbox(abstract_params(config)))


# --- distances --------------------------------------------------------------------------------


@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (64, 512), (32, 2048), (6, 9)])
def test_buckets_are_those_of_transformers(buckets, furthest):
    torch = pytest.importorskip("torch")
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distance = np.arange(-3000, 3001)
    theirs = make_log_bucket_position(torch.tensor(distance), buckets, furthest).long().numpy()
    np.testing.assert_array_equal(bucket(distance, buckets, furthest), theirs)


def test_buckets_at_their_boundaries():
    distance = np.array([0, 127, 128, 129, 510, 511, 512, 2047])
    found = bucket(distance, 256, 512)
    assert found.tolist()[:3] == [0, 127, 128] and found[5] == 255 and found[6] > 255
    np.testing.assert_array_equal(bucket(-distance, 256, 512), -found)
    rows = table_rows(TINY, np.array([-2047, -512, -511, 0, 511, 512, 2047]))
    assert rows.tolist() == [0, 0, 1, 256, 511, 511, 511]


@pytest.mark.parametrize(("t", "lead"), [(1, ()), (2, (3,)), (3, (2, 3)), (8, ())])
def test_slant_puts_every_diagonal_into_place(t, lead):
    x = jnp.asarray(np.random.default_rng(t).normal(size=(*lead, t, 2 * t)), jnp.float32)
    i, j = np.indices((t, t))
    np.testing.assert_array_equal(slant(x), x[..., i, t - 1 - i + j])
    distance = jnp.broadcast_to(diagonals(t).astype(np.float32), (t, 2 * t))
    np.testing.assert_array_equal(slant(distance), i - j)


# --- attention --------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "at_once"), [(1, 1), (5, 1), (5, 3), (130, 2), (520, 1)])
def test_attention_is_the_sum_over_content_and_distances(time, at_once):
    """The obvious form: one table of rows for all pairs (i, j), gathered, in float64."""
    rng = np.random.default_rng(time)
    rows, heads, h = 2, 3, 4
    q, k, v = rng.normal(size=(3, rows, time, heads, h))
    of_key, of_query = rng.normal(size=(2, 2 * TINY.buckets, heads, h))
    real = np.arange(time) < np.array([[time], [max(1, time // 2)]])

    i, j = np.indices((time, time))
    table = table_rows(TINY, i - j)
    scores = np.einsum("rinh,rjnh->rnij", q, k)
    scores += np.einsum("rinh,ijnh->rnij", q, of_key[table])
    scores += np.einsum("rjnh,ijnh->rnij", k, of_query[table])
    scores = np.where(real[:, None, None], scores / np.sqrt(3 * h), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("rnij,rjnh->rinh", weights / weights.sum(-1, keepdims=True), v)

    distance = diagonals(time)
    found = disentangled_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        to_query=jnp.asarray(of_key[table_rows(TINY, distance)], jnp.float32),
        to_key=jnp.asarray(of_query[table_rows(TINY, -distance)], jnp.float32),
        real=jnp.asarray(real),
        heads_at_once=at_once,
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_layer_norm_is_float32_inside():
    x = jnp.asarray(1000 + np.arange(8.0), jnp.bfloat16)  # bfloat16 cannot hold the differences
    norm = LayerNorm(1e-7, jnp.bfloat16)
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean()) / wide.std()
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.01, atol=0.01)


# --- the whole encoder ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_torch():
    """transformers' model with our random parameters."""
    torch = pytest.importorskip("torch")
    from transformers import DebertaV2Config, DebertaV2Model

    params = jax.tree.map(np.asarray, random_params(TINY)["encoder"])
    model = DebertaV2Model(DebertaV2Config(**HF)).eval()

    def dense(module, p, inputs=1):
        fan_in = int(np.prod(p["kernel"].shape[:inputs]))
        module.weight.copy_(torch.tensor(p["kernel"].reshape(fan_in, -1).T))
        module.bias.copy_(torch.tensor(p["bias"].reshape(-1)))

    def norm(module, p):
        module.weight.copy_(torch.tensor(p["scale"]))
        module.bias.copy_(torch.tensor(p["bias"]))

    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(torch.tensor(params["embedding"]))
        model.encoder.rel_embeddings.weight.copy_(torch.tensor(params["distances"]))
        norm(model.embeddings.LayerNorm, params["embedding_norm"])
        norm(model.encoder.LayerNorm, params["distances_norm"])
        for i, layer in enumerate(model.encoder.layer):
            p = jax.tree.map(lambda x, i=i: x[i], params["layers"])
            own = layer.attention.self
            for name, module in (
                ("q", own.query_proj), ("k", own.key_proj), ("v", own.value_proj),
                ("up", layer.intermediate.dense), ("down", layer.output.dense),
            ):  # fmt: skip
                dense(module, p[name])
            dense(layer.attention.output.dense, p["o"], inputs=2)
            norm(layer.attention.output.LayerNorm, p["attention_norm"])
            norm(layer.output.LayerNorm, p["mlp_norm"])

    def hidden(tokens) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor(tokens)[None]).last_hidden_state[0].numpy()

    return hidden


def test_hidden_states_are_those_of_transformers(in_torch, parity):
    """Each row alone and unpadded there, all in one padded batch here.

    The longest distance |i - j| of a row of n tokens is n - 1: 127, 128, 511 and 512 are in here.
    """
    lengths = np.array([1, 7, 128, 129, 512, 513, 900])
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, TINY.vocab_size, (len(lengths), 960), dtype=np.int32)
    params = {"params": random_params(TINY)["encoder"]}
    found = np.asarray(jax.jit(Deberta(TINY).apply)(params, tokens, lengths))
    for row, n in enumerate(lengths):
        expected = in_torch(tokens[row, :n].astype(np.int64))
        worst = float(np.abs(found[row, :n] - expected).max())
        np.testing.assert_allclose(found[row, :n], expected, atol=1e-4)
        parity("DeBERTa-v3", f"{n} tokens", worst)


def test_parameters_find_their_place_on_a_mesh():
    """Parameters sharded over fsdp and tensor give the same logits."""
    params = random_params(TINY)
    rng = np.random.default_rng(2)
    inputs = (
        rng.integers(0, TINY.vocab_size, (4, 24)), np.array([24, 9, 17, 12]),
        np.array([[1, 4, 8]] * 4),
    )  # fmt: skip
    apply = jax.jit(PairScorer(TINY).apply)
    alone = apply({"params": params}, *inputs)
    where = shardings(abstract_params(TINY), make_mesh((2, 2, 2)), TRAINING)
    placed = jax.tree.map(jax.device_put, params, where)
    assert len(placed["encoder"]["layers"]["q"]["kernel"].sharding.device_set) == 8
    np.testing.assert_allclose(apply({"params": placed}, *inputs), alone, atol=1e-5)


# --- config.json ------------------------------------------------------------------------------


def test_config_is_read():
    assert from_hf(HF) == TINY
    assert from_hf(HF | {"max_relative_positions": 300}).max_distance == 300
    assert from_hf(HF | {"pos_att_type": ["c2p", "p2c"]}) == TINY


def test_config_that_transformers_writes_is_read():
    transformers = pytest.importorskip("transformers")
    assert from_hf(transformers.DebertaV2Config(**HF).to_dict()) == TINY


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "deberta"), ("hidden_act", "relu"), ("relative_attention", False),
        ("position_biased_input", True), ("share_att_key", False), ("norm_rel_ebd", "none"),
        ("type_vocab_size", 2), ("conv_kernel_size", 3), ("pos_att_type", "c2p"),
        ("pos_att_type", None), ("attention_head_size", 8), ("embedding_size", 16),
        ("something_new", 1), ("position_buckets", 0), ("position_buckets", 7),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(key, value):
    with pytest.raises(UnsupportedModel, match=key):
        from_hf(HF | {key: value})


@pytest.mark.parametrize("key", sorted(set(HF) - {"max_relative_positions"}))
def test_a_key_that_is_missing_is_named(key):
    with pytest.raises(UnsupportedModel, match=key):
        from_hf({k: v for k, v in HF.items() if k != key})


def test_all_problems_are_listed_at_once():
    with pytest.raises(UnsupportedModel, match="hidden_act.*norm_rel_ebd.*something_new"):
        from_hf(HF | {"hidden_act": "relu", "norm_rel_ebd": "none", "something_new": 1})


def test_heads_must_divide_the_width():
    with pytest.raises(
        UnsupportedModel, match="hidden_size 32 is not divisible by 3 attention heads"
    ):
        from_hf(HF | {"num_attention_heads": 3})
