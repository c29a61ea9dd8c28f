"""The files of the paper's experiments: their settings, the effects of these, and tiny runs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny import on_first_device
from typer.testing import CliRunner

from selm_jax import cli, config
from selm_jax.commands.tiny import _FAMILIES, ROWS, make_model, shrink
from selm_jax.config import ConfigError, as_dict
from selm_jax.iterate import iterate
from selm_jax.policy.sizes import given
from selm_jax.preferences.batches import updates_per_epoch
from selm_jax.preferences.layouts import row_lengths
from selm_jax.run import check as run_check
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.text.chat import Chat
from selm_jax.text.layout import truncate
from selm_jax.text.prompts import portion
from selm_jax.training.optimizer import learning_rate
from selm_jax.weights.huggingface import load

PAPER = Path(__file__).parents[2] / "experiments/paper"
FILES = {str(f.relative_to(PAPER).with_suffix("")): f for f in sorted(PAPER.rglob("*.yaml"))}
ULTRAFEEDBACK = 61_135  # rows of train_prefs

# arXiv 2405.19332, section 6 and the authors' scripts: portions and the first one used, learning
# rate of each iteration, global batch, then updates and warm-up updates of an iteration.
ZEPHYR = (4, 2, (5e-7, 5e-7, 1e-7), 256, 59, 6)
OTHERS = (3, 1, (5e-7, 3e-7, 1e-7), 128, 159, 16)
TABLE = {
    "zephyr_7b/warm_start": (4, 1, (5e-7,), 256, 59, 6),
    "zephyr_7b/selm": ZEPHYR,
    "zephyr_7b/iterative_dpo": ZEPHYR,
    "llama3_8b/selm": OTHERS,
    "llama3_8b/iterative_dpo": OTHERS,
    "phi3_mini/selm": OTHERS,
    "phi3_mini/iterative_dpo": OTHERS,
}
ALPHA = {"zephyr_7b": 1e-3, "llama3_8b": 1e-4, "phi3_mini": 1e-3}


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        on_first_device(patch)
        yield


def tiny(name: str, folder: Path) -> tuple[Run, str]:
    """A finished tiny run, and what was said when it was made."""
    said = io.StringIO()
    whole = config.load(FILES[name], [f"output={folder / 'run'}"])
    run = Run(shrink(whole, Console(file=said, width=200)), Console(quiet=True))
    iterate(run)
    return run, said.getvalue()


def check(run: Run) -> None:
    """All stages are done, each iteration made its updates, and the last model loads."""
    e = run.experiment
    for t in range(1, e.iterations + 1):
        stages = json.loads((run.folder.iteration(t) / "stage.json").read_text())
        assert list(stages) == ["generate", "rank", "score", "train", "export", "evaluate"]
        assert all(stage["done"] for stage in stages.values())
        counts = {name: stage["counts"] for name, stage in stages.items()}
        examples = ROWS // e.portions
        assert counts["score"]["examples"] == examples
        assert counts["train"]["updates"] == examples // 4 > 1
    lines = [json.loads(line) for line in run.folder.metrics_file.read_text().splitlines()]
    firsts = [m["loss"] for m in lines if m["stage"] == "train" and m["step"] == 1]
    np.testing.assert_allclose(firsts, math.log(2), atol=1e-6)
    last = run.policy(e.iterations).path
    before, after = (load(folder, run.programs.config) for folder in (run.policy(0).path, last))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-4  # the file's own learning rates
    assert Chat(last).prompt_ids(run.prompts(1)[0].messages)


@pytest.mark.parametrize("name", TABLE)
def test_the_settings_are_the_papers(name):
    e = config.load(FILES[name])
    portions, first, rates, batch, *_ = TABLE[name]
    assert (e.portions, e.data.first_portion, e.training.learning_rate) == (portions, first, rates)
    assert e.iterations == len(rates)
    assert e.data.train == "HuggingFaceH4/ultrafeedback_binarized" and not e.data.shuffle
    model, method = name.split("/")
    loss = {"loss": "selm", "alpha": ALPHA[model]} if method == "selm" else {"loss": "dpo"}
    assert e.objective == loss | {"beta": 0.01}
    t = e.training
    assert (t.global_batch, t.epochs, t.schedule, t.warmup_ratio) == (batch, 1, "cosine", 0.1)
    assert (t.optimizer, t.b1, t.b2, t.eps) == ("adamw", 0.9, 0.999, 1e-8)
    assert (t.weight_decay, t.clip, e.seed) == (0.0, 1.0, 42)
    assert (e.text.layout, e.text.max_length, e.text.max_prompt_length) == ("paper", 1024, 512)
    assert (e.candidates.samples, e.candidates.dataset) == (0, True)
    assert e.candidates.greedy == (method != "warm_start")
    assert e.rollout.max_new_tokens == 1024
    assert e.feedback.ranker == "pairrm"
    assert e.feedback.settings["folder"] == "llm-blender/PairRM-hf"
    assert (e.feedback.ties, e.feedback.rule) == ("drop" if e.taught else "first", "best_worst")


DPO = {"objective": {"loss": "dpo", "beta": 0.01}}
CHANGES = {  # of selm.yaml beside it
    "zephyr_7b/iterative_dpo": DPO,
    "llama3_8b/iterative_dpo": DPO,
    "phi3_mini/iterative_dpo": DPO,
    "zephyr_7b/warm_start": DPO | {
        "iterations": 1,
        "model": {"source": "HuggingFaceH4/mistral-7b-sft-beta"},
        "data": {"first_portion": 1},
        "candidates": {"greedy": 0},
        "feedback": {"ties": "drop"},
        "training": {"learning_rate": [5e-7]},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_on_a_base_changes_what_is_said_and_nothing_else(name):
    expected = as_dict(config.load(FILES[f"{name.split('/')[0]}/selm"]))
    expected["output"] = f"runs/paper/{name}"
    for key, value in CHANGES[name].items():
        free = key == "objective" or not isinstance(value, dict)
        expected[key] = value if free else expected[key] | value
    assert as_dict(config.load(FILES[name])) == expected


def test_these_are_all_the_files():
    assert sorted(FILES) == sorted(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_updates_and_warm_up_follow_from_the_61135_rows(name):
    e = config.load(FILES[name])
    *_, updates, warm_up = TABLE[name]
    for t in range(1, e.iterations + 1):
        index = e.data.first_portion - 1 + t
        rows = portion(range(ULTRAFEEDBACK), index, e.portions)
        size = ULTRAFEEDBACK // e.portions
        assert (rows[0], len(rows)) == ((index - 1) * size, size)
        s = e.training
        assert updates_per_epoch(len(rows), s.global_batch) * s.epochs == updates
        rate = learning_rate(s.schedule, e.learning_rate(t), updates, s.warmup_ratio)
        rates = np.array([rate(step) for step in range(updates)])
        assert int(rates.argmax()) == warm_up
        assert rates.max() == pytest.approx(e.learning_rate(t))


@pytest.mark.parametrize("model", ALPHA)
def test_the_baseline_differs_in_its_objective_alone(model):
    selm, dpo = (as_dict(config.load(FILES[f"{model}/{m}"])) for m in ("selm", "iterative_dpo"))
    assert {key for key in selm if selm[key] != dpo[key]} == {"output", "objective"}


def test_zephyr_goes_on_from_its_warm_start():
    warm = config.load(FILES["zephyr_7b/warm_start"])
    for method in ("selm", "iterative_dpo"):
        e = config.load(FILES[f"zephyr_7b/{method}"])
        assert e.model.source == f"{warm.output}/iteration_1/model"
        assert e.data.first_portion == warm.data.first_portion + warm.iterations
        assert e.portions == warm.portions == e.iterations + warm.iterations


@pytest.mark.parametrize("name", TABLE)
def test_a_plan_is_for_rows_that_hold_two_of_the_longest_examples(name):
    """The longest that truncation leaves, which the comment in the file and the plan speak of."""
    e = config.load(FILES[name])
    most, prompt = e.text.max_length, e.text.max_prompt_length
    explore = (0,) * (e.rollout.max_new_tokens + 12)  # what a template puts around it
    longest = 0
    for p in range(1, 2 * most, 7):
        for r in (1, most - prompt, most - p, most, 4 * most):
            answers = {"chosen": (0,) * max(r, 1), "rejected": (1,) * max(r, 1), "explore": explore}
            row = truncate((0,) * p, answers, most, prompt)
            longest = max(longest, len(row.prompt) + sum(map(len, row.responses.values())))
    assert e.training.row_length == "auto"
    assert 3 * most <= longest <= 3 * most + 12 and row_lengths(longest)[-1] == 6 * most


@pytest.mark.parametrize("name", TABLE)
def test_no_size_is_named_that_can_be_chosen(name):
    e = config.load(FILES[name])
    assert given(as_dict(e)) == {}
    assert (e.compute.data, e.compute.fsdp, e.compute.tensor, e.compute.decode_tensor) == (
        1,
        -1,
        1,
        4,
    )


@pytest.mark.slow
def test_the_warm_start_runs_tiny_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "selm_jax.commands.runs.set_up_jax", lambda: None
    )  # it is for the whole process
    name = "zephyr_7b/warm_start"
    arguments = ["run", str(FILES[name]), f"output={tmp_path / 'run'}", "--tiny"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "TINY" in result.output
    assert "feedback.ranker: pairrm -> length" in result.output
    e = config.load(tmp_path / "run-tiny/config.yaml")
    assert e.objective == config.load(FILES[name]).objective
    check(Run(e))
    counts = json.loads((tmp_path / "run-tiny/iteration_1/stage.json").read_text())
    assert counts["rank"]["counts"]["pairs"] == ROWS // 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if "iterative_dpo" in name else [])
        for name in TABLE
        if "warm_start" not in name
    ],
)
def test_it_runs_tiny(name, tmp_path):
    run, said = tiny(name, tmp_path)
    check(run)
    for key in ("model.source", "data.train", "training.global_batch", "feedback.ranker"):
        assert f"  {key}: " in said
    for kept in ("objective", "iterations", "learning_rate", "portions", "seed", "layout"):
        assert kept not in said


def test_tiny_inputs_are_the_same_every_time(tmp_path):
    def inputs(folder):
        e = config.load(FILES["phi3_mini/selm"], [f"output={folder}"])
        shrink(e, Console(quiet=True))
        root = Path(f"{folder}-tiny/inputs")
        return {f.relative_to(root): f.read_bytes() for f in root.rglob("*") if f.is_file()}

    first, second = inputs(tmp_path / "a"), inputs(tmp_path / "b")
    assert first == second and len(first) >= 7


@pytest.mark.parametrize("family", _FAMILIES.values(), ids=[names[0] for names in _FAMILIES])
def test_tiny_models_are_models_elsewhere_too(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    make_model(tmp_path / "model", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model(model.dummy_inputs["input_ids"]).logits.isfinite().all()


def test_portions_that_the_warm_start_used_up_are_missed(tmp_path):
    message = "3 portions are too few for 3 iterations.*first_portion: 2"
    with pytest.raises(ConfigError, match=message):
        config.load(FILES["zephyr_7b/selm"], ["data.portions=3"])
    with pytest.raises(ConfigError, match="first_portion: 0, a whole number from 1"):
        config.load(FILES["zephyr_7b/selm"], ["data.first_portion=0"])


def test_pairs_alone_cannot_teach_selm(tmp_path):
    overrides = [f"output={tmp_path / 'run'}", "objective={loss: selm, beta: 0.01, alpha: 1e-3}"]
    e = shrink(config.load(FILES["zephyr_7b/warm_start"], overrides), Console(quiet=True))
    with pytest.raises(RunError, match="explore.*candidates.greedy: 1"):
        run_check.check(Run(e, Console(quiet=True)))
