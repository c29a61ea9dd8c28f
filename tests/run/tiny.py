"""A tiny random chat model and a tiny experiment; everything is real except the size."""

from __future__ import annotations

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from selm_jax.iterate import iteration, measure
from selm_jax.models.config import DecoderConfig, LayerKind, Rope
from selm_jax.models.decoder import Decoder
from selm_jax.models.families import to_hf
from selm_jax.parallel.mesh import make_mesh
from selm_jax.run.inputs import StoredTable
from selm_jax.run.wanted import Wanted
from selm_jax.shell import artifacts
from selm_jax.stages.rank import pool_of, rank
from selm_jax.stages.score import paired_examples, score
from selm_jax.stages.step import Step
from selm_jax.weights.huggingface import save

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = [
    f"{verb} a {thing} in one line."
    for verb in ("Describe", "Praise", "Review", "Sell", "Draw", "Explain")
    for thing in ("river", "chair", "song", "letter", "train", "soup", "garden", "coat")
]


def on_first_device(patch: pytest.MonkeyPatch) -> None:
    """Runs that are not given devices use the first one alone."""
    first = jax.devices()[:1]
    patch.setattr(
        "selm_jax.run.devices.make_mesh",
        lambda sizes, devices=None, **_: make_mesh(sizes, devices or first),
    )


def make_model(folder: Path, seed: int = 0, *, layers: int = 2, **sizes: int) -> Path:
    """A Llama of 2 layers and width 32 with a byte-level tokenizer of 320 tokens."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROMPTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    of_width_32 = {"embed": 32, "mlp": 64, "heads": 4, "kv_heads": 2, "head_dim": 8}
    config = DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        kinds=(LayerKind(Rope(1e4)),) * layers, norm_eps=1e-5, tied=True, max_positions=512,
        architecture="LlamaForCausalLM", **of_width_32 | sizes,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(to_hf(config) | {"eos_token_id": 1}))
    one = jnp.zeros((1, 2), jnp.int32)
    variables = Decoder(config).init(jax.random.key(seed), one, one)
    save(nn.unbox(variables["params"]), config, folder)
    return folder


def write_prompts(file: Path, prompts=tuple(PROMPTS)) -> Path:
    rows = [{"prompt_id": f"p{i}", "prompt": text} for i, text in enumerate(prompts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def experiment(folder: Path, **changes) -> Path:
    """Writes model, data and an experiment file; returns the latter. Two iterations, seconds."""
    if not (folder / "model").exists():
        make_model(folder / "model")
        write_prompts(folder / "train.jsonl", PROMPTS[:32])
        write_prompts(folder / "heldout.jsonl", PROMPTS[32:40])
    tree = {
        "output": str(folder / "run"),
        "iterations": 2,
        "model": {"source": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")},
        "candidates": {"greedy": 1, "samples": 2, "dataset": False},
        "rollout": {
            "max_new_tokens": 12, "max_prompt_tokens": 64, "slots": 8, "prefill_rows": 8,
            "prompts_per_part": 6,
        },
        "feedback": {"ranker": "length"},
        "objective": {"loss": "selm", "beta": 0.1, "alpha": 0.01},
        "training": {
            "learning_rate": [1e-3, 5e-4], "global_batch": 4, "row_length": 128, "rows": 8,
            "checkpoint_every": 1, "remat": "none", "logprob_chunk": 32,
        },
        "log": {"tensorboard": False},
    }  # fmt: skip
    for path, value in changes.items():
        group = tree
        *parents, last = path.split("__")
        for key in parents:
            group = group.setdefault(key, {})
        group[last] = value
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def logps_of(run, params, examples) -> list[tuple[float, ...]]:
    """The log-probability of every response of every example, as the run's stages compute it."""
    return run.programs.scorer.logps(params, examples)


def do(run, name: str, t: int) -> bool:
    """Does one stage of a run whose inputs are there; says whether there was work to do."""
    run.wanted = Wanted(name, t)
    measure(run, 0, run.start) if t == 0 else iteration(run, t, run.policy(t - 1))
    return run.wanted.did[name, t]


def step_of(run, stage, t) -> Step:
    """What the body of a stage is given besides its inputs."""
    return Step.of(run, stage.name, t, stage.keys(run))


def stored(run, t, name) -> StoredTable:
    return StoredTable(run.folder.iteration(t), name)


def counts_of(run, name: str, t: int) -> dict:
    return artifacts.Stages(run.folder.iteration(t)).read()[name]["counts"]


def paired(run, t):
    """The examples that stage `score` makes of ranked.parquet, and what it cuts."""
    step = step_of(run, score, t)
    return paired_examples(step, run.prompts(t), stored(run, t, "ranked.parquet"), run.chat)


def pool(run, t):
    """The candidates that stage `rank` makes of the answers."""
    looked_at = run.looked_at(t, run.policy(t - 1))
    responses = stored(run, t, "responses")
    return pool_of(step_of(run, rank, t), run.prompts(t), responses, run.chat, *looked_at)
