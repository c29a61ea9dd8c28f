"""Writes the table of docs/memory.md: which models fit on one GPU, computed and not run.

python docs/memory.py

What lies in memory (parameters, gradients, moments, caches) is taken from the programs of
`selm plan`, to the byte. What a program needs besides is estimated, by the formulas on the page.
"""

from __future__ import annotations

from pathlib import Path

from selm_jax import config
from selm_jax.config import Experiment
from selm_jax.models.config import DecoderConfig
from selm_jax.plan.command import read_facts
from selm_jax.plan.phases import Blueprint, phases
from selm_jax.plan.topology import local_target
from selm_jax.shell.memory import GIB, shard_bytes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory.md"
CONFIGS = ROOT / "tests" / "golden" / "configs"
BEGIN, END = "<!-- computed: python docs/memory.py -->", "<!-- end of what is computed -->"
BATCHES = 8  # packed rows of an update
GPUS = {24: 24e9 / GIB, 48: 48e9 / GIB, 80: 80e9 / GIB}
SHARE = 0.92  # of a GPU, by XLA_PYTHON_CLIENT_MEM_FRACTION
LONGEST, CACHE = 2048, 1024  # tokens of a row; of a prompt and its answer

EVERY = [
    "compute.dtype=bfloat16",
    "compute.preset=single",
    "training.rows=1",
    f"training.row_length={LONGEST}",
    "rollout.max_prompt_tokens=512",
    "rollout.max_new_tokens=512",
    "rollout.slots=16",
    "rollout.prefill_rows=4",
]
BFLOAT16 = "training.parameter_dtype=bfloat16"
METHODS = {
    "all parameters, float32": [],
    "all parameters, bfloat16": [BFLOAT16],
    "LoRA on bfloat16": [BFLOAT16, "lora={rank: 16, alpha: 32}"],
}
MODELS = {
    "SmolLM2-135M": "HuggingFaceTB--SmolLM2-135M-Instruct.json",
    "Qwen2-0.5B": "Qwen--Qwen2-0.5B-Instruct.json",
    "Llama-3.2-1B": "meta-llama--Llama-3.2-1B-Instruct.json",
    "SmolLM2-1.7B": "HuggingFaceTB--SmolLM2-1.7B-Instruct.json",
    "Gemma-2-2B": "google--gemma-2-2b-it.json",
    "SmolLM3-3B": "HuggingFaceTB--SmolLM3-3B.json",
    "Mistral-7B": "mistralai--Mistral-7B-Instruct-v0.3.json",
    "Llama-3.1-8B": "meta-llama--Llama-3.1-8B-Instruct.json",
}


def needs(experiment: Experiment, facts: DecoderConfig) -> dict[str, float]:
    """GiB of each program: what it is given, what lies beside it, and what it needs besides."""
    plan = Blueprint(experiment, facts, local_target())
    trained = shard_bytes(plan.programs.abstract_trained)
    found = {}
    for phase in phases(plan, BATCHES):
        there = shard_bytes(phase.arguments) + sum(phase.held.values())
        found[phase.name] = (there + besides(phase.name, facts, trained, experiment)) / GIB
    return found


def besides(name: str, facts: DecoderConfig, trained: int, experiment: Experiment) -> float:
    """Bytes of temporaries and results, estimated."""
    layers = len(facts.kinds)
    scores = facts.heads * LONGEST**2 * 4  # of one layer's attention, float32
    inputs = layers * LONGEST * facts.embed * 2  # of all layers, kept for the backward pass
    if name.startswith("gradients"):
        return trained + inputs + 4 * scores  # a second tree of gradients, and the backward pass
    if name == "score":
        return inputs / layers + scores
    if name == "apply":  # float32 steps take the place of what they are made of
        return 0 if experiment.training.parameter_dtype == "float32" else 2 * trained
    cache = 2 * sum(c.kv_heads * c.head_dim for c in facts.each_layer) * CACHE * 16 * 2
    return {"prefill": 4 * facts.heads * 512**2 * 4, "refill": 0, "decode": 2 * cache}[name]


def cell(overrides: list[str], file: str) -> str:
    experiment = config.load(ROOT / "experiments" / "quickstart.yaml", [*EVERY, *overrides])
    found = needs(experiment, read_facts(CONFIGS / file))
    name = max(found, key=lambda each: found[each])
    fits = [gb for gb, whole in GPUS.items() if found[name] <= SHARE * whole]
    size = f"**{fits[0]} GB**" if fits else "none of these"
    stage = {"gradients, add": "train", "apply": "train", "score": "score"}.get(name, "generate")
    return f"{found[name]:.1f} ({stage}): {size}"


def main() -> None:
    lines = [
        "| model | " + " | ".join(METHODS) + " |",
        "| --- |" + " --- |" * len(METHODS),
        *(
            f"| {name} | " + " | ".join(cell(m, file) for m in METHODS.values()) + " |"
            for name, file in MODELS.items()
        ),
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
