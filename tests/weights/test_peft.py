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
from selm_jax.models.lora import Lora, LoraError, init, merge
from selm_jax.weights.huggingface import load, to_hf_tensors
from selm_jax.weights.multimodal import is_in
from selm_jax.weights.peft import check, export_adapter

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
    ours = run(merge(params, adapters, lora), tokens)
    assert np.abs(ours - run(params, tokens)).max() > 0.1
    np.testing.assert_allclose(ours, expected, atol=2e-4)

    # Every tensor of the folder is used: peft stays silent about keys that it does not know.
    names = set(peft.get_peft_model_state_dict(theirs))
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "numpy") as file:
        assert set(file.keys()) == names
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(FAMILIES / name)


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


def test_experts_that_are_one_tensor_have_no_adapters():
    config = read_config(FAMILIES / "gpt-oss")
    check(config, Lora(2, 4.0, targets="self_attn"))
    message = r"one tensor \(model.layers.0.mlp.experts.down_proj\).* Set lora.targets: self_attn"
    for lora in (
        Lora(2, 4.0),  # the default targets
        Lora(2, 4.0, experts=True),
        Lora(2, 4.0, targets="down_proj"),
        Lora(2, 4.0, targets="self_attn", experts=True),
    ):
        with pytest.raises(LoraError, match=message):
            check(config, lora)


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
