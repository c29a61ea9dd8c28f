"""A reward model's config.json and tensors, there and back, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from selm_jax.models.config import ScalarHead, UnsupportedModel
from selm_jax.models.families import FAMILIES, from_hf, read_config, reward_model_json, to_hf
from selm_jax.weights.huggingface import WeightsError, check, load, save

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
CHECKPOINTS = sorted(f.parent.name for f in GOLDEN.glob("*/config.json"))
WITHOUT = ("granite", "gemma-4")  # transformers has no class for these


def json_of(name: str) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text())


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if not name.startswith(WITHOUT)])
def test_the_head_comes_and_goes_and_changes_nothing_else(name):
    plain = from_hf(json_of(name))
    assert plain.head is None
    made = reward_model_json(json_of(name), pad=5)
    config = from_hf(made)
    assert config.head == ScalarHead(0)  # these have a pad_token_id, which counts
    assert from_hf(to_hf(config)) == config
    assert config == type(config)(**{**vars(plain), "head": ScalarHead(0)})


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_the_class(family):
    pytest.importorskip("torch", reason="transformers shows its table of classes beside torch only")
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if FAMILIES[family].has_classifier:
        assert known[family] == FAMILIES[family].reward_model
    else:
        assert family not in known


@pytest.mark.parametrize(("name", "stem"), [("granite-3", "Granite"), ("gemma-4", "Gemma4")])
def test_a_family_without_the_class_has_no_reward_models(name, stem):
    with pytest.raises(UnsupportedModel, match=f"no class of reward models for {stem}ForCausalLM"):
        reward_model_json(json_of(name), None)
    named = {"architectures": [f"{stem}ForSequenceClassification"], "num_labels": 1}
    with pytest.raises(UnsupportedModel, match=f"no class of reward models for {stem}ForCausalLM"):
        from_hf(json_of(name) | named)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_by_default_that_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoConfig.for_model(family).pad_token_id == FAMILIES[family].pad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, "has 2 labels according to id2label; expected one"),
        ({"id2label": None, "num_labels": 3}, "has 3 labels according to num_labels"),
        ({"id2label": None}, r"has 2 labels according to num_labels \(transformers' default"),
    ],
)
def test_other_numbers_of_labels_are_refused(changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        from_hf(reward_model_json(json_of("llama-2"), None) | changes)


def test_padding_is_that_of_the_model_or_else_of_the_tokenizer():
    hf = json_of("llama-2")
    del hf["pad_token_id"]
    assert reward_model_json(hf, 9)["pad_token_id"] == 9
    assert from_hf(reward_model_json(hf, None)).head == ScalarHead(None)
    phi = json_of("phi-3-4k")
    del phi["pad_token_id"]  # transformers then takes Phi-3's default
    assert reward_model_json(phi, 9)["pad_token_id"] == 32000


@pytest.fixture
def folder(tmp_path):
    """A language model beside the reward model that starts from it."""
    hf = reward_model_json(json_of("qwen2"), None)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return tmp_path


def test_a_fresh_head_is_zero_and_the_rest_is_the_language_models(folder):
    config = read_config(folder)
    params = load(GOLDEN / "qwen2", config, fresh_head=True)
    assert params["score"].shape == (1, 16) and not np.any(params["score"])
    save(params, config, folder)
    written, source = (load_file(f / "model.safetensors") for f in (folder, GOLDEN / "qwen2"))
    assert written.keys() == source.keys() - {"lm_head.weight"} | {"score.weight"}
    for name in written.keys() & source.keys():
        np.testing.assert_array_equal(written[name], source[name])
    again = load(folder, config)
    np.testing.assert_array_equal(again["score"], 0)


def test_missing_heads_are_named_before_anything_is_loaded(folder):
    config = read_config(folder)
    save(load(GOLDEN / "qwen2", config, fresh_head=True), config, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for reads in (check, load):
        with pytest.raises(WeightsError, match=r"missing: score\.weight"):
            reads(folder, config)
