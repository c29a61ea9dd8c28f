"""Whole runs that start a real vLLM: either side is killed, or the server has other weights."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import forked
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import run_stage
from selm_jax.rollout.requests import Request
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.tables.responses import files, read

pytestmark = pytest.mark.servers
ROUNDING = 1e-4  # nats, in float32
PATIENCE = 1200  # seconds for what starts a vLLM on a busy machine


@pytest.fixture
def experiment(models, tmp_path, monkeypatch):
    """experiment(remote) -> the file of a run whose answers come slowly, in 16 parts."""
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))
    source = str(models(0).folder)

    def write(remote) -> Path:
        return tiny.experiment(
            tmp_path, model={"source": source}, data__heldout=None,
            rollout__prompts_per_part=1, rollout__max_new_tokens=24,
            rollout__gap={"warn": ROUNDING, "stop": ROUNDING},
            rollout__remote={**remote, "concurrency": 1},
        )  # fmt: skip

    return write


def parts(folder: Path, t: int) -> dict[str, bytes]:
    """The parts of iteration t's answers that are whole."""
    return {
        file.name: file.read_bytes() for file in folder.glob(f"iteration_{t}/responses/*.parquet")
    }


def when_a_part_is_there(selm, folder: Path, t: int) -> dict[str, bytes]:
    until = time.monotonic() + PATIENCE
    while not (found := parts(folder, t)):
        assert selm.running() and time.monotonic() < until, selm.output()
        time.sleep(0.01)
    return found


def of_the_server(log: Path, name: str = r"\w+") -> set[int]:
    """Its processes of all starts, by its own log: `(EngineCore pid=17) INFO ...`."""
    return {int(pid) for pid in re.findall(rf"\({name} pid=(\d+)\)", log.read_text())}


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_run_goes_on_after_either_side_was_killed(vllm, experiment, tmp_path, tell):
    folder, file = tmp_path / "run", experiment(vllm(forked.free_port()))
    log, starts = folder / "server.log", iter(range(9))

    def selm():
        return forked.Selm(
            ["run", file], folder=tmp_path, cache=tmp_path / "cache",
            log=tmp_path / f"log{next(starts)}",
        )  # fmt: skip

    # The server is killed: the run ends at once, and says so.
    run = selm()
    kept = when_a_part_is_there(run, folder, 1)
    (engine,) = of_the_server(log, "EngineCore")
    os.kill(engine, signal.SIGKILL)
    assert run.wait(PATIENCE) == [1]
    assert re.search(r"rollout\.remote\.command ended with status \d+", run.output())
    assert str(log) in run.output()
    assert 0 < len(parts(folder, 1)) < 16

    # The run is killed, in the second iteration: all of the server ends.
    run = selm()
    second = when_a_part_is_there(run, folder, 2)
    run.kill()
    until = time.monotonic() + 60
    while any(map(alive, of_the_server(log))) and time.monotonic() < until:
        time.sleep(0.1)
    assert not list(filter(alive, of_the_server(log)))
    assert len(second) < 16

    # The same command goes on from there.
    run = selm()
    assert run.wait(PATIENCE) == [0], run.output()
    for t, before in ((1, kept), (2, second)):
        assert len(parts(folder, t)) == 16 and before.items() <= parts(folder, t).items()
    assert len(set(re.findall(r"served/([0-9a-f]{64})", log.read_text()))) == 2
    versions = json.loads((folder / "manifest.json").read_text())["servers"]
    assert versions.keys() == {"1", "2"} and len(set(versions.values())) == 1

    # Each policy answered for itself, as the engine here would, and as the scorer says.
    run = Run(config.load(file), Console(quiet=True))
    for t in (1, 2):
        (line,) = run.folder.logged("score", t)
        assert line["gap/largest"] < ROUNDING
    rows = {
        row.prompt_id: row
        for part in files(folder / "iteration_2/responses")
        for row in read(part)
        if row.kind == "greedy"
    }
    requests = [
        Request(i, run.chat.prompt_ids(prompt.messages), 1, 0)
        for i, prompt in enumerate(run.prompts(2))
    ]
    params = run.programs.decoding(run.programs.load(run.policy(1).path))
    expected = run.programs.engine.generate(params, requests, seed=0, iteration=2)
    assert [rows[prompt.id].token_ids for prompt in run.prompts(2)] == [r.tokens for r in expected]
    tell(
        "real servers", f"{versions['1']}: a run went on after kill -9 of the server and of the run"
    )


def test_wrong_weights_on_the_server_stop_the_run(vllm, experiment, models, tell):
    """The server says that it serves the policy, under the path with its digest; it does not."""
    other = models(1).folder
    lies = (
        f"sh -c 'ln -sfn {other} {{{{model}}}}; exec {{program}} serve {{{{model}}}} {{options}}'"
    )
    run = Run(config.load(experiment(vllm(forked.free_port(), lies))), Console(quiet=True))
    for stage in ("generate", "rank"):
        run_stage(run, stage, 1)
    with pytest.raises(RunError, match=re.escape("more than rollout.gap.stop")):
        run_stage(run, "score", 1)
    (line,) = run.folder.logged("score", 1)
    assert line["gap/mean"] > 0.5
    tell(
        "real servers",
        f"wrong weights: mean {line['gap/mean']:.2f}, K3 {line['gap/k3']:.2f}; stopped",
    )
