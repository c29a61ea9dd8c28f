"""The experiments with other open models: what they change of the paper's, and tiny runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import pytest
from rich.console import Console
from tiny import on_first_device

from selm_jax import config
from selm_jax.commands.tiny import shrink
from selm_jax.config import as_dict
from selm_jax.iterate import iterate
from selm_jax.models.families import read_config
from selm_jax.plan.command import read_facts
from selm_jax.policy.sizes import given
from selm_jax.run.run import Run
from selm_jax.weights.huggingface import load

ROOT = Path(__file__).parents[2]
FILES = {f.stem: f for f in sorted((ROOT / "experiments/open_models").glob("*.yaml"))}
CONFIGS = {"olmo3_7b": "allenai--Olmo-3-7B-Instruct", "qwen3_30b_a3b": "Qwen--Qwen3-30B-A3B"}


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        on_first_device(patch)
        yield


def test_the_method_is_the_papers():
    assert FILES.keys() == CONFIGS.keys()
    paper = as_dict(config.load(ROOT / "experiments/paper/llama3_8b/selm.yaml"))
    for file in FILES.values():
        ours = as_dict(config.load(file))
        changed = {key for key in paper if ours[key] != paper[key]}
        assert changed <= {"output", "model", "training", "compute"} and given(ours) == {}
        free = ("router", "checkpoint_every")
        assert all(ours["training"][k] == v for k, v in paper["training"].items() if k not in free)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mesh_cuts_the_published_model_evenly(name):
    e = config.load(FILES[name])
    facts = read_facts(ROOT / f"tests/golden/configs/{CONFIGS[name]}.json")
    for tensor in (e.compute.tensor, e.compute.decode_tensor):
        experts = facts.mixture.experts if facts.mixture else tensor
        cut = (facts.kv_heads, facts.heads, facts.vocab_size, experts)
        assert not any(size % tensor for size in cut)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_it_runs_tiny(name, tmp_path):
    fewer = ["iterations=2", "training.learning_rate=5e-7"]
    whole = config.load(FILES[name], [f"output={tmp_path / 'run'}", *fewer])
    run = Run(shrink(whole, Console(quiet=True)), Console(quiet=True))
    iterate(run)
    lines = [json.loads(line) for line in run.folder.metrics_file.read_text().splitlines()]
    updates = [line for line in lines if line["stage"] == "train"]
    firsts = [line["loss"] for line in updates if line["step"] == 1]
    assert firsts == pytest.approx([math.log(2)] * 2, abs=1e-6)
    last = run.policy(2).path
    assert read_config(last).architecture == {
        "olmo3_7b": "Olmo3ForCausalLM",
        "qwen3_30b_a3b": "Qwen3MoeForCausalLM",
    }[name]  # fmt: skip
    before, after = (load(folder, read_config(folder)) for folder in (run.policy(0).path, last))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)["layers"]
    assert 0 < max(jax.tree.leaves(moved)) < 1e-4
    if "experts" in moved:
        assert moved["experts"]["router"] == 0 < moved["experts"]["gate"]
        assert all(1 <= line["experts/load_max"] <= 4 for line in updates)
