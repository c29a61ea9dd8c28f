"""Faults of a server: it dies, has another version, or its context is too short."""

from __future__ import annotations

import json
import re
import sys

import forked
import pytest
import stand_in
import tiny
from rich.console import Console
from served import FOLDER, client, command, no_long_waits, own_cache  # noqa: F401

from selm_jax import config
from selm_jax.iterate import iterate, run_stage
from selm_jax.rollout import remote, server_log
from selm_jax.rollout.requests import Request
from selm_jax.run.run import Run
from selm_jax.shell.endpoint import ServerError

QUIET = Console(quiet=True)
REQUESTS = [Request(i, (5, 6), 1, 1) for i in range(20)]
CRASH = (
    "ERROR engine.py:5|Traceback (most recent call last):|  File x|RuntimeError: {}|"
    + "|".join(f"nanobind: leaked function {i}" for i in range(100))
)


def mortal(tmp_path, answers, words):
    port = forked.free_port()
    parts = f"{sys.executable} {stand_in.__file__} vllm {{model}} {port} --dies {answers} '{words}'"
    # Nobody waits between tries here, so that many are made before its end is seen.
    return command(tmp_path, parts, port, concurrency=1, retries=10**6)


@pytest.mark.parametrize("answers", [0, 3, 11])
def test_a_server_that_dies_is_noticed_and_named(tmp_path, answers):
    policy = mortal(tmp_path, answers, CRASH.format("out of luck"))
    with policy, pytest.raises(ServerError) as caught:
        policy.generate(REQUESTS, seed=0, iteration=1)
    text = str(caught.value)
    assert "rollout.remote.command ended with status 7" in text
    assert str(tmp_path / "server.log") in text and "nanobind: leaked function 99" in text
    assert "first fault of a request was HTTP status 500: " in text and "EngineCore" in text
    line = (tmp_path / "server.log").read_text().splitlines().index("RuntimeError: out of luck")
    assert f"in line {line + 1}: RuntimeError: out of luck" in text
    assert policy.tries.failures == 0  # no request was tried to the end


def test_the_log_of_an_earlier_start_is_not_blamed(tmp_path):
    (tmp_path / "server.log").write_text("RuntimeError: of yesterday\n" * 3)
    policy = mortal(tmp_path, 0, CRASH.format("of today"))
    with policy, pytest.raises(ServerError, match="RuntimeError: of today") as caught:
        policy.generate(REQUESTS, seed=0, iteration=1)
    assert "yesterday" not in str(caught.value)


def test_vllms_crash_on_a_cpu_has_its_way_out(tmp_path):
    words = CRASH.format("CPU Generator does not use offset")
    policy = mortal(tmp_path, 0, words)
    with policy, pytest.raises(ServerError, match="--max-num-batched-tokens"):
        policy.generate(REQUESTS, seed=0, iteration=1)


def test_the_first_fault_is_in_the_error(serving):
    """Of a server that was not started here; the last fault alone would say nothing of it."""
    calls = iter(range(100))
    server = serving("vllm", FOLDER)
    server.answer = lambda body: (500, "CUDA is gone") if next(calls) == 0 else (503, "loading")
    with client(server, concurrency=1, retries=2) as policy, pytest.raises(ServerError) as caught:
        policy.generate(REQUESTS[:1], seed=0, iteration=1)
    assert re.search(
        r"503.*try 3 of at most 3; the first fault was .*CUDA is gone", str(caught.value)
    )


def test_the_error_is_short_for_a_long_log(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"\xff" * 10**6 + b"\nValueError: here\n" + b"line\n" * 50_000)
    text = server_log.story(log)
    assert "line 2: ValueError: here" in text and len(text) < 6000


# --- what it serves -------------------------------------------------------------------------------


@pytest.mark.parametrize(("longest", "refused"), [(13, True), (14, False), (None, False)])
def test_a_context_that_is_too_short_is_found_before_a_word_is_asked(serving, longest, refused):
    server = serving("vllm", FOLDER)
    server.longest = longest  # the longest prompt has 8 tokens, an answer 6
    policy = client(server)
    if not refused:
        with policy:
            return
    with (
        pytest.raises(ServerError, match="13 tokens .*together are 14.*--max-model-len 14"),
        policy,
    ):
        pass
    assert not server.bodies


def experiment(tmp_path, server, **changes):
    settings = {"engine": "vllm", "url": server.url, "start_seconds": 5}
    return tiny.experiment(
        tmp_path, iterations=1, data__limit=4, data__heldout_limit=2,
        training__learning_rate=[1e-3], rollout__remote=settings, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"longest": 20}, "context of 20 tokens"),
        ({"engine": "sglang"}, "is a server of sglang|does not answer like vllm"),
    ],
)
def test_what_is_there_already_is_looked_at_before_any_work(serving, tmp_path, change, message):
    """The held-out answers of the start model come first, which no server gives."""
    server = serving("vllm", "/models/the one before")
    vars(server).update(change)
    run = Run(config.load(experiment(tmp_path, server)), QUIET)
    with pytest.raises(ServerError, match=message):
        iterate(run)
    assert not run.folder.iteration(0).exists()


def test_the_servers_version_is_in_the_manifest(serving, tmp_path):
    server = serving("vllm", None)
    file = experiment(tmp_path, server)
    server.folder = remote.named(tmp_path / "model")
    run_stage(Run(config.load(file), QUIET), "generate", 1)
    again = Run(config.load(file), QUIET)  # it asks nobody, and knows it still
    run_stage(again, "generate", 1)
    manifest = json.loads((again.folder.path / "manifest.json").read_text())
    assert manifest["servers"] == {"1": "vllm 0.0.1"}
