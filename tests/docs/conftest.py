"""A reader's folder: every name that the pages use stands for something tiny there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pages
import pytest
import tiny
from typer.testing import CliRunner

from selm_jax.cli import app

LONGER = {"max_position_embeddings": 2048}
COPIES = (
    *("dpo", "selm_1", "selm_2", "selm_3", "dpo_1", "dpo_2", "dpo_3"),
    *(f"idea/{method}/seed_{seed}" for method in ("dpo", "squared") for seed in (1, 2)),
)


def block(page: str, title: str, language: str = "python") -> str:
    """The block of a page that follows a line which names a file."""
    text = (pages.ROOT / "docs" / page).read_text(encoding="utf-8")
    return pages.blocks(text[text.index(f"`{title}`") :], language)[0]


@pytest.fixture(scope="session")
def reader(tmp_path_factory) -> Path:
    """A folder in which runs/quickstart is a finished run, made with the pages' own command."""
    folder = tmp_path_factory.mktemp("smollm_reader")  # --tiny asks for the name of a family
    changes = {"output": "runs/quickstart", "iterations": 1, "training__learning_rate": 1e-3}
    file = tiny.experiment(folder, **changes)
    for name in ("quickstart", "study/base"):
        (folder / f"experiments/{name}.yaml").parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"experiments/{name}.yaml")
    for name in ("model", "start"):
        shutil.copytree(folder / "model", folder / "my" / name)
        config = folder / "my" / name / "config.json"  # that has room for the default lengths
        config.write_text(json.dumps(json.loads(config.read_text()) | LONGER))
    shutil.copy(folder / "train.jsonl", folder / "my_prompts.jsonl")
    answers = {"chosen": "It is wide.", "rejected": "No."}
    pairs = [{"prompt": prompt} | answers for prompt in tiny.PROMPTS[:4]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name in ("my_losses.py", "my_rules.py"):
        text = block("extend.md", name).replace('("please", "thank")', '"aeiou"')
        (folder / name).write_text(text)  # a random model writes letters, and never "please"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny.on_first_device(patch)
        told = CliRunner().invoke(app, ["run", "experiments/quickstart.yaml"])
    assert told.exit_code == 0, told.output
    for name in COPIES:
        shutil.copytree(folder / "runs/quickstart", folder / "runs" / name)
    return folder
