"""Adapters as a PEFT folder: `peft` loads it onto the base and gives our logits."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors import safe_open

from selm_jax.models.decoder import Decoder, abstract_adapters
from selm_jax.models.families import read_config
from selm_jax.models.lora import Lora, init, merge
from selm_jax.weights.huggingface import load, to_hf_tensors
from selm_jax.weights.multimodal import is_in
from selm_jax.weights.peft import export_adapter

FAMILIES = Path(__file__).parents[1] / "golden" / "families"


@pytest.mark.parametrize(
    "lora",
    [
        Lora(3, 6.0),
        Lora(2, 3.0, targets="q_proj|up_proj|o_proj", rslora=True),
        Lora(2, 3.0, targets="k_proj|gate_proj"),
    ],
    ids=["all", "some, rslora", "some"],
)
@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1", "phi-3-4k", "phi-4-mini", "olmo-3", "gemma-4", "gemma-3-images",
        "gemma-4-images",
    ],
)  # fmt: skip
def test_peft_gives_our_logits(name, lora, all_logits, tmp_path):
    theirs, _ = compare(name, lora, all_logits, tmp_path)
    every_tensor_is_used(theirs, tmp_path)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(3, 6.0, experts=True),
        Lora(2, 3.0, targets="up_proj|down_proj|o_proj", rslora=True, experts=True),
        Lora(2, 3.0, targets="gate_proj", experts=True),
    ],
    ids=["all", "some, rslora", "gates"],
)
def test_peft_merges_the_experts_of_gpt_oss_into_our_export(lora, all_logits, tmp_path):
    theirs, ours = compare("gpt-oss", lora, all_logits, tmp_path)
    every_tensor_is_used(theirs, tmp_path)
    merged = theirs.merge_and_unload().state_dict()
    assert merged.keys() == ours.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, merged[name].numpy(), atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_peft_joins_the_adapters_of_experts_to_our_logits(name, rslora, all_logits, tmp_path):
    compare(name, Lora(2, 3.0, rslora=rslora, experts=True), all_logits, tmp_path)


def every_tensor_is_used(theirs, tmp_path):
    """Checks the names of a folder's tensors: peft is silent about those that it does not know."""
    import peft

    names = set(peft.get_peft_model_state_dict(theirs))
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "numpy") as file:
        assert set(file.keys()) == names


def compare(name, lora, all_logits, tmp_path):
    """Compares logits with random adapters; returns peft's model and our merged tensors."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = read_config(FAMILIES / name)
    params = load(FAMILIES / name, config)
    adapters = init(nn.unbox(abstract_adapters(config, lora)), jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype("float32"), adapters)
    inside = is_in(FAMILIES / name)
    assert inside == name.endswith("-images")
    base = str(FAMILIES / name)
    export_adapter(adapters, config, lora, base, tmp_path / "adapter", inside=inside)

    base = transformers.AutoModelForCausalLM.from_pretrained(
        FAMILIES / name, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = rng.integers(0, 96, (2, 60)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    run = jax.jit(partial(all_logits, Decoder(config)))
    merged = merge(params, adapters, lora)
    ours = run(merged, tokens)
    assert np.abs(ours - run(params, tokens)).max() > 0.1
    np.testing.assert_allclose(ours, expected, atol=2e-4)

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(FAMILIES / name)
    return theirs, dict(to_hf_tensors(merged, config))


def test_an_adapters_files_are_as_open_as_any_other_and_name_what_they_belong_to(tmp_path):
    """Without torch: safetensors reads the files. The user's umask decides a new file's mode."""
    folder, lora = FAMILIES / "llama-3.1", Lora(2, 4.0)
    config = read_config(folder)
    adapters = init(nn.unbox(abstract_adapters(config, lora)), jax.random.key(0))
    before = os.umask(0o002)
    try:
        export_adapter(adapters, config, lora, "org/name", tmp_path / "adapter", "a" * 40)
    finally:
        os.umask(before)
    modes = {f.name: oct(f.stat().st_mode & 0o777) for f in (tmp_path / "adapter").iterdir()}
    assert modes == dict.fromkeys(("adapter_model.safetensors", "adapter_config.json"), "0o664")
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o775
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/name" and settings["revision"] == "a" * 40
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(file.keys()) == 2 * 7 * config.layers
        a = file.get_tensor("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight")
    ours = np.asarray(adapters["layers"]["attention"]["q_a"])[1]
    np.testing.assert_array_equal(a, ours.reshape(-1, 2).T)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3-moe", marks=pytest.mark.slow)])
def test_the_adapters_of_an_expert_are_what_is_merged_into_its_tensors(name, tmp_path):
    folder, lora = FAMILIES / name, Lora(2, 4.0, targets="up_proj|down_proj", experts=True)
    config = read_config(folder)
    adapters = init(nn.unbox(abstract_adapters(config, lora)), jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    export_adapter(adapters, config, lora, "org/name", tmp_path / "adapter")
    params = load(folder, config)
    base = dict(to_hf_tensors(params, config))
    merged = dict(to_hf_tensors(merge(params, adapters, lora), config))
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "numpy") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    modules = {key.split(".lora_")[0] for key in stored}
    assert len(modules) == 2 * config.layers * config.mixture.experts
    changed = {f"base_model.model.{k}" for k in base if (merged[k] != base[k]).any()}
    assert changed == {f"{module}.weight" for module in modules}
    for module in modules:
        product = stored[f"{module}.lora_B.weight"] @ stored[f"{module}.lora_A.weight"]
        tensor = f"{module.removeprefix('base_model.model.')}.weight"
        np.testing.assert_allclose(merged[tensor], base[tensor] + 2 * product, atol=1e-5)


def test_peft_finds_the_adapters_of_gpt_oss_experts_under_its_names_for_parameters(tmp_path):
    """Without torch: PEFT's sum over experts e, ranks r and inputs i, in its own letters."""
    folder, lora = FAMILIES / "gpt-oss", Lora(2, 4.0, experts=True)
    config = read_config(folder)
    adapters = init(nn.unbox(abstract_adapters(config, lora)), jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype("float32"), adapters)
    export_adapter(adapters, config, lora, "org/name", tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert settings["target_parameters"] == names
    assert settings["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert settings["rank_pattern"] == {"gate_up_proj": 4}
    assert settings["alpha_pattern"] == {"gate_up_proj": 8.0}
    params = load(folder, config)
    base, merged = (dict(to_hf_tensors(x, config)) for x in (params, merge(params, adapters, lora)))
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "numpy") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    for name, wrapper in zip(names, ("experts", "experts.base_layer"), strict=True):
        where = f"base_model.model.model.layers.3.mlp.{wrapper}.lora"
        a, b = stored[f"{where}_A.weight"], stored[f"{where}_B.weight"]
        a, b = a.reshape(8, -1, a.shape[-1]), b.reshape(len(b), -1, 8)
        tensor = f"model.layers.3.{name}"
        expected = base[tensor] + 2 * np.einsum("ore,eri->eio", b, a)
        assert (np.abs(expected - base[tensor]).max(axis=(1, 2)) > 0.1).all()
        np.testing.assert_allclose(merged[tensor], expected, atol=1e-5)
