"""What does not fit into memory is refused before the work, and explained when it happens."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import jax
import pytest
import tiny
from jax.errors import JaxRuntimeError
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.policy.sizes import LEAST, least
from selm_jax.run import memory
from selm_jax.run.check import check
from selm_jax.run.held import held
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.run.sizes import Choice
from selm_jax.run.wanted import Wanted
from selm_jax.training import loop
from selm_jax.training.state import TrainState

QUIET = Console(quiet=True)


def run_of(folder, **changes) -> Run:
    return Run(config.load(tiny.experiment(folder, **changes)), QUIET, devices=jax.devices()[:1])


def test_the_least_of_training_is_what_its_arrays_take(tmp_path):
    run = run_of(tmp_path)
    params = run.programs.load(run.policy(0).path)
    state = TrainState.create(params, run.programs.optimizer)
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    moments = [x.nbytes for x in jax.tree.leaves(state.opt_state)]
    assert memory.least_of_training(run.programs) == {
        "parameters": sum(sizes), "gradients": sum(sizes), "moments": sum(moments)
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, beside",
    [
        ({"training__reference": "live"}, "reference"),
        ({"lora": {"rank": 2, "alpha": 4}}, "base model"),
        ({"lora": {"rank": 2, "alpha": 4, "base": "nf4", "targets": "q_proj"}}, "base model"),
    ],
    ids=["live reference", "lora", "nf4"],
)
def test_what_lies_beside_the_trained_parameters_counts(tmp_path, changes, beside):
    if "base" in changes.get("lora", {}):
        pytest.importorskip("qwix", reason="qwix is not installed (the extra `qlora`)")
    run = run_of(tmp_path, **changes)
    held = run.programs.start_of(run.policy(0).path)
    expected = sum(x.nbytes for x in jax.tree.leaves(held))
    assert memory.least_of_training(run.programs)[beside] == expected


def test_with_eight_shards_each_device_holds_an_eighth_of_the_matrices(tmp_path):
    file = tiny.experiment(tmp_path, compute__fsdp=8)
    run = Run(config.load(file), QUIET, devices=jax.devices())
    whole = sum(x.size * 4 for x in jax.tree.leaves(run.programs.abstract_params))
    assert whole / 8 <= memory.least_of_training(run.programs)["parameters"] < whole / 4


def test_an_experiment_that_cannot_fit_is_refused_with_what_is_missing(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    needed = sum(memory.least_of_training(run.programs).values())
    missing = 3 * 2**30
    monkeypatch.setattr(memory, "device_limit", lambda _: (needed - missing, "a test"))
    with pytest.raises(RunError, match=r"\(a test\): 3\.00 GiB are missing.*`lora`"):
        check(run)
    assert not list(tmp_path.glob("run/iter*")), "nothing was begun"


def test_a_run_that_has_no_training_left_is_not_refused(finished_run, tmp_path, monkeypatch):
    def again(*changes):
        changes = (f"output={tmp_path / 'run'}", *changes)
        return Run(config.load(finished_run / "experiment.yaml", changes), QUIET)

    shutil.copytree(finished_run / "run", tmp_path / "run")
    monkeypatch.setattr(memory, "device_limit", lambda _: (1, "a test"))
    iterate(again())
    with pytest.raises(RunError, match="are missing"):
        check(again("iterations=3", "training.learning_rate=1e-3"))
    only = run_of(tmp_path / "more")
    only.wanted = Wanted("generate", 1)
    check(only)


@pytest.mark.parametrize(
    "limit, free, told",
    [(1.0, 0.5, "are free on this machine now"), (1.5, 2.0, "selm plan"), (2.0, 2.0, None)],
)
def test_an_experiment_that_barely_fits_is_told_so(tmp_path, monkeypatch, limit, free, told):
    run = run_of(tmp_path)
    needed = sum(memory.least_of_training(run.programs).values())
    monkeypatch.setattr(memory, "device_limit", lambda _: (int(limit * needed), "a test"))
    monkeypatch.setattr(memory, "free_memory", lambda: int(free * needed * 8))
    found = list(memory.check_memory(run.programs))
    assert [told in line for line in found] == [True] if told else found == []


@pytest.mark.parametrize("stage", ["train", "generate"])
def test_on_a_cpu_the_estimate_is_compared_with_the_limit(tmp_path, monkeypatch, stage):
    """There the system would kill the run without a word."""
    run = run_of(tmp_path, rollout__slots=8, training__rows=8)
    of = run.sizes.training if stage == "train" else run.sizes.generation
    assert of is not None
    taken = 2**20
    mine = taken * len(jax.local_devices()) - memory.MARGIN
    monkeypatch.setattr(memory, "held_now", lambda: mine)

    def limited_to(sizes, missing: int) -> list[str]:
        limit = of.total(sizes) + taken - missing
        monkeypatch.setattr(memory, "device_limit", lambda _: (limit, "a test"))
        return list(memory.check_estimate(stage, of, run.sizes.sizes, LEAST))

    assert limited_to(run.sizes.sizes, 0) == []
    (line,) = limited_to(run.sizes.sizes, 1)
    assert ("training.rows 8" if stage == "train" else "rollout.slots 8") in line
    assert len(limited_to(LEAST, 0)) == 1
    with pytest.raises(RunError, match=rf"{stage} needs .* \(a test\): 0.25 GiB are missing"):
        limited_to(LEAST, 2**28)
    monkeypatch.setattr("selm_jax.run.check.check_memory", lambda _: iter(()))
    with pytest.raises(RunError, match="by the estimate"):
        check(run)


@pytest.mark.parametrize(
    "spare, platform, kept", [(0, "cpu", True), (-1, "cpu", False), (0, "gpu", False)]
)
def test_freed_memory_is_kept_only_where_a_cpu_has_twice_what_stages_need(
    tmp_path, monkeypatch, spare, platform, kept
):
    chosen = run_of(tmp_path).sizes
    stages = chosen.generation, chosen.training
    most = max(of.total(chosen.sizes) for of in stages)
    limit = 2 * (most + memory.MARGIN) + spare
    monkeypatch.setattr("selm_jax.run.sizes.device_limit", lambda _: (limit, "a test"))
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform=platform)])
    assert chosen.has_plenty is kept


def test_a_run_with_plenty_keeps_freed_memory_as_long_as_it_works(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("selm_jax.run.held.keep_freed", told.append)
    with held(run_of(tmp_path)):
        assert told == [True]
    assert told == [True, False]


def test_where_memory_is_short_updates_are_compiled_before_parameters_are_read(
    tmp_path, monkeypatch
):
    """Afterwards training compiles nothing that needs much memory."""
    kept = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))

    def updates() -> set[str]:
        files = (tmp_path / "compiled").glob("jit_*-cache")
        of_update = (file for file in files if file.stat().st_size > 2**14)  # no sum of two arrays
        return {
            file.name for file in of_update if re.match("jit_(gradients|add|apply)-", file.name)
        }

    def compile_ahead(*given):
        before = updates()
        loop.compile_ahead(*given)
        ahead.append((before, updates()))

    ahead = []
    monkeypatch.setattr("selm_jax.stages.train.loop", SimpleNamespace(
        **vars(loop) | {"compile_ahead": compile_ahead}))  # fmt: skip
    monkeypatch.setattr(Choice, "has_plenty", False)
    try:
        iterate(run_of(tmp_path, training__rows=1, iterations=1, training__learning_rate=1e-3))
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", kept)
    ((before, after),) = ahead
    assert not before and {name.partition("-")[0] for name in after} == {
        "jit_gradients", "jit_add", "jit_apply",
    }  # fmt: skip
    assert updates() == after


FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."


def fails(*_, **__):
    raise JaxRuntimeError(f"{FULL}\nand more")


@pytest.mark.parametrize(
    "stage, remat, advice",
    [
        ("generate", "full", "Lower rollout.prefill_rows (now 4), rollout.slots (now 8); `selm"),
        ("train", "none", "Set training.remat: full. Finished work is kept"),
        ("train", "full", "Lower training.rows (now 2), training.logprob_chunk (now 32); `selm"),
        ("rank", "full", "Set a smaller batch for the ranker (feedback.settings). Finished"),
        ("export", "full", "Close other programs, or use a machine with more memory. Finished"),
    ],
)
def test_a_stage_without_enough_memory_says_which_settings_to_lower(tmp_path, stage, remat, advice):
    e = run_of(
        tmp_path, rollout__prefill_rows=4, rollout__slots=8, training__rows=2,
        training__logprob_chunk=32, training__remat=remat,
    ).experiment  # fmt: skip
    folder = tmp_path / "run/iteration_2"
    told = f"{folder}: stage '{stage}' ran out of memory ({FULL}). {advice}"
    found = memory.out_of_memory(
        JaxRuntimeError(f"{FULL}\nand more"), stage, folder, memory.advice(stage, least(e))
    )
    assert str(found).startswith(told) and "and more" not in str(found)


@pytest.mark.parametrize(
    "stage, told",
    [
        ("generate", "as they can be: shorten the answers (rollout.max_new_tokens)"),
        ("train", "as they can be: train adapters (`lora`)"),
    ],
)
def test_sizes_that_are_the_least_are_not_to_be_lowered(stage, told):
    found = memory.advice(stage, LEAST)
    assert told in found and "Lower" not in found and "Finished work is kept" in found


@pytest.mark.slow_except("training")
@pytest.mark.parametrize(
    "place, stage, now, then",
    [
        ("selm_jax.rollout.engine.Engine.generate", "evaluate", {}, {"rollout__slots": 4}),
        (
            "selm_jax.training.loop.train", "train",
            {"training__remat": "none"}, {"training__remat": "full"},
        ),
    ],
    ids=["generation", "training"],
)  # fmt: skip
def test_a_run_without_enough_memory_goes_on_as_its_error_says(
    tmp_path, monkeypatch, place, stage, now, then
):
    one = {"iterations": 1, "training__learning_rate": 1e-3}
    with monkeypatch.context() as full:
        full.setattr(place, fails)
        with pytest.raises(memory.OutOfMemory, match=f"stage '{stage}'.*the same command"):
            iterate(run_of(tmp_path, **one, **now))
    smaller = run_of(tmp_path, **one, **then)
    iterate(smaller)
    assert smaller.wanted.did["train", 1]
