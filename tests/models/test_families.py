"""Every family against transformers: the same logits from the same checkpoint, in every form.

The checkpoints and logits in tests/golden/families were made by transformers (tests/golden/
families.py); where torch is installed, checkpoints are made anew and compared live too.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models import families
from selm_jax.models.cache import empty_cache
from selm_jax.models.config import DecoderConfig, LongRope, UnsupportedModel
from selm_jax.models.config_keys import HARMLESS
from selm_jax.models.decoder import Decoder, abstract_params, logits, parameter_count
from selm_jax.models.families import FAMILIES, from_hf, read_config, text_model_json, to_hf
from selm_jax.models.multimodal import MULTIMODAL
from selm_jax.models.stacked import unstack
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import common_shape, pack
from selm_jax.weights.huggingface import load
from selm_jax.weights.names import tensors

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("golden_families", GOLDEN / "families.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

CHECKPOINTS = list(golden.FAMILIES)
# These repeat what others do in every form, with other names or a factor, so that theirs are slow.
REPEATED = (
    "ministral-3", "granite-4", "glm-4", "gemma-3", "gemma-3-images", "gemma-4-images",
    "mistral-3-images",
)  # fmt: skip
FORMS = [
    pytest.param(name, marks=pytest.mark.slow) if name in REPEATED else name for name in CHECKPOINTS
]
ATOL = 2e-4
TIME = golden.LENGTH


@cache
def config_of(name: str, length: int = TIME) -> DecoderConfig:
    return read_config(golden.FOLDER / name).for_length(length)


@cache
def params_of(name: str):
    return load(golden.FOLDER / name, config_of(name))


@cache
def forward(config: DecoderConfig):
    """(params, tokens, positions, end) -> logits, compiled once per family and shape."""
    decoder = Decoder(config)

    def run(params, tokens, positions, end):
        hidden, _ = decoder.apply({"params": params}, tokens, positions, end)
        return logits(config, params, hidden)

    return jax.jit(run)


@cache
def full_logits(name: str) -> np.ndarray:
    positions = np.broadcast_to(np.arange(TIME), (2, TIME))
    run = forward(config_of(name))
    return np.asarray(run(params_of(name), golden.tokens(), positions, causal(2, TIME)))


def causal(rows: int, time: int) -> np.ndarray:
    """The ends of rows in which every later token sees each one."""
    return np.full((rows, time), time)


def worst(parity, name: str, form: str, ours, theirs) -> None:
    """Records the largest difference and checks its bound."""
    difference = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    parity(name, form, difference)
    assert difference <= ATOL, f"{name}, {form}: logits differ by {difference:.1e}"


# --- the same logits ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_transformers(name, parity):
    with np.load(golden.FOLDER / name / "logits.npz") as kept:
        theirs = dict(kept)
    assert np.abs(theirs["long"]).max() > 1
    worst(parity, name, "golden", full_logits(name)[:, golden.KEPT], theirs["long"])
    if "short" in theirs:
        short, time = config_of(name, golden.SHORT), golden.SHORT
        assert short != config_of(name)
        positions = np.broadcast_to(np.arange(time), (2, time))
        tokens = golden.tokens()[:, :time]
        ours = forward(short)(params_of(name), tokens, positions, causal(2, time))
        at = [t for t in golden.KEPT if t < time]
        worst(parity, name, "golden", ours[:, at], theirs["short"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_transformers_live(name, parity, tmp_path):
    pytest.importorskip("torch")
    model = golden.make(name, tmp_path)
    config = read_config(tmp_path).for_length(TIME)
    assert config == config_of(name)
    theirs = golden.logits(model, golden.tokens())
    # The same weights as in the folder, or torch has changed its random numbers: both are fine.
    positions = np.broadcast_to(np.arange(TIME), (2, TIME))
    ours = forward(config)(load(tmp_path, config), golden.tokens(), positions, causal(2, TIME))
    worst(parity, name, "live", ours, theirs)


@pytest.mark.slow_except(
    "llama-3.1", "gemma-2", "gemma-4", "gpt-oss", "qwen3-moe", "olmo-3", "phi-4-mini", "granite-3"
)
@pytest.mark.parametrize("name", FORMS)
def test_padding_on_either_side_changes_nothing(name, parity):
    """A left-padded and a right-padded row beside each other; junk in the padding."""
    length, pad = TIME - 60, 60
    tokens = np.random.default_rng(1).integers(0, 96, (2, TIME)).astype(np.int32)
    positions = np.random.default_rng(2).integers(0, TIME, (2, TIME)).astype(np.int32)
    # Padding sees any of the padding, and on the right the sequence, too.
    ends = np.random.default_rng(3).integers(0, (pad + 1, TIME + 1), (TIME, 2)).T
    for row, at in enumerate((slice(pad, None), slice(0, length))):
        tokens[row, at] = golden.tokens()[row, :length]
        positions[row, at] = np.arange(length)
        ends[row, at] = TIME
    found = forward(config_of(name))(params_of(name), tokens, positions, ends)
    ours = np.stack([found[0, pad:], found[1, :length]])
    worst(parity, name, "padded", ours, full_logits(name)[:, :length])


@pytest.mark.slow_except(
    "llama-3.1", "gemma-2", "gemma-4", "gpt-oss", "qwen3-moe", "olmo-3", "phi-4-mini", "granite-3"
)
@pytest.mark.parametrize("name", FORMS)
def test_packed_trees_are_separate_sequences(name, parity):
    """Two trees in a row, their branches beyond position 1,000 in the first."""
    a, b = golden.tokens()
    trees = [
        Example("far", tuple(a[:1000]), (tuple(a[1000:1030]), tuple(b[:25])), {}),
        Example("near", tuple(b[:20]), (tuple(b[20:30]), tuple(a[:12])), {}),
    ]
    shape = common_shape([trees], rows=2, time=TIME)
    (batch,) = pack(trees, shape)
    run, params = forward(config_of(name)), params_of(name)
    packed = np.asarray(run(params, batch.tokens, batch.position, batch.end))
    # The four sequences by themselves, two rows at a time through the same program.
    for segment, tree in enumerate(trees, start=1):
        alone = np.zeros((2, TIME), np.int32)
        for i, response in enumerate(tree.responses):
            path = (*tree.prompt, *response)
            alone[i, : len(path)] = path
        positions = np.broadcast_to(np.arange(TIME), (2, TIME))
        expected = np.asarray(run(params, alone, positions, causal(2, TIME)))
        for i, response in enumerate(tree.responses):
            mine = (batch.segment[0] == segment) & np.isin(batch.branch[0], (0, i + 1))
            length = len(tree.prompt) + len(response)
            worst(parity, name, "packed", packed[0][mine], expected[i, :length])


@pytest.mark.slow_except(
    "llama-3.1", "gemma-2", "gemma-4", "gpt-oss", "qwen3-moe", "olmo-3", "phi-4-mini", "granite-3"
)
@pytest.mark.parametrize("name", FORMS)
def test_prefill_and_cached_decoding_are_one_forward_pass(name, parity):
    config = config_of(name)
    decoder, params = Decoder(config, scan=False), unstack(params_of(name))
    capacity, prefilled, steps = 1056, 1024, 24

    @jax.jit
    def run(params, tokens, positions, cache, index):
        variables = {"params": params}
        hidden, cache = decoder.apply(variables, tokens, positions, None, cache, index)
        return logits(config, params, hidden), cache

    tokens = golden.tokens()
    positions = np.broadcast_to(np.arange(prefilled), (2, prefilled))
    first, cache = run(
        params, tokens[:, :prefilled], positions, empty_cache(config, 2, prefilled),
        jnp.zeros(2, jnp.int32),
    )  # fmt: skip
    worst(parity, name, "cached", first, full_logits(name)[:, :prefilled])
    cache = jax.tree.map(
        lambda empty, filled: empty.at[:, :, :prefilled].set(filled),
        empty_cache(config, 2, capacity),
        cache,
    )
    for t in range(prefilled, prefilled + steps):
        at = np.full((2, 1), t)
        found, cache = run(params, tokens[:, t : t + 1], at, cache, at[:, 0])
        worst(parity, name, "cached", found[:, 0], full_logits(name)[:, t])


def test_a_norm_over_all_heads_is_the_same_with_heads_on_several_devices():
    config, time = config_of("olmo-2"), 128
    mesh = make_mesh((1, 2, 2), jax.devices()[:4])
    where = shardings(abstract_params(config), mesh, TRAINING)
    params = load(golden.FOLDER / "olmo-2", config, shardings=where)
    assert params["layers"]["attention"]["q"].sharding.spec[2] == "tensor"
    positions = np.broadcast_to(np.arange(time, dtype=np.int32), (2, time))
    batch = place_rows((golden.tokens()[:, :time], positions), mesh)

    @jax.jit
    def run(params, tokens, positions):
        hidden, _ = Decoder(config, mesh=mesh).apply({"params": params}, tokens, positions)
        return logits(config, params, hidden)

    np.testing.assert_allclose(run(params, *batch), full_logits("olmo-2")[:, :time], atol=ATOL)


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_way_out_and_back_in(name):
    config = read_config(golden.FOLDER / name)
    written = json.loads(json.dumps(to_hf(config)))
    assert from_hf(written) == config
    pytest.importorskip("torch")
    import transformers

    # What we write, transformers reads as the same model.
    theirs = transformers.AutoConfig.for_model(**written)
    assert from_hf(json.loads(theirs.to_json_string(use_diff=False))) == config


# Keys without effect beside the others that the checkpoint has: (checkpoint, key).
IDLE = {
    ("phi-3-4k", "original_max_position_embeddings"),
    *((name, "sliding_window") for name in ("qwen2", "qwen3", "smollm3", "qwen3-moe")),
    *((name, "use_sliding_window") for name in ("qwen2", "qwen3", "smollm3", "qwen3-moe")),
    ("qwen3-moe", "intermediate_size"),
    ("qwen3-moe", "mlp_only_layers"),
    ("exaone-4", "sliding_window_pattern"),
    ("granite-4", "intermediate_size"),
    *(("granite-4", key) for key in ("num_experts_per_tok", "time_step_limit")),
    *(
        ("granite-4", f"mamba_{key}")
        for key in (
            "chunk_size",
            "conv_bias",
            "d_conv",
            "d_head",
            "d_state",
            "expand",
            "n_groups",
            "n_heads",
            "proj_bias",
        )
    ),
    *((name, "max_window_layers") for name in ("qwen2", "qwen2-window", "qwen3")),
    ("smollm3", "no_rope_layer_interval"),
    *((name, "_sliding_window_pattern") for name in ("gemma-3", "gemma-3-images")),
    *((name, "vocab_size_per_layer_input") for name in ("gemma-4", "gemma-4-images")),
}


def _changed(value):
    """Other values of the same type."""
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [value * 2, value * 3 + 2]
        case str():
            return [value + "x"]
        case list():
            return [value[::-1], [_changed(x)[0] for x in value]]
        case dict():
            changed = []
            for key in value:
                for other in _changed(value[key]):
                    changed.append(copy.deepcopy(value) | {key: other})
            return changed
    return [7]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_key_of_config_json_is_ignored(name):
    hf = text_model_json(json.loads((golden.FOLDER / name / "config.json").read_text()))
    base = from_hf(hf)
    for key, value in hf.items():
        if key in HARMLESS - {"model_type"}:
            continue
        effects = []
        for other in _changed(value):
            try:
                effects.append(from_hf(hf | {key: other}) != base)
            except (UnsupportedModel, TypeError):
                effects.append(True)
        if isinstance(value, dict):
            assert all(effects), f"{name}: parts of {key} are ignored: {value}, {effects}"
        assert any(effects) == ((name, key) not in IDLE), f"{name}: {key}"


def _gemma_4(**changes):
    return json.loads((golden.FOLDER / "gemma-4" / "config.json").read_text()) | changes


def _without(hf, *keys):
    return {key: value for key, value in hf.items() if key not in keys}


def test_heads_of_gemma_4_may_be_said_in_either_form():
    """The published files say them once, and transformers 5.24 for each layer."""
    alone = _without(_gemma_4(), "per_layer_config")
    published = alone | {"global_head_dim": 16, "num_global_key_value_heads": 2}
    assert "per_layer_config" in _gemma_4() and from_hf(published) == from_hf(_gemma_4())
    config = from_hf(published)
    assert config.cycle == 3 and [c.head_dim for c in config.each_layer] == [8, 8, 16] * 2
    assert [c.kv_heads for c in config.each_layer] == [4, 4, 2] * 2
    # Without rope_parameters and layer_types there are defaults, and the last layer is a full one.
    short = _without(published, "rope_parameters", "layer_types") | {"num_hidden_layers": 8}
    assert [k.window for k in from_hf(short).kinds] == [40] * 5 + [None, 40, None]
    assert from_hf(short).cycle == 8
    pair = {"rope_theta": 1e4, "rope_type": "default"}
    alike = {"head_dim": 16, "attention_k_eq_v": False, "num_global_key_value_heads": None}
    ropes = {"full_attention": pair, "sliding_attention": pair}
    assert from_hf(published | alike | {"rope_parameters": ropes}).cycle == 1


_ROPE_4 = _gemma_4()["rope_parameters"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size_per_layer_input": 256}, "embeddings of its own in each layer .E2B, E4B"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2.* keys of earlier ones"),
        ({"enable_moe_block": True}, "mixture of experts beside the MLP .26B-A4B.*gemma-4-31B-it"),
        ({"use_double_wide_mlp": True}, "use_double_wide_mlp"),
        ({"num_experts": 8}, "num_experts"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["sliding_attention"] * 6}, "layer_types ends with"),
        ({"rope_theta": 1e5}, "rope_theta"),
        ({"rope_parameters": {"full_attention": _ROPE_4["full_attention"]}}, "and one for sliding"),
        ({"rope_parameters": _ROPE_4 | {"sliding_attention": {}}}, "each with its rope_theta"),
        (
            {"rope_parameters": _ROPE_4 | {"sliding_attention": {
                "rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}},
            "'linear' for sliding_attention",
        ),
        (
            {"rope_parameters": _ROPE_4 | {"full_attention": _ROPE_4["full_attention"] | {
                "partial_rotary_factor": 1.5}}},
            "partial_rotary_factor is 1.5; expected a number up to 1",
        ),
        ({"attention_k_eq_v": False}, "2 key-value heads, but attention_k_eq_v is not true"),
        ({"global_head_dim": 512}, "global_head_dim is 512"),
        ({"per_layer_config": {"2": {"head_dim": 16}}}, "per_layer_config is .* expected the same"),
        ({"per_layer_config": {"0": {"head_dim": 16}}}, "per_layer_config"),
        ({"per_layer_config": {"2": {"skip": ["mlp"]}, "5": {"skip": ["mlp"]}}}, "none for others"),
        (
            {"per_layer_config": {i: {"head_dim": 16, "num_key_value_heads": 3} for i in "25"}},
            "4 attention heads cannot share 3 key-value heads",
        ),
    ],
)  # fmt: skip
def test_what_a_dense_gemma_4_cannot_have_is_an_error_that_names_it(changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        from_hf(_gemma_4(**changes))


LLAMA = json.loads((golden.FOLDER / "llama-2" / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; this version supports llama, "),
        ({"model_type": "olmoe"}, "model_type is 'olmoe'; .* It is close to qwen3_moe, but "),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_parameters .* rope_scaling"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}, "longest sequence of its"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'factor'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "gamma": 1.0}}, "gamma"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        ({"rope_theta": 77.0}, "rope_theta"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_the_decoder_cannot_express_is_an_error_that_names_it(changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        from_hf(LLAMA | changes)


def test_what_is_close_is_not_supported_and_names_what_is():
    for name, said in families._CLOSE.items():
        assert name not in {*FAMILIES, *MULTIMODAL} and said.split(",")[0] in FAMILIES
        with pytest.raises(UnsupportedModel) as caught:
            from_hf({"model_type": name})
        assert str(caught.value).endswith(f"It is close to {said}")
        for family in (*FAMILIES, *MULTIMODAL):
            assert family in str(caught.value)


def test_a_missing_key_and_a_broken_file_are_named(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({k: v for k, v in LLAMA.items() if k != "intermediate_size"}))
    with pytest.raises(UnsupportedModel, match=f"{tmp_path}.*'intermediate_size' is missing"):
        read_config(tmp_path)
    file.write_text("{")
    with pytest.raises(UnsupportedModel, match=r"config\.json is not JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_defaults_are_those_of_transformers(name):
    """A key that config.json leaves out has the value that transformers gives it."""
    transformers = pytest.importorskip("transformers")
    sizes = {k: v for k, v in golden._SIZES.items() if not k.endswith("token_id")}
    if name == "gemma-4":  # by default, its layers have embeddings of their own
        sizes["hidden_size_per_layer_input"] = 0
    kind = getattr(transformers, golden.FAMILIES[name][0])
    if name in ("mistral-3-images", "gemma-4-images", "granite-4"):
        return  # its class has no defaults for a text_config that is there, or those of a hybrid
    if "text_config" in golden.FAMILIES[name][1]:
        theirs = json.loads(kind().to_json_string(use_diff=False))
        type_of_text = {"model_type": theirs["text_config"]["model_type"]}
        assert from_hf({"model_type": theirs["model_type"], "text_config": type_of_text}) == (
            from_hf(theirs)
        )
        return
    theirs = json.loads(kind(**sizes).to_json_string(use_diff=False))
    hf = sizes | {"model_type": theirs["model_type"], "rms_norm_eps": theirs["rms_norm_eps"]}
    if name.startswith("gemma"):
        del hf["num_attention_heads"], hf["num_key_value_heads"]
        hf |= {k: theirs[k] for k in ("num_attention_heads", "num_key_value_heads")}
    assert from_hf(hf) == from_hf(theirs)


def test_every_family_has_a_checkpoint():
    found = [json.loads((golden.FOLDER / n / "config.json").read_text()) for n in CHECKPOINTS]
    assert {hf["model_type"] for hf in found} == {*FAMILIES, *MULTIMODAL}


def test_longrope_chooses_its_table_once_for_a_run():
    config = read_config(golden.FOLDER / "phi-3-128k")
    for length, extended in ((512, False), (513, True)):
        scaling = config.for_length(length).kinds[0].rope.scaling
        assert isinstance(scaling, LongRope) and scaling.extended is extended
    with pytest.raises(UnsupportedModel, match="5000 tokens; the model was made for at most 4096"):
        config.for_length(5000)


# --- the published models -------------------------------------------------------------------------

PUBLISHED = {
    "mistral-7b-sft-beta": 7_241_732_096,
    "Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
}
SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
            "mlp.up_proj")  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size_and_tensors(name):
    folder = GOLDEN / "published" / name
    config = read_config(folder)
    assert parameter_count(config) == PUBLISHED[name]
    inside = ("self_attn.qkv_proj", "mlp.gate_up_proj") if name.startswith("Phi") else SEPARATE
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} | {
        f"model.layers.{i}.{kernel}.weight"
        for i in range(32)
        for kernel in (
            *inside, "self_attn.o_proj", "mlp.down_proj", "input_layernorm",
            "post_attention_layernorm",
        )
    }  # fmt: skip
    found = {
        row.name.format(i)
        for row in tensors(config).values()
        for i in (range(config.layers) if row.stacked else (0,))
    }
    assert found == expected


def test_published_facts():
    def facts(name):
        c = read_config(GOLDEN / "published" / name)
        assert not c.tied and c.embed == c.heads * c.head_dim and c.layers == c.heads == 32
        kind = c.kinds[0]
        assert c.kinds == (kind,) * 32 and kind.rope.scaling is None
        return c.embed, c.kv_heads, c.mlp, c.vocab_size, kind.rope.theta, kind.window, c.norm_eps

    assert facts("mistral-7b-sft-beta") == (4096, 8, 14336, 32000, 1e4, 4096, 1e-5)
    assert facts("Meta-Llama-3-8B-Instruct") == (4096, 8, 14336, 128256, 5e5, None, 1e-5)
    assert facts("Phi-3-mini-4k-instruct") == (3072, 32, 8192, 32064, 1e4, 2047, 1e-5)
