"""The loop on a tiny model: its outputs, and the changes that it refuses."""

import json
import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from flax.traverse_util import flatten_dict
from rich.console import Console

from selm_jax import cli, config
from selm_jax.iterate import iterate, run_stage
from selm_jax.parallel import multihost
from selm_jax.report import page
from selm_jax.report.data import ReportError
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.shell.sealed import seal, unsealed
from selm_jax.stages.train import plan_of, train
from selm_jax.tables.examples import read as read_examples
from selm_jax.weights.huggingface import load

QUIET = Console(quiet=True)


def go(file, *overrides):
    run = Run(config.load(file, overrides), QUIET)
    iterate(run)
    return run


@pytest.fixture(scope="module")
def finished(finished_run):
    return Run(config.load(finished_run / "experiment.yaml"), QUIET), finished_run


def metrics(run, stage):
    lines = [json.loads(x) for x in run.folder.metrics_file.read_text().splitlines()]
    return [x for x in lines if x["stage"] == stage]


def test_a_run_tells_its_whole_story(finished):
    run, _ = finished
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "report.html"):
        assert (run.folder.path / name).stat().st_size > 0
    for t in (1, 2):
        folder = run.folder.iteration(t)
        assert len(list((folder / "responses").glob("part-*-of-00003.parquet"))) == 3
        stages = json.loads((folder / "stage.json").read_text())
        assert list(stages) == ["generate", "rank", "score", "train", "export", "evaluate"]
        assert all(stage["done"] for stage in stages.values())
        assert stages["generate"]["counts"]["responses"] == 16 * 3
        assert not (folder / "checkpoints").exists()
    assert not list(run.folder.path.rglob("*partial"))


def test_the_manifest_has_what_every_evaluation_cost(finished):
    """It had the last one's only after the run was started once more."""
    run, _ = finished
    told = json.loads((run.folder.path / "manifest.json").read_text())["feedback"]
    assert {t: sorted(stages) for t, stages in told.items()} == {
        "0": ["evaluate"], "1": ["evaluate", "rank"], "2": ["evaluate", "rank"]
    }  # fmt: skip


def test_other_processes_than_the_first_write_neither_settings_nor_manifest(tmp_path, monkeypatch):
    run = Run(config.load(tiny.experiment(tmp_path)), QUIET)
    monkeypatch.setattr(multihost, "is_first", lambda: False)
    run.open()
    run.write_manifest()
    assert not list(run.folder.path.rglob("*"))


def test_the_first_update_of_each_iteration_costs_log_2(finished):
    run, _ = finished
    firsts = [m for m in metrics(run, "train") if m["step"] == 1]
    assert [m["iteration"] for m in firsts] == [1, 2]
    for m in firsts:
        assert m["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert m["optimism/reward"] == pytest.approx(0, abs=1e-6)


def test_the_policy_moves_and_becomes_the_next_reference(finished):
    run, _ = finished
    assert (run.policy(1).path / "model.safetensors").read_bytes() != (
        run.policy(0).path / "model.safetensors"
    ).read_bytes()
    params = run.programs.load(run.policy(1).path)
    examples = read_examples(run.folder.iteration(2) / "examples.parquet")

    again = tiny.logps_of(run, params, examples)
    for stored, now in zip(examples, again, strict=True):
        np.testing.assert_allclose(stored.reference_logps, now, rtol=1e-6, atol=1e-5)


def test_what_is_trained_on_is_what_was_generated(finished):
    run, _ = finished
    drawn = {}
    for row in pq.read_table(run.folder.iteration(1) / "responses").to_pylist():
        drawn.setdefault(row["prompt_id"], []).append((row["kind"], tuple(row["token_ids"])))
    for example in read_examples(run.folder.iteration(1) / "examples.parquet"):
        ids = [x for _, x in drawn[example.prompt_id]]
        assert set(example.responses) <= set(ids)
        assert len(set(example.responses)) == len(example.responses)
        greedy = dict(reversed(drawn[example.prompt_id]))["greedy"]
        assert example.responses[example.roles["explore"]] == greedy


def test_a_finished_run_does_nothing_again(finished, monkeypatch):
    run, folder = finished
    before = {p: p.stat().st_mtime_ns for p in run.folder.path.rglob("*.parquet")}
    monkeypatch.setattr("selm_jax.rollout.engine.Engine.generate", None)
    go(folder / "experiment.yaml")
    assert before == {p: p.stat().st_mtime_ns for p in run.folder.path.rglob("*.parquet")}


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, and what starts it again."""
    run, folder = finished
    shutil.copytree(run.folder.path, tmp_path / "run")
    return tmp_path / "run", lambda: go(folder / "experiment.yaml", f"output={tmp_path / 'run'}")


def test_files_of_the_operating_system_in_a_finished_run_do_not_matter(copied):
    folder, again = copied
    for where in [p for p in folder.rglob("*") if p.is_dir()]:
        (where / ".DS_Store").write_text("x")
        (where / "._a").write_text("x")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")}
    again()
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")}
    (folder / "iteration_1" / "model" / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"model.*new: notes\.txt"):
        again()


@pytest.mark.parametrize("change", ["digit", "gone", "torn", "file"])
@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_line_of_metrics_that_is_another_is_refused(copied, stage, change):
    folder, again = copied
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines()
    (n, *_) = (i for i, line in enumerate(lines) if f'"{stage}"' in line and "1" in line)
    lines[n] = {
        "digit": lines[n].replace("1", "2", 1), "gone": "", "torn": lines[n][:-3], "file": ""
    }[change]  # fmt: skip
    file.write_text("\n".join(line for line in lines if line) + "\n")
    if change == "file":
        file.unlink()
    with pytest.raises(
        ArtifactError, match=r"metrics\.jsonl(: the lines of stage '|, line \d+: not)"
    ):
        again()
    with pytest.raises(ReportError, match=r"metrics\.jsonl"):
        page.write([folder], folder / "page.html")
    assert not (folder / "page.html").exists()


def test_metrics_of_earlier_versions_without_a_digest_are_accepted(copied):
    """Versions before kept no digest of them."""
    folder, again = copied
    for file in folder.rglob("stage.json"):
        entries = json.loads(file.read_text())
        older = {
            stage: {k: v for k, v in unsealed(entry).items() if k != "logged"}
            for stage, entry in entries.items()
        }
        file.write_text(json.dumps({stage: seal(entry, stage) for stage, entry in older.items()}))
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"stage": "train", "iteration": 2, "step": 99, "loss": 0.0}) + "\n")
    again()


@pytest.mark.slow
def test_iterative_dpo_differs_by_settings_only_and_equals_selm_at_alpha_0(finished, tmp_path):
    _, folder = finished
    runs = []
    for name, loss in {
        "dpo": '{"loss": "dpo", "beta": 0.1}',
        "selm": '{"loss": "selm", "beta": 0.1, "alpha": 0.0}',
    }.items():
        runs.append(
            go(
                folder / "experiment.yaml",
                f"output={tmp_path / name}",
                f"objective={loss}",
                "iterations=1",
                "data.portions=2",
                "training.learning_rate=1e-3",
            )
        )
    a, b = ((run.policy(1).path / "model.safetensors").read_bytes() for run in runs)
    assert a == b


@pytest.mark.slow
def test_a_live_reference_gives_the_same_policy(finished, tmp_path):
    run, folder = finished
    live = go(
        folder / "experiment.yaml",
        f"output={tmp_path / 'live'}",
        "training.reference=live",
        "iterations=1",
        "data.portions=2",
        "training.learning_rate=[1e-3]",
    )
    for ours, theirs in zip(
        metrics(live, "train"), [m for m in metrics(run, "train") if m["iteration"] == 1],
        strict=True,
    ):  # fmt: skip
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["full", "nf4"])
def test_adapters_are_trained_exported_and_started_anew(base, finished, tmp_path):
    """The base alone is the reference: each iteration starts at log 2, from the merged model."""
    if base != "full":
        pytest.importorskip("qwix", reason="qwix is not installed (the extra `qlora`)")
    _, folder = finished
    run = go(
        folder / "experiment.yaml",
        f"output={tmp_path / 'run'}",
        f"lora={{rank: 2, alpha: 4, dropout: 0.1, targets: q_proj|down_proj, base: {base}}}",
        "training.checkpoint_every=100",
    )
    firsts = [m for m in metrics(run, "train") if m["step"] == 1]
    assert [m["loss"] for m in firsts] == pytest.approx([np.log(2)] * 2, abs=1e-4)
    assert all(m["grad_norm"] > 0 for m in firsts)
    for t in (1, 2):
        before, after = (load(run.policy(i).path, run.programs.config) for i in (t - 1, t))
        changed = {
            path
            for path, x in flatten_dict(after).items()
            if np.abs(x - flatten_dict(before)[path]).max() > 1e-7
        }
        trained = {("layers", "attention", "q"), ("layers", "mlp", "down")}
        # Four bits change the whole base, once: what they can hold they do not change again.
        assert changed == trained if base == "full" or t == 2 else changed > trained
        settings = json.loads((run.folder.iteration(t) / "adapter/adapter_config.json").read_text())
        assert settings["target_modules"] == ["down_proj", "q_proj"]
        assert settings["base_model_name_or_path"] == str(run.policy(t - 1).path)
        outputs = json.loads((run.folder.iteration(t) / "stage.json").read_text())["export"][
            "outputs"
        ]
        assert set(outputs) == {"model", "adapter"}


@pytest.mark.slow
def test_a_base_model_is_taught_the_data_sets_answers(finished, tmp_path):
    """loss: sft on conversations: prompts masked, nothing generated, ranked or scored."""
    _, folder = finished
    rows = [
        {"prompt_id": f"p{i}", "messages": [
            {"role": "user", "content": p}, {"role": "assistant", "content": "A kind answer."}]}
        for i, p in enumerate(tiny.PROMPTS[:16])
    ]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = (
        f"data.train={tmp_path / 'chats.jsonl'}",
        "data.chosen=messages",
        "candidates={greedy: 0, samples: 0, dataset: true}",
        "iterations=1",
        "training.learning_rate=1e-2",
        "training.epochs=4",
    )
    run = go(
        folder / "experiment.yaml", f"output={tmp_path / 'run'}", "objective={loss: sft}", *settings
    )
    losses = [m["loss"] for m in metrics(run, "train")]
    assert losses[-1] < 0.7 * losses[0]
    examples = read_examples(run.folder.iteration(1) / "examples.parquet")
    assert len(examples) == 16
    end = run.chat.stop_ids[0]
    for example in examples:
        assert example.reference_logps is None and dict(example.roles) == {"chosen": 0}
        assert run.chat.text(example.responses[0]) == "A kind answer."
        assert example.responses[0][-1] == end
    # The first loss is the start model's mean over all answer tokens, and over no other.
    (first, *_) = plan_of(
        tiny.step_of(run, train, 1), tiny.stored(run, 1, "examples.parquet")
    ).updates
    logps = tiny.logps_of(run, run.programs.load(run.policy(0).path), first)
    tokens = sum(len(e.responses[0]) for e in first)
    assert losses[0] == pytest.approx(-sum(x for (x,) in logps) / tokens, rel=1e-5)

    with pytest.raises(RunError, match="dpo needs the roles chosen, rejected"):
        go(
            folder / "experiment.yaml", f"output={tmp_path / 'dpo'}",
            "objective={loss: dpo, beta: 0.1}", *settings,
        )  # fmt: skip


@pytest.mark.slow
def test_a_preference_data_set_as_in_the_paper(finished, tmp_path):
    """Candidates are the policy's greedy answer and the data set's two, in that order."""
    _, folder = finished
    rows = [
        {"prompt_id": f"p{i}", "prompt": p, "chosen": "A long and kind answer.", "rejected": "No."}
        for i, p in enumerate(tiny.PROMPTS[:16])
    ]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = go(
        folder / "experiment.yaml",
        f"output={tmp_path / 'run'}",
        f"data.train={tmp_path / 'prefs.jsonl'}",
        "data.chosen=chosen",
        "data.rejected=rejected",
        "candidates={greedy: 1, samples: 0, dataset: true}",
        "iterations=1",
        "training.learning_rate=1e-3",
    )
    ranked = pq.read_table(run.folder.iteration(1) / "ranked.parquet").to_pylist()
    assert [r["source"] for r in ranked[:3]] == ["greedy", "chosen", "rejected"]
    assert {r["rank"] for r in ranked[:3]} <= {1, 2, 3}
    end = run.chat.stop_ids[0]
    assert all(r["token_ids"][-1] == end for r in ranked if r["finish"] == "dataset")
    counts = json.loads((run.folder.iteration(1) / "stage.json").read_text())["rank"]["counts"]
    places = [counts[f"explore/{x}"] for x in ("best", "middle", "worst", "tied")]
    assert sum(places) == counts["pairs"] == 16 - counts["drops"]


def test_changed_settings_never_resume_a_stage(finished):
    _, folder = finished
    with pytest.raises(ArtifactError, match=r"rollout\.temperature was 1\.0 and is now 0\.5"):
        go(folder / "experiment.yaml", "rollout.temperature=0.5")
    with pytest.raises(ArtifactError, match=r"objective\.beta was 0\.1 and is now 0\.2"):
        go(folder / "experiment.yaml", "objective.beta=0.2")
    go(folder / "experiment.yaml", "rollout.slots=3")  # changes nothing about what comes out


def taken_out(run, stage):
    """As the refusal says: the stage is removed from stage.json."""
    file = run.folder.iteration(1) / "stage.json"
    stages = json.loads(file.read_text())
    del stages[stage]
    file.write_text(json.dumps(stages))


def test_a_stage_that_runs_again_does_not_reuse_old_answers(finished, tmp_path):
    _, folder = finished
    file, cold = folder / "experiment.yaml", "rollout.temperature=0.01"

    def generated(name, *overrides):
        run = Run(config.load(file, [f"output={tmp_path / name}", *overrides]), QUIET)
        run_stage(run, "generate", 1)
        parts = sorted((run.folder.iteration(1) / "responses").iterdir())
        return run, [part.read_bytes() for part in parts]

    run, before = generated("redone")
    _, fresh = generated("fresh", cold)
    taken_out(run, "generate")
    _, redone = generated("redone", cold)
    assert redone == fresh != before


@pytest.mark.slow
def test_a_training_that_runs_again_ignores_old_checkpoints(finished, tmp_path, monkeypatch):
    _, folder = finished
    file = folder / "experiment.yaml"

    def begun(name, *overrides):
        run = Run(config.load(file, [f"output={tmp_path / name}", *overrides]), QUIET)
        for stage in ("generate", "rank", "score"):
            run_stage(run, stage, 1)
        return run

    run = begun("redone")
    with monkeypatch.context() as patch, pytest.raises(multihost.Stopped):
        patch.setattr(multihost, "should_stop", lambda: len(run.folder.logged("train", 1)) == 2)
        run_stage(run, "train", 1)
    assert [m["step"] for m in metrics(run, "train")] == [1, 2]
    taken_out(run, "train")
    losses = []
    for name in ("redone", "fresh"):
        run = begun(name, "objective.beta=0.7")
        run_stage(run, "train", 1)
        losses.append([(m["step"], m["loss"]) for m in metrics(run, "train")])
    assert losses[0] == losses[1] and losses[0][0][0] == 1


def test_an_export_of_another_training_is_refused(finished, tmp_path):
    run, folder = finished
    shutil.copytree(run.folder.path, tmp_path / "copy")
    changed = [f"output={tmp_path / 'copy'}", "training.learning_rate=[0.05, 5e-4]"]
    copy = Run(config.load(folder / "experiment.yaml", changed), QUIET)
    taken_out(copy, "train")
    with pytest.raises(ArtifactError, match=r"stage 'export': its input training has changed"):
        iterate(copy)
    taken_out(copy, "export")
    with pytest.raises(ArtifactError, match=r"stage 'evaluate': its input policy has changed"):
        iterate(copy)
    weights = [(each.policy(1).path / "model.safetensors").read_bytes() for each in (run, copy)]
    assert weights[0] != weights[1]


def test_a_damaged_or_missing_artefact_is_named(finished, tmp_path):
    run, folder = finished
    copy = tmp_path / "copy"
    shutil.copytree(run.folder.path, copy)
    file = copy / "iteration_1" / "ranked.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10] + b"0123456789")
    with pytest.raises(ArtifactError, match=r"ranked\.parquet is not what it wrote"):
        go(folder / "experiment.yaml", f"output={copy}")
    file.unlink()
    with pytest.raises(ArtifactError, match=r"ranked\.parquet is missing"):
        go(folder / "experiment.yaml", f"output={copy}")


def test_a_stage_runs_alone_and_asks_for_its_inputs(finished, tmp_path):
    _, folder = finished
    run = Run(config.load(folder / "experiment.yaml", [f"output={tmp_path / 'alone'}"]), QUIET)
    with pytest.raises(ArtifactError, match="Run the earlier stages first"):
        run_stage(run, "rank", 1)
    run_stage(run, "generate", 1)
    run_stage(run, "rank", 1)
    assert (run.folder.iteration(1) / "ranked.parquet").exists()
    assert not (run.folder.iteration(1) / "examples.parquet").exists()


def test_a_policy_is_handed_on_in_another_dtype_once(finished, tmp_path, monkeypatch, capsys):
    run, folder = finished
    to = tmp_path / "published"
    command = ["selm", "export", str(folder / "experiment.yaml"), "-t", "2", "--to", str(to)]
    monkeypatch.setattr("sys.argv", command)
    cli.main()
    assert "the policy after iteration 2, in bfloat16" in capsys.readouterr().out
    small = load(to, run.programs.config)
    for path, x in flatten_dict(load(run.policy(2).path, run.programs.config)).items():
        np.testing.assert_array_equal(
            x.astype("bfloat16").astype("float32"), flatten_dict(small)[path]
        )
    assert (to / "README.md").read_text() == (run.policy(2).path / "README.md").read_text()
    with pytest.raises(SystemExit):
        cli.main()
    assert "already exists" in capsys.readouterr().err
