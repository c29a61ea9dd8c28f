"""A run's sizes are chosen once, kept in its folder, and lowered where memory runs out."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import yaml
from jax.errors import JaxRuntimeError
from rich.console import Console

from selm_jax import config
from selm_jax.feedback import ranker as rankers
from selm_jax.feedback.models.settings import Batch, reported
from selm_jax.iterate import iterate
from selm_jax.models.config import DecoderConfig, Heads, LayerKind, Rope
from selm_jax.parallel import multihost
from selm_jax.policy import sizes
from selm_jax.report.header import facts
from selm_jax.rollout.engine import Engine
from selm_jax.run import sizes as of_run
from selm_jax.run.check import check
from selm_jax.run.memory import OutOfMemory
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell.shared_stages import SharedStages
from selm_jax.stages import stage as stages
from selm_jax.stages.stage import stage
from selm_jax.training import loop

AUTO = {
    **{key.replace(".", "__"): "auto" for key in sizes.KEYS.values()},
    "iterations": 1, "training__learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture
def told(monkeypatch):
    """What a run prints; its devices are the first one."""
    tiny.on_first_device(monkeypatch)
    return Console(record=True, width=400)


def run_of(folder, console=None, **changes) -> Run:
    file = tiny.experiment(folder, **AUTO | changes)
    return Run(config.load(file), console or Console(quiet=True), devices=jax.devices()[:1])


def manifest(folder) -> dict:
    return json.loads((folder / "run/manifest.json").read_text())


def with_room(monkeypatch, count: int, note: str = "") -> None:
    monkeypatch.setattr(sizes, "room", lambda _: sizes.Room(count, "a test", note))


def finish(run) -> None:
    """Records a stage as done."""
    stages = artifacts.Stages(run.folder.iteration(0))
    stages.begin("evaluate", {}, {})
    stages.finish("evaluate", {}, {}, {}, {}, 0.0)


def test_what_was_chosen_is_told_recorded_and_kept(tmp_path, told, monkeypatch):
    run = run_of(tmp_path, told)
    check(run)
    run.open()
    first = manifest(tmp_path)
    line = run.sizes.line
    assert line in told.export_text() and "rollout.slots" in line and "in reserve" in line
    assert set(first["sizes"]) == set(sizes.KEYS.values())
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["rollout"]["slots"] == written["training"]["rows"] == "auto"
    assert first["sizes"]["rollout.slots"] >= 16
    on_page = dict(facts({}, first))["Batch sizes"]
    assert f"rollout.slots {first['sizes']['rollout.slots']}" in on_page and "GiB" in on_page

    finish(run)
    with_room(monkeypatch, 1)
    again = run_of(tmp_path)
    assert again.programs.batches == run.programs.batches
    again.open()
    assert manifest(tmp_path)["sizes"] == first["sizes"]
    other = run_of(tmp_path / "other")
    assert other.programs.batches == dataclasses.replace(sizes.LEAST)
    numbers = run_of(tmp_path / "numbers", rollout__slots=5)
    assert numbers.programs.batches.slots == 5
    assert "rollout.slots" not in numbers.sizes.line


def test_a_run_that_began_with_numbers_goes_on_with_them(finished_run, tmp_path, told):
    """As folders of earlier versions did, whose defaults were numbers."""
    shutil.copytree(finished_run / "run", tmp_path / "run")
    auto = [f"{key}=auto" for key in sizes.KEYS.values()]
    overrides = [f"output={tmp_path / 'run'}", *auto]
    again = Run(config.load(finished_run / "experiment.yaml", overrides), told)
    iterate(again)
    assert not again.wanted.worked
    assert (again.programs.batches.slots, again.programs.batches.rows) == (8, 8)


def test_the_runs_of_a_sweep_agree_whatever_is_free(tmp_path, told, monkeypatch):
    store = SharedStages(tmp_path / "store")
    first, other = (run_of(tmp_path / name, told) for name in ("a", "b"))
    first.store = other.store = store
    with_room(monkeypatch, 2**28)
    chosen = first.sizes.sizes
    with_room(monkeypatch, 1)
    assert other.sizes.sizes == chosen
    assert run_of(tmp_path / "c").sizes.sizes == sizes.LEAST


def test_a_sweep_forgets_a_room_that_is_no_longer_true(tmp_path, monkeypatch):
    store, device = SharedStages(tmp_path / "store"), jax.devices()[0]

    def found(count: int, note: str, whole: int = 100) -> sizes.Room:
        with_room(monkeypatch, count, note)
        monkeypatch.setattr(sizes, "whole_room", lambda _: whole)
        return of_run.room_in(store, device)

    assert found(10, "little is free").note == "little is free"
    kept = found(5, "less is free")
    assert (kept.bytes, kept.note) == (10, ""), "the note was said of another run"
    assert found(90, "").bytes == 90, "other programs were closed"
    assert found(5, "little is free").bytes == 90
    assert found(40, "", whole=50).bytes == 40, "this machine is smaller"


def test_all_processes_get_the_least_room(monkeypatch):
    def on_every(work):
        mine = work()
        return [mine, mine | {"bytes": 7} if isinstance(mine, dict) else mine]

    with_room(monkeypatch, 10)
    monkeypatch.setattr(multihost, "on_every", on_every)
    assert of_run.room_in(None, jax.devices()[0]).bytes == 7


def test_sizes_are_chosen_again_until_a_stage_is_done(tmp_path, told, monkeypatch):
    """The note says to free memory and to start again."""
    with_room(monkeypatch, 1)
    run = run_of(tmp_path, told)
    run.open()
    artifacts.Stages(run.folder.iteration(0)).begin("evaluate", {}, {})
    with_room(monkeypatch, 2**33)
    assert run_of(tmp_path).sizes.sizes.slots > run.sizes.sizes.slots == 1
    finish(run)
    assert run_of(tmp_path).sizes.sizes == run.sizes.sizes


def test_a_run_that_moves_to_more_devices_rounds_its_sizes_up(tmp_path, told):
    choice = run_of(tmp_path, told, rollout__prefill_rows=3).sizes
    assert choice.generation is not None
    choice = dataclasses.replace(
        choice, training=dataclasses.replace(choice.training, ways=4),
        generation=dataclasses.replace(choice.generation, copies=2),
    )  # fmt: skip
    before = {"rollout.slots": 5, "training.rows": 1, "training.logprob_chunk": 33}
    kept = choice.kept({"sizes": before, "sizes_chosen_for": "one device"}).sizes
    assert (kept.slots, kept.prefill_rows, kept.rows, kept.chunk) == (6, 3, 4, 33)


def test_two_models_of_a_mixture_leave_room_for_fewer_slots(tmp_path, told):
    """The engine holds both, and each slot has a cache of both."""
    mixture = {"rollout__mixture": {"kind": "pilaf", "weight": 10.0}}
    one = run_of(tmp_path / "one", told, data__heldout=None).sizes
    two = run_of(tmp_path / "two", told, data__heldout=None, **mixture).sizes
    assert one.generation is not None and two.generation is not None
    assert two.generation.held == 2 * one.generation.held
    assert two.generation.slot > 1.8 * one.generation.slot
    room = two.generation.held + 40 * one.generation.slot
    slots = [
        sizes.choose(each.generation, each.training, room, "cpu", {}).slots for each in (one, two)
    ]
    assert slots[1] < slots[0]


def test_shards_of_a_whole_cycle_of_layers_are_gathered():
    """One step of the scan computes a cycle, so that memory for two layers would be too little."""
    kinds = {False: LayerKind(Rope(1e4), 5), True: LayerKind(Rope(1e4), None, Heads(2, 16, True))}
    for cycle, layers in ((1, 2), (2, 2), (6, 6)):
        full = [i % cycle == cycle - 1 for i in range(12)]
        model = DecoderConfig(
            vocab_size=96, embed=32, mlp=64, heads=4, kv_heads=2, head_dim=8, norm_eps=1e-5,
            tied=True, max_positions=512, architecture="Gemma4ForCausalLM",
            kinds=tuple(kinds[each] for each in full),
        )  # fmt: skip
        assert model.cycle == cycle
        assert of_run.gathered(model, 96 * 32 + 12 * 1000) == 96 * 32 + layers * 1000


def test_an_evaluation_gives_up_what_takes_the_most(tmp_path, told):
    choice = run_of(tmp_path, told).sizes
    assert choice.generation is not None
    small = dataclasses.replace(choice.generation, slot=1, row=1)
    less = dataclasses.replace(choice, generation=small).smaller("evaluate")
    assert less is not None and less.sizes.slots == choice.sizes.slots
    assert less.sizes.rows < choice.sizes.rows or less.sizes.chunk < choice.sizes.chunk
    large = dataclasses.replace(choice.generation, slot=2**40)
    less = dataclasses.replace(choice, generation=large).smaller("evaluate")
    assert less is not None and less.sizes.slots < choice.sizes.slots


@stage(leaves=("rows.txt",), settings=("training.rows",))
def told_rows(step):
    (step.folder / "rows.txt").write_text("done")
    return {"rows": step.programs.batches.rows}


def test_runs_with_other_automatic_sizes_share_their_stages(tmp_path, told, monkeypatch):
    """Objectives with more roles have longer rows, and so fewer of them."""
    runs = []
    for name, count in (("a", 2**33), ("b", 1)):
        with_room(monkeypatch, count)
        runs.append(run_of(tmp_path / name, told))
        runs[-1].store = SharedStages(tmp_path / "store" / name)
        _ = runs[-1].sizes
    runs[1].store = runs[0].store
    for run in runs:
        told_rows(run, 1)
    assert runs[0].sizes.sizes.rows > runs[1].sizes.sizes.rows
    assert tiny.counts_of(runs[1], "told_rows", 1) == {"rows": runs[0].sizes.sizes.rows}


def full(*_, **__) -> Any:
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")


def test_a_stage_is_done_again_with_less_until_nothing_is_left(tmp_path, told, monkeypatch):
    slots = []

    def engine(self, *_, **__):
        slots.append((self.slots, self.prefill_rows))
        raise KeyboardInterrupt if len(slots) > 2 else full()

    monkeypatch.setattr(Engine, "generate", engine)
    run = run_of(tmp_path, told)
    run.open()
    with pytest.raises(KeyboardInterrupt):
        tiny.do(run, "generate", 1)
    said = told.export_text()
    assert said.count("generate ran out of memory, so rollout.") == 2 == len(slots) - 1
    kept = manifest(tmp_path)
    assert (kept["sizes"]["rollout.slots"], kept["sizes"]["rollout.prefill_rows"]) == slots[2]
    assert len(kept["sizes_lowered"]) == 2
    monkeypatch.setattr(Engine, "generate", full)
    again = run_of(tmp_path / "again", rollout__slots=2, training__rows=1)
    again.open()
    with pytest.raises(OutOfMemory, match=r"rollout.prefill_rows \(now 1\)"):
        tiny.do(again, "evaluate", 0)
    assert again.programs.batches.slots == 2


@pytest.mark.slow
def test_a_stage_that_runs_out_of_memory_goes_on_with_less(tmp_path, told, monkeypatch):
    """The engine and the update fail at their first sizes; the run remembers what fits."""
    plain = run_of(tmp_path / "plain", rollout__slots=8, training__rows=4)
    iterate(plain)
    first = run_of(tmp_path).programs.batches
    generate, train = Engine.generate, loop.train

    def engine(self, *given, **named):
        small = self.slots < first.slots and self.prefill_rows < first.prefill_rows
        return (generate if small else full)(self, *given, **named)

    def update(plan, made, state, *given, **named):
        return (train if run.programs.batches.remat == "full" else full)(
            plan, made, state, *given, **named
        )

    monkeypatch.setattr(Engine, "generate", engine)
    monkeypatch.setattr("selm_jax.stages.train.loop.train", update)
    run = run_of(tmp_path, told)
    iterate(run)
    said = told.export_text()
    assert "evaluate ran out of memory, so rollout." in said
    assert "train ran out of memory, so training.remat dots" in said
    assert "train ran out of memory, so training.remat full" in said
    kept = manifest(tmp_path)
    assert (
        kept["sizes"]["rollout.slots"] < first.slots and kept["sizes"]["training.remat"] == "full"
    )
    assert len(kept["sizes_lowered"]) >= 4
    again = run_of(tmp_path)
    assert again.programs.batches == run.programs.batches
    iterate(again)
    assert not again.wanted.worked
    losses = [
        [
            line["loss"]
            for line in map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for folder in (tmp_path, tmp_path / "plain")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) > 3


def test_a_number_of_the_user_is_never_lowered(tmp_path, told, monkeypatch):
    monkeypatch.setattr(Engine, "generate", full)
    given = {"rollout__slots": 8, "rollout__prefill_rows": 4, "training__rows": 8}
    given |= {"training__remat": "full", "training__logprob_chunk": 32}
    with pytest.raises(OutOfMemory, match=r"Lower rollout.prefill_rows \(now 4\)"):
        iterate(run_of(tmp_path, told, **given))
    assert manifest(tmp_path)["sizes"] == {} == artifacts.Stages(tmp_path / "x").read()


class OfTwo:
    """`multihost` as a process of two sees it, except that nothing waits for the other one."""

    count = staticmethod(lambda: 2)

    def __getattr__(self, name):
        return getattr(multihost, name)


def test_one_of_several_processes_notes_smaller_sizes_for_the_next_start(
    tmp_path, told, monkeypatch
):
    """The other one may wait for it in a collective, so it cannot go on with other sizes."""
    monkeypatch.setattr(Engine, "generate", full)
    monkeypatch.setattr(stages, "multihost", OfTwo())
    run = run_of(tmp_path, told)
    run.open()
    before = run.sizes.sizes
    with pytest.raises(
        OutOfMemory, match=r"notes for its next start: generate .* so rollout\."
    ) as e:
        tiny.do(run, "generate", 1)
    assert "The same command continues" in str(e.value) and "Lower" not in str(e.value)
    after = run_of(tmp_path, told).sizes
    assert after.sizes == run.sizes.sizes != before and len(after.lowered) == 1
    monkeypatch.setattr(multihost, "is_first", lambda: False)
    with pytest.raises(OutOfMemory, match="set smaller sizes in the experiment"):
        tiny.do(run, "generate", 1)


class Halved:
    """A ranker whose batch of 16 rows does not fit."""

    name = "halved"

    def __init__(self):
        self.batches, self.counts = (Batch(16, fixed=False),), Counter[str]()

    def scores(self, questions, candidates):
        def work(rows: int) -> list[np.ndarray]:
            return (
                full() if rows > 4 else [np.arange(len(each), dtype=float) for each in candidates]
            )

        return self.batches[0].fitting(work, self.counts)

    def report(self):
        return reported(self.counts, [])


def test_a_run_remembers_the_batch_of_its_ranker(tmp_path, told, monkeypatch):
    monkeypatch.setattr(rankers, "build_ranker", lambda *_, **__: Halved())
    run = run_of(tmp_path, told)
    run.open()
    tiny.do(run, "generate", 1)
    tiny.do(run, "rank", 1)
    assert manifest(tmp_path)["ranker_batches"] == [4]
    lowered = ["rank: the ranker ran out of memory, so its batch 4"]
    assert manifest(tmp_path)["sizes_lowered"] == lowered
    assert lowered[0] in dict(facts({}, manifest(tmp_path)))["Batch sizes"]
    again = run_of(tmp_path, told)
    assert again.ranker.ranker.batches[0].rows == 4
    again.open()
    assert manifest(tmp_path)["ranker_batches"] == [4]
    assert manifest(tmp_path)["sizes_lowered"] == lowered


LIMITED = """
import resource, sys
from pathlib import Path
import jax
from rich.console import Console
from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.run import Run

e = config.load(Path(sys.argv[1]))
whole = Run(e, Console(quiet=True)).sizes.sizes
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
run = Run(e, Console(width=400))
print("whole", whole.remat, "limited", run.sizes.sizes.remat)
iterate(run)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to RLIMIT_AS")
def test_a_run_with_little_memory_takes_smaller_sizes_and_ends(tmp_path):
    """To keep what 64 layers compute for the backward pass takes more than the limit leaves."""
    file = tiny.experiment(
        tmp_path, **AUTO, objective={"loss": "dpo", "beta": 0.1}, training__row_length=1024,
        candidates={"greedy": 0, "samples": 0, "dataset": True},
        data={"train": str(tmp_path / "pairs.jsonl"), "chosen": "chosen", "rejected": "rejected"},
    )  # fmt: skip
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n} " * 9, "rejected": "No."} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.make_model(tmp_path / "deep", layers=64, embed=64, mlp=1600)
    tree = yaml.safe_load(file.read_text()) | {"model": {"source": str(tmp_path / "deep")}}
    file.write_text(yaml.safe_dump(tree))
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(file), str(3 * 2**30)], capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "whole none limited full" in ended.stdout or "whole none limited dots" in ended.stdout
    assert "left of this process's limit (ulimit -v)" in ended.stdout
    assert artifacts.Stages(tmp_path / "run/iteration_1").read()["train"]["done"]
