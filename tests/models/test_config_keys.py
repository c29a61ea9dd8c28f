"""The keys of `config.json`: which are read, which are refused, and what values they may have."""

from __future__ import annotations

import copy
import json
import time
from functools import cache
from pathlib import Path

import pytest

from selm_jax.models import config_deberta
from selm_jax.models.config import DecoderConfig, UnsupportedModel
from selm_jax.models.config_keys import LIMITS, is_off
from selm_jax.models.decoder import active_parameters, parameter_count
from selm_jax.models.families import FAMILIES, from_hf, read_config, text_model_json, to_hf
from selm_jax.models.multimodal import MULTIMODAL, text_part
from selm_jax.plan.command import read_facts
from selm_jax.weights.deberta import read_config as read_pairrm
from selm_jax.weights.names import stored_tensors, tensors, whole_shape

GOLDEN = Path(__file__).parents[1] / "golden"
# Parameters, as the checkpoints' pages on the Hub count them.
PUBLISHED = {
    "HuggingFaceH4--zephyr-7b-beta": 7_241_732_096,
    "HuggingFaceTB--SmolLM2-1.7B-Instruct": 1_711_376_384,
    "HuggingFaceTB--SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB--SmolLM3-3B": 3_075_098_624,
    "LGAI-EXAONE--EXAONE-4.0-1.2B": 1_279_391_488,
    "Qwen--Qwen2-0.5B-Instruct": 494_032_768,
    "Qwen--Qwen2.5-0.5B": 494_032_768,
    "Qwen--Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen--Qwen3-0.6B": 596_049_920,
    "Qwen--Qwen3-30B-A3B": 30_532_122_624,
    "TinyLlama--TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "allenai--OLMo-2-1124-7B-Instruct": 7_298_617_344,
    "allenai--Olmo-3-7B-Instruct": 7_298_011_136,
    "deepseek-ai--DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "google--gemma-2-27b-it": 27_227_128_320,
    "google--gemma-2-2b-it": 2_614_341_888,
    "google--gemma-2-9b-it": 9_241_705_984,
    "google--gemma-3-1b-it": 999_885_952,
    "google--gemma-3-270m": 268_098_176,
    "google--gemma-3-4b-it": 4_300_079_472 - 419_816_304,  # all, without those for images
    "google--gemma-4-31B-it": 30_697_345_340,  # the text model; its page says 30.7 billion
    "google--gemma-7b": 8_537_680_896,
    "ibm-granite--granite-3.3-8b-instruct": 8_170_864_640,
    "ibm-granite--granite-4.0-micro": 3_402_836_480,
    "meta-llama--Llama-2-13b-hf": 13_015_864_320,
    "meta-llama--Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama--Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama--Llama-3.2-1B-Instruct": 1_235_814_400,
    "microsoft--Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft--Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft--Phi-4-mini-instruct": 3_836_021_760,
    "mistralai--Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai--Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai--Mistral-7B-v0.1": 7_241_732_096,
    "mistralai--Ministral-3-8B-Base-2512": 8_489_553_920,  # the text model
    "mistralai--Mistral-Small-3.1-24B-Instruct-2503": 23_572_403_200,  # the text model
    "mistralai--Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "openai--gpt-oss-20b": 20_914_757_184,
    "zai-org--GLM-4-9B-0414": 9_400_279_040,
}


@cache
def published(name: str) -> str:
    return (GOLDEN / "configs" / f"{name}.json").read_text()


def hf(name: str) -> dict:
    return json.loads(published(name))


# --- published checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_read(name):
    config = from_hf(hf(name))
    assert parameter_count(config) == PUBLISHED[name]
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("name", "active", "expert", "router"),
    [
        ("Qwen--Qwen3-30B-A3B", 3.3e9, "mlp.experts.127.gate_proj", "mlp.gate"),
        (
            "mistralai--Mixtral-8x7B-Instruct-v0.1",
            12.9e9,
            "block_sparse_moe.experts.7.w1",
            "block_sparse_moe.gate",
        ),
    ],
)
def test_mixtures_have_their_published_active_parameters_and_tensors(name, active, expert, router):
    config = from_hf(hf(name))
    assert active_parameters(config) == pytest.approx(active, rel=0.02)
    rows = tensors(config).values()
    names = {n: row for row in rows for n in row.names(config.layers - 1) if row.stacked}
    layer = f"model.layers.{config.layers - 1}."
    assert names[f"{layer}{expert}.weight"].stored_shape == (config.mlp, config.embed)
    experts = config.mixture.experts
    assert names[f"{layer}{router}.weight"].stored_shape == (experts, config.embed)
    stem = expert.split(".")[0]
    assert sum(n.startswith(f"{layer}{stem}.experts.") for n in names) == 3 * experts


def test_gpt_oss_has_its_published_active_parameters_and_tensors():
    config = from_hf(hf("openai--gpt-oss-20b"))
    # As its model card counts them: without the embedding.
    active = active_parameters(config) - config.vocab_size * config.embed
    assert active == pytest.approx(3.61e9, rel=2e-3)
    last = "model.layers.23."
    found = {
        name.removeprefix(last): whole_shape(parts)
        for names, layer, parts in stored_tensors(config)
        for name in names
        if layer == 23 and "_layernorm" not in name and "_proj.weight" not in name
    }
    assert {k: v for k, v in found.items() if "_proj.bias" not in k} == {
        "mlp.router.weight": (32, 2880),
        "mlp.router.bias": (32,),
        "mlp.experts.gate_up_proj": (32, 2880, 5760),
        "mlp.experts.gate_up_proj_bias": (32, 5760),
        "mlp.experts.down_proj": (32, 2880, 2880),
        "mlp.experts.down_proj_bias": (32, 2880),
        "self_attn.sinks": (64,),
    }


def test_no_file_is_left_out_and_every_family_is_there():
    assert {f.stem for f in (GOLDEN / "configs").glob("*.json")} == set(PUBLISHED)
    found = [each["model_type"] for name in PUBLISHED for each in (hf(name), text_part(hf(name)))]
    assert set(found) == {*FAMILIES, *MULTIMODAL}


def test_what_transformers_reads_of_them_is_the_same():
    """A config.json that transformers reads and writes again describes the same model."""
    transformers = pytest.importorskip("transformers")
    for name in PUBLISHED:
        # Without this key a multi-modal class has its own default, and the tensors say otherwise.
        tied = {"tie_word_embeddings": from_hf(hf(name)).tied} if "text_config" in hf(name) else {}
        theirs = transformers.AutoConfig.for_model(**hf(name) | tied)
        written = json.loads(theirs.to_json_string(use_diff=False))
        assert from_hf(written) == from_hf(hf(name)), name


@pytest.mark.parametrize("name", ["Qwen--Qwen2.5-0.5B", "google--gemma-3-1b-it"])
@pytest.mark.parametrize("off", [False, None, 0, 0.0, "", [], {}], ids=repr)
def test_a_key_that_is_off_passes_and_one_that_is_on_does_not(name, off):
    base = from_hf(hf(name))
    assert from_hf(hf(name) | {"use_a_new_trick": off}) == base
    for on in (True, 1, 0.5, "linear", [0], {"a": 1}):
        assert not is_off(on)
        with pytest.raises(UnsupportedModel, match=r"use_a_new_trick \(.*not known to be harmless"):
            from_hf(hf(name) | {"use_a_new_trick": on})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("google--gemma-2-9b-it", {"sliding_window_size": 2048}, "sliding_window_size is 2048"),
        ("Qwen--Qwen2.5-0.5B", {"use_mrope": True}, r"use_mrope \(True\)"),
        ("Qwen--Qwen3-30B-A3B", {"mlp_only_layers": [3]}, "needs experts in every layer"),
        ("Qwen--Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "needs experts in every layer"),
        ("Qwen--Qwen3-30B-A3B", {"num_local_experts": 64}, "are different numbers"),
        ("Qwen--Qwen2.5-0.5B", {"is_causal": False}, "is_causal is False"),
        ("Qwen--Qwen2.5-0.5B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("meta-llama--Llama-2-7b-chat-hf", {"rope_interleaved": True}, "rope_interleaved"),
        ("google--gemma-3-270m", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("allenai--Olmo-3-7B-Instruct", {"rope_theta": 1e4}, "disagree on whether the layers"),
        (
            "allenai--Olmo-3-7B-Instruct",
            {"rope_theta": 1e6, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "disagree on whether the layers",
        ),
        (
            "allenai--Olmo-3-7B-Instruct",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate false, which transformers ignores",
        ),
        (
            "allenai--Olmo-3-7B-Instruct",
            {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters has 'factor, rope_type'; expected one object",
        ),
        (
            "microsoft--Phi-3.5-mini-instruct",
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope type is yarn; a phi3 model has default or longrope",
        ),
        (
            "microsoft--Phi-3.5-mini-instruct",
            {
                "original_max_position_embeddings": None,
                "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 2048},
            },
            "embeddings is 4096 by default, but rope scaling says 2048. Write it at the top level",
        ),
        ("microsoft--Phi-4-mini-instruct", {"partial_rotary_factor": 1.5}, "a number up to 1"),
        ("microsoft--Phi-4-mini-instruct", {"partial_rotary_factor": 0.5}, "short_factor has 48 "),
        ("microsoft--Phi-4-mini-instruct", {"full_attn_mod": 2}, "full_attn_mod is 2"),
        ("LGAI-EXAONE--EXAONE-4.0-1.2B", {"sliding_window": 64}, "no layer would have rope"),
        ("google--gemma-7b", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        (
            "ibm-granite--granite-4.0-micro",
            {"layer_types": ["attention"] * 4 + ["mamba"] * 36},
            r"has 36 of 40 layers that are not attention \(mamba\)",
        ),
        ("ibm-granite--granite-4.0-micro", {"num_local_experts": 64}, "no experts beside an MLP"),
        ("ibm-granite--granite-4.0-micro", {"normalization_function": "layernorm"}, "'rmsnorm'"),
        ("openai--gpt-oss-20b", {"experts_per_token": 2}, "experts_per_token is 2"),
        ("openai--gpt-oss-20b", {"initial_context_length": 8192}, "initial_context_length is 8192"),
        ("openai--gpt-oss-20b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("zai-org--GLM-4-9B-0414", {"partial_rotary_factor": 1.5}, "a number up to 1"),
        ("google--gemma-3-4b-it", {"sound_config": {"a": 1}}, "sound_config .*harmless"),
        ("google--gemma-3-4b-it", {"text_config": {"model_type": "llama"}}, "type 'llama'"),
        ("google--gemma-3-4b-it", {"text_config": {"use_mrope": True}}, "use_mrope"),
        (
            "google--gemma-3-4b-it",
            {"text_config": {"final_logit_softcapping": 30.0}},
            "final_logit_softcapping 30.0, which transformers ignores there",
        ),
        (
            "google--gemma-3-4b-it",
            {"architectures": ["Gemma3ForSequenceClassification"]},
            "A reward model has to be one of text alone",
        ),
    ],
)
def test_what_changes_the_function_is_refused_whatever_it_is_called(name, changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        from_hf(hf(name) | changes)


def test_phi3_has_its_original_context_from_the_top_level_or_by_default():
    """As in transformers, which puts that number over the one inside the rope's parameters."""
    config = hf("microsoft--Phi-3.5-mini-instruct")
    assert from_hf(config | {"original_max_position_embeddings": None}) == from_hf(config)


def test_the_outer_key_decides_whether_a_text_model_is_tied():
    """As in transformers 5, where it is the key of the class that has the unembedding."""
    outer = hf("google--gemma-3-4b-it")
    assert from_hf(outer).tied
    text = outer["text_config"] | {"tie_word_embeddings": False}
    assert not from_hf(outer | {"text_config": text}).tied
    assert from_hf(outer | {"text_config": text, "tie_word_embeddings": True}).tied


def test_the_text_model_alone_has_all_keys_and_is_the_same():
    alone = text_model_json(hf("google--gemma-3-4b-it"))
    assert alone["architectures"] == ["Gemma3ForCausalLM"] and alone["eos_token_id"] == [1, 106]
    assert from_hf(alone) == from_hf(hf("google--gemma-3-4b-it"))


def test_how_queries_grow_must_be_said():
    text = hf("mistralai--Ministral-3-8B-Base-2512")["text_config"]
    rope = dict(text["rope_parameters"])
    del rope["llama_4_scaling_beta"]
    with pytest.raises(UnsupportedModel, match="has no llama_4_scaling_beta"):
        from_hf(text | {"rope_parameters": rope})


# --- odd values -----------------------------------------------------------------------------------

ODD = [
    "two", "", "1e-5", True, False, None, 0, -1, 10**9, 10**30, 2.5, 1e308, float("nan"),
    float("inf"), [], [1], ["two"], [None], [[]], {}, {"a": 1}, {"rope_type": ["a"]},
    {"rope_type": "linear", "factor": "two"}, {"rope_type": "llama3", "factor": 0},
    {"rope_type": "longrope", "short_factor": 1, "long_factor": 2},
    {"rope_type": "longrope", "short_factor": ["a"], "long_factor": [None]},
    {"rope_type": "yarn", "factor": None}, {"rope_type": "yarn", "factor": 2.0, "truncate": 7},
    {"full_attention": 1}, {"full_attention": {"rope_theta": []}},
]  # fmt: skip
BASES = ("Qwen--Qwen3-0.6B", "microsoft--Phi-3.5-mini-instruct", "HuggingFaceTB--SmolLM3-3B",
         "google--gemma-2-9b-it", "google--gemma-3-270m", "mistralai--Mistral-7B-v0.1",
         "meta-llama--Llama-3.1-8B-Instruct", "Qwen--Qwen2.5-0.5B", "allenai--Olmo-3-7B-Instruct",
         "ibm-granite--granite-3.3-8b-instruct", "microsoft--Phi-4-mini-instruct",
         "google--gemma-3-4b-it", "google--gemma-4-31B-it", "mistralai--Ministral-3-8B-Base-2512",
         "ibm-granite--granite-4.0-micro", "zai-org--GLM-4-9B-0414")  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_any_key_with_any_odd_value_is_read_or_refused_at_once(name):
    keys = ("tie_word_embeddings", "num_labels", "id2label", "rope_parameters")
    base = dict.fromkeys(keys) | hf(name)
    refused, began = set(), time.perf_counter()
    for key in base:
        for odd in ODD:
            try:
                found = from_hf(copy.deepcopy(base) | {key: odd})
            except UnsupportedModel as e:
                refused.add(key)
                assert len(str(e)) < 1000
            else:
                assert isinstance(found, DecoderConfig)
                assert found.layers <= LIMITS["num_hidden_layers"]
                hash(found)
    if "text_config" in base:
        assert refused >= {"text_config", "model_type", "architectures", "tie_word_embeddings"}
        return
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
             "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
             "model_type", "architectures"}  # fmt: skip
    assert refused >= sizes & set(base)
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; .* from 1 to 10,000"),
        ({"num_hidden_layers": "36"}, "num_hidden_layers is '36'; expected a whole number"),
        ({"num_hidden_layers": 36.5}, "num_hidden_layers is 36.5; expected a whole number"),
        ({"hidden_size": None}, "hidden_size is None; expected a whole number"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; .* from 1 to 100,000,000"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; expected a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is .*; expected a list of 36 zeros and ones"),
        ({"layer_types": 7}, "layer_types is 7; expected a list of strings"),
        ({"architectures": "SmolLM3ForCausalLM"}, "architectures is .*expected a list of strings"),
    ],
)
def test_an_odd_value_is_told_with_its_key_and_what_was_expected(changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        from_hf(hf("HuggingFaceTB--SmolLM3-3B") | changes)


@pytest.mark.parametrize("key", sorted(config_deberta._USED | {"n_tasks", "cand1_prefix_id"}))
def test_pairrms_keys_with_odd_values_are_read_or_refused_at_once(key, tmp_path):
    base = {
        "model_type": "deberta-v2", "hidden_act": "gelu", "relative_attention": True,
        "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 0, "pos_att_type": "p2c|c2p", "vocab_size": 97, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "layer_norm_eps": 1e-7, "position_buckets": 8, "max_position_embeddings": 64,
        "max_relative_positions": -1, "n_tasks": 1, "source_prefix_id": 5, "cand1_prefix_id": 6,
        "cand2_prefix_id": 7,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(base))
    read_pairrm(tmp_path)
    refused = 0
    for odd in ODD:
        file.write_text(json.dumps(base | {key: odd}))
        try:
            read_pairrm(tmp_path)
        except UnsupportedModel as e:
            refused += str(file) in str(e)
    assert refused > 15


# --- files that hold no object --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[1, 2]", "config.json contains a list; expected an object"),
        (b'"llama"', "config.json contains a text; expected an object"),
        (b"null", "config.json contains null; expected an object"),
        (b"", "config.json is not JSON"),
        (b"{", "config.json is not JSON"),
        (b"\xef\xbb\xbf{}", "config.json begins with a byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "config.json begins with a byte order mark"),
        (b'{"a": "\xff"}', "config.json is not UTF-8 text"),
        (b"[" * 100_000, "config.json is not JSON: .*nested too deeply"),
        (b'{"a": 1, "a": 2}', "config.json is not JSON: the key 'a' appears twice"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 700\n",
            "config.json is a Git LFS pointer; .*git lfs pull",
        ),
    ],
)
def test_a_file_that_is_no_object_is_told_for_what_it_is(raw, message, tmp_path):
    (tmp_path / "config.json").write_bytes(raw)
    for read in (
        lambda: read_config(tmp_path),
        lambda: read_facts(tmp_path / "config.json"),
        lambda: read_pairrm(tmp_path),
    ):
        with pytest.raises(UnsupportedModel, match=message) as caught:
            read()
        assert str(tmp_path) in str(caught.value)
