"""GGUF files of every family: what llama.cpp's converter writes of a model comes back as it was.

The checkpoints are those of tests/golden, whose logits transformers computed. Equal facts and equal
tensors are equal logits.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf_of import write_of
from safetensors.numpy import load_file, save_file

from selm_jax.models.families import from_hf, read_config
from selm_jax.models.multimodal import text_part
from selm_jax.weights.gguf import GGUFError, convert
from selm_jax.weights.gguf_families import FAMILIES
from selm_jax.weights.huggingface import load
from selm_jax.weights.multimodal import open_text

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e10, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
NO_WINDOW = {"layer_types": ["full_attention"] * 4, "sliding_window": None}
HEAD_SIZE = {"query_pre_attn_scalar": 8}  # what llama.cpp assumes
GEMMA4 = {
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e5,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
GRANITE4 = {"num_experts_per_tok": 0, "intermediate_size": 24}  # the published ones agree, too
LIMIT = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # in llama.cpp's code
CASES = [
    ("llama-2", {}),
    ("llama-3.1", {"rope_parameters": LLAMA3}),
    ("llama-yarn", {}),
    ("ministral-3", {}),
    ("mixtral", {}),
    ("phi-3-4k", {}),
    ("phi-3-128k", {}),
    ("phi-4-mini", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3-moe", {"norm_topk_prob": True}),
    ("gpt-oss", LIMIT),
    ("smollm3", {}),
    ("olmo-2", {"attention_bias": False}),
    ("olmo-3", {}),
    ("exaone-4", {}),
    ("exaone-4", NO_WINDOW),
    ("granite-3", {}),
    ("glm-4", {}),
    ("glm-4", {"attention_bias": False}),
    ("gemma-1", {}),
    ("gemma-2", HEAD_SIZE),
    ("gemma-3", HEAD_SIZE),
    ("gemma-4", GEMMA4),
]


@pytest.mark.parametrize(("name", "change"), CASES)
def test_a_model_comes_back_as_it_was(tmp_path, name, change):
    file, config = write_of(GOLDEN / name, tmp_path / "m.gguf", change)
    out = convert(file, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == config["model_type"]
    assert read_config(out) == from_hf(config)
    found, expected = (load_file(f / "model.safetensors") for f in (out, GOLDEN / name))
    for tensor, value in found.items():
        # A file of Gemma has the scales of norms plus one, rounded.
        atol = 2e-7 if "gemma" in name and "norm" in tensor else 0
        np.testing.assert_allclose(value, expected.pop(tensor), atol=atol, rtol=0, err_msg=tensor)
    assert not [tensor for tensor in expected if not tensor.endswith(".bias")]


def test_the_text_model_of_gemma_4_with_values_of_its_own_comes_back(tmp_path):
    """llama.cpp's converter also takes this text model from a model that reads images."""
    golden, folder = GOLDEN / "gemma-4-images", tmp_path / "text"
    text, config = open_text(golden), text_part(json.loads((golden / "config.json").read_text()))
    expected = {name: text.read(name) for name in text.tensors}
    folder.mkdir()
    save_file(expected, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    file, config = write_of(folder, tmp_path / "m.gguf", GEMMA4)
    out = convert(file, tmp_path / "out")
    assert read_config(out) == from_hf(config)
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_dense_granite_4_comes_back_as_the_granite_3_that_it_equals(tmp_path):
    """Its file differs in keys only, and does not say that two matrices were one tensor."""
    file, config = write_of(GOLDEN / "granite-4", tmp_path / "m.gguf", GRANITE4)
    out = convert(file, tmp_path / "out")
    facts = from_hf(config)
    assert read_config(out) == dataclasses.replace(facts, architecture="GraniteForCausalLM")
    ours, expected = load(out, read_config(out)), load(GOLDEN / "granite-4", facts)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize(
    ("own", "rope"),
    [
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # linear is llama.cpp's default
        ({"factor": 1.0}, None),
        ({"factor": 0.0}, None),  # there it means 1
        ({"factor": 4.0, "type": "none"}, None),
    ],
)
def test_a_factor_without_a_type_stretches_positions(tmp_path, own, rope):
    keys = {f"llama.rope.scaling.{key}": value for key, value in own.items()}
    file, config = write_of(GOLDEN / "llama-2", tmp_path / "m.gguf", keys=keys)
    parameters = config["rope_parameters"] | (rope or {})
    expected = from_hf(config | {"rope_parameters": parameters})
    assert read_config(convert(file, tmp_path / "out")) == expected


@pytest.mark.parametrize("value", [0.0, None])
def test_what_ministral_3_does_not_scale_is_0_or_absent(tmp_path, value):
    arch, off = "mistral3", {"llama_4_scaling_beta": 0.0, "mscale_all_dim": 0.0}
    names = ("attention.temperature_scale", "rope.scaling.yarn_log_multiplier")
    keys = {f"{arch}.{name}": value for name in names}
    file, config = write_of(GOLDEN / "ministral-3", tmp_path / "m.gguf", keys=keys)
    expected = from_hf(config | {"rope_parameters": config["rope_parameters"] | off})
    assert expected != from_hf(config)
    assert read_config(convert(file, tmp_path / "out")) == expected


@pytest.mark.parametrize("divisors", [[1.0, 2.0], [1e30, 1.0], [1e30, 1e30]])
def test_other_divisors_of_gemma_4_are_refused(tmp_path, monkeypatch, divisors):
    monkeypatch.setattr("gguf_of._factors_of", lambda _: {
        "rope_freqs.weight": np.float32([*divisors, *[1e30] * 6])
    })  # fmt: skip
    file, _ = write_of(GOLDEN / "gemma-4", tmp_path / "m.gguf", GEMMA4)
    with pytest.raises(GGUFError, match="has other numbers than 1 for the pairs"):
        convert(file, tmp_path / "out")


def test_every_family_is_tested():
    tested = {
        json.loads((GOLDEN / name / "config.json").read_text())["model_type"] for name, _ in CASES
    }
    assert tested == FAMILIES.keys()


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("granite-3", {"granite.rope.scaling.finetuned": False}, "has no rotary embedding"),
        ("granite-3", {"granite.expert_count": 8}, "granite.expert_count is 8, so .* has experts"),
        ("granite-3", {"granite.attention.head_count_kv": [2, 2, 2, 1]}, "expected the type int"),
        ("granite-3", {"granite.attention.head_count_kv": [2, 2, 2]}, "expected the type int"),
        (
            "exaone-4",
            {"exaone4.attention.sliding_window_pattern": [True]},
            "has 1 entries.*4 layer",
        ),
        ("qwen3-moe", {"qwen3moe.expert_shared_count": 1}, "expert_shared_count is not supported"),
        ("qwen3-moe", {"qwen3moe.expert_count": 7}, r"ffn_gate_inp.weight has shape \(8, 16\).*7"),
        ("phi-3-128k", {"phi3.rope.scaling.type": "yarn"}, "attn_factor is 1.15.*only 1"),
        ("llama-yarn", {"llama.rope.scaling.attn_factor": 2.0}, "attn_factor is 2; only 1"),
        ("llama-2", {"llama.rope.scaling.type": "longrope"}, "scaling.type is 'longrope'"),
        ("phi-3-4k", {"phi3.attention.sliding_window": None}, "sliding_window is missing"),
        ("gpt-oss", {"gpt-oss.expert_feed_forward_length": 64}, r"\(8, 32, 16\).*\(8, 64, 16\)"),
        ("gemma-2", {"gemma2.rope.freq_base_swa": 1e4}, "freq_base_swa is not supported"),
        (
            "phi-3-4k",
            {"phi3.attention.sliding_window_pattern": [True]},
            "sliding_window_pattern is not supported",
        ),
        (
            "phi-3-128k",
            {"phi3.rope.scaling.factor": 4.0},
            r"factor is 4, but .* \['rope_factors_short.weight', 'rope_factors_long.weight'\]",
        ),
        (
            "phi-3-128k",
            {"phi3.rope.scaling.type": "longrope", "phi3.rope.scaling.factor": 4.0},
            "scaling.factor is 4",
        ),
        ("ministral-3", {"mistral3.attention.temperature_scale": -0.1}, "a positive number or 0"),
        ("gemma-4", {"gemma4.attention.shared_kv_layers": 2}, "is 2: .* layers that use the keys"),
        ("gemma-4", {"gemma4.embedding_length_per_layer_input": 256}, "is 256: .* embeddings of"),
        ("gemma-4", {"gemma4.expert_count": 8}, "gemma4.expert_count is not supported"),
        ("gemma-4", {"gemma4.attention.sliding_window_pattern": [True] * 6}, "expected one number"),
        (
            "gemma-4",
            {
                "gemma4.attention.sliding_window_pattern": [False, True] * 3,
                "gemma4.attention.head_count_kv": 4,
            },
            "no gemma4",
        ),
        ("gemma-4", {"gemma4.attention.head_count_kv": [4, 4, 2, 4, 4]}, "expected one number"),
        ("gemma-4", {"gemma4.attention.head_count": 3}, "3 heads, . key/value heads"),
        ("gemma-4", {"gemma4.attention.value_length_swa": 4}, "is 4, but keys have the size 8"),
        ("gemma-4", {"gemma4.rope.scaling.type": "linear"}, "type is 'linear' and the tensors"),
    ],
)
def test_what_would_give_another_model_is_refused(tmp_path, name, own, message):
    file, _ = write_of(GOLDEN / name, tmp_path / "m.gguf", keys=own)
    with pytest.raises(GGUFError, match=message):
        convert(file, tmp_path / "out")
