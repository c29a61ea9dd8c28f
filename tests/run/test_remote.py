"""Answers from a server: requests, accepted answers, the served policy, and how the server ends."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pyarrow.parquet as pq
import pytest
import stand_in
import tiny
from rich.console import Console
from served import FOLDER, client, command, no_long_waits, own_cache  # noqa: F401

from selm_jax import config
from selm_jax.config import Remote
from selm_jax.iterate import iterate, run_stage
from selm_jax.rollout import remote
from selm_jax.rollout.remote import Server
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.run.run import Run
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.shell.endpoint import ServerError

QUIET = Console(quiet=True)


def answers(run, t=1):
    rows = []
    for file in sorted((run.folder.iteration(t) / "responses").glob("*.parquet")):
        rows += pq.read_table(file).to_pylist()
    return rows


# --- what is asked and taken ----------------------------------------------------------------------


def test_what_vllm_is_asked(serving):
    server = serving("vllm", FOLDER)
    with client(server) as policy:
        policy.generate([Request(4, (5, 6, 7), 1, 1)], seed=3, iteration=2)
    greedy, drawn = sorted(server.bodies, key=lambda body: body["temperature"])
    same = {
        "path": "/v1/completions", "model": "policy", "prompt": [5, 6, 7], "max_tokens": 6,
        "ignore_eos": True, "stop_token_ids": [1, 2], "return_token_ids": True, "logprobs": 0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    seeds = greedy.pop("seed"), drawn.pop("seed")
    assert greedy == same | {"temperature": 0.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0}
    assert drawn == same | {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05}
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**31 for seed in seeds)
    server.bodies.clear()
    with client(server, seeds=False) as policy:
        policy.generate([Request(4, (5, 6, 7), 1, 1)], seed=3, iteration=2)
    assert sorted(server.bodies, key=lambda body: body["temperature"]) == [greedy, drawn]


def test_what_sglang_is_asked(serving):
    server = serving("sglang", FOLDER)
    with client(server) as policy:
        policy.generate([Request(4, (5, 6, 7), 0, 1)], seed=3, iteration=2)
    (body,) = server.bodies
    assert body == {
        "path": "/generate",
        "input_ids": [5, 6, 7],
        "return_logprob": True,
        "sampling_params": {
            "max_new_tokens": 6, "stop_token_ids": [1, 2], "temperature": 0.7, "top_k": 20,
            "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        },
    }  # fmt: skip


@pytest.mark.parametrize("engine", remote.DIALECTS)
@pytest.mark.parametrize(
    ("said", "tokens", "finish"),
    [
        (([9, 8, 1], "stop", None), (9, 8, 1), "stop"),  # with its end
        (([9, 8], "stop", 2), (9, 8, 2), "stop"),  # without
        (([9] * 6, "length", None), (9,) * 6, "length"),
        (([1], "stop", 1), (1,), "stop"),
        (([9, 9, 9, 9, 9, 2], "length", None), (9, 9, 9, 9, 9, 2), "stop"),  # with the last it may
    ],
)
def test_answers_have_their_end_whatever_the_server_likes(serving, engine, said, tokens, finish):
    tell = getattr(stand_in, engine)
    server = serving(engine, FOLDER, answer=lambda body: (200, tell(*said)))
    with client(server) as policy:
        (response,) = policy.generate([Request(0, (5,), 1, 0)], seed=0, iteration=1)
    assert (response.tokens, response.finish) == (tokens, finish)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (200, stand_in.vllm([9], "stop", 7)),
            "finished (stop, by token 7); expected 6 tokens, or",
        ),
        ((200, stand_in.vllm([9, 9], "length")), "Check that the server's context is long enough"),
        ((200, stand_in.vllm([9], "abort")), "finished (abort"),
        ((200, stand_in.vllm(None)), "use a vLLM version that has `return_token_ids`"),
        ((200, stand_in.vllm([320, 1])), "beyond the model's 320 tokens"),
        ((200, {"choices": []}), "not in the format of vllm"),
        ((400, {"message": "maximum context length is 4"}), "maximum context length is 4"),
        ((400, {"message": "JAX does not support per-request seed."}), "remote.seeds: false"),
    ],
)
def test_a_malformed_answer_is_refused(serving, answer, message):
    server = serving("vllm", FOLDER, answer=lambda body: answer)
    with client(server, retries=1) as policy, pytest.raises(ServerError, match=re.escape(message)):
        policy.generate([Request(0, (5,), 1, 0)], seed=0, iteration=1)
    again = "not in the format" in message
    assert len(server.bodies) == 1 + again, "what another try would not mend is not tried again"
    assert policy.tries.retries == again


def test_a_temporary_fault_is_retried_and_order_is_kept(serving):
    failed = set()

    def answer(body):
        first = body["prompt"][0]
        if first in failed:
            return stand_in.some_letters(body)
        failed.add(first)
        return 503, {}

    server = serving("vllm", FOLDER, answer=answer)
    with client(server, concurrency=3) as policy:
        found = policy.generate([Request(i, (i + 9,), 1, 2) for i in range(8)], seed=0, iteration=1)
    assert [(r.index, r.sample) for r in found] == [(i, s) for i in range(8) for s in range(3)]
    assert len(server.bodies) == 24 + 8


@pytest.mark.parametrize(
    ("engine", "sampling", "kept"),
    [
        ("vllm", Sampling(), (True, True)),
        ("vllm", Sampling(0.7), (True, False)),
        ("vllm", Sampling(top_p=0.9), (True, False)),
        ("sglang", Sampling(), (True, True)),
        ("sglang", Sampling(0.7), (False, True)),
        ("sglang", Sampling(top_p=0.9), (True, False)),
    ],
)
def test_only_logps_of_a_known_distribution_are_kept(serving, engine, sampling, kept):
    """vLLM tells those before temperature and filters, SGLang those between the two."""
    tell = getattr(stand_in, engine)
    answer = 200, tell([9, 8], "stop", 2, logps=[-0.5, -1.5])  # without that of its end
    server = serving(engine, FOLDER, answer=lambda body: answer)
    with client(server) as policy:
        policy.sampling = sampling
        greedy, drawn = policy.generate([Request(0, (5,), 1, 1)], seed=0, iteration=1)
    assert repr(greedy.logps) == "(-0.5, -1.5, nan)" and greedy.sampled_logps is None
    assert (drawn.logps is not None, drawn.sampled_logps is not None) == kept


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run whose first iteration's answers come from the engine here."""
    file = tiny.experiment(tmp_path_factory.mktemp("local"))
    run = Run(config.load(file), QUIET)
    run_stage(run, "generate", 1)
    return run, file


@pytest.mark.parametrize("engine", remote.DIALECTS)
def test_the_server_answers_what_the_engine_here_would(serving, local, tmp_path, engine):
    """It holds the same model: greedy answers are the same ids, text and ends."""
    here, file = local
    params = here.programs.decoding(here.programs.load(here.policy(0).path))
    one = threading.Lock()

    def answer(body):
        with one:
            (r,) = here.programs.engine.generate(
                params, [Request(0, tuple(stand_in.prompt_of(body)), 1, 0)], seed=0, iteration=1
            )
        return 200, getattr(stand_in, engine)(list(r.tokens), r.finish, None, r.logps)

    server = serving(engine, remote.named(here.policy(0).path), answer=answer)
    settings = f"rollout.remote={{engine: {engine}, url: '{server.url}'}}"
    run = Run(config.load(file, [f"output={tmp_path}/run", settings]), QUIET)
    run_stage(run, "generate", 1)
    expected, found = (
        [row for row in answers(each) if row["kind"] == "greedy"] for each in (here, run)
    )
    assert found == expected and len(found) == 16


@pytest.mark.slow
def test_a_run_starts_a_server_for_each_policy_and_ends_it(tmp_path):
    port = forked.free_port()
    file = tiny.experiment(
        tmp_path,
        rollout__remote={
            "engine": "vllm",
            "url": f"http://127.0.0.1:{port}",
            "command": f"{sys.executable} {stand_in.__file__} vllm {{model}} {port}",
        },
    )
    run = Run(config.load(file), QUIET)
    iterate(run)
    served = re.findall(
        r"serving (.*) as process (\d+)", (run.folder.path / "server.log").read_text()
    )
    assert [folder for folder, _ in served] == [
        str(remote.named(run.policy(t).path)) for t in (0, 1)
    ]
    assert [os.path.realpath(folder) for folder, _ in served] == [
        os.path.realpath(run.policy(t).path) for t in (0, 1)
    ]
    assert not [pid for _, pid in served if Path(f"/proc/{pid}").exists()]
    assert all(row["token_ids"][-1] in run.chat.stop_ids for t in (1, 2) for row in answers(run, t))
    iterate(run)  # done already: no server is started
    assert (run.folder.path / "server.log").read_text().count("serving") == 2


def test_parts_that_are_there_are_not_asked_for_again(serving, local, tmp_path):
    here, file = local
    asked = []

    def answer(body):
        asked.append(tuple(body["prompt"]))
        return (400, {}) if len(asked) > 20 else stand_in.some_letters(body)

    server = serving("vllm", remote.named(here.policy(0).path), answer=answer)
    overrides = [
        f"output={tmp_path}/run",
        f"rollout.remote={{engine: vllm, url: '{server.url}', concurrency: 1}}",
    ]
    with pytest.raises(ServerError, match="HTTP status 400"):
        run_stage(Run(config.load(file, overrides), QUIET), "generate", 1)
    server.answer = stand_in.some_letters
    server.bodies.clear()
    overrides.append("rollout.remote.concurrency=5")  # how it is asked may change
    run = Run(config.load(file, overrides), QUIET)
    run_stage(run, "generate", 1)
    assert len(server.bodies) == 3 * (16 - 6), "the first part of 6 prompts was there"
    assert len({row["prompt_id"] for row in answers(run)}) == 16
    with pytest.raises(ArtifactError, match="rollout.remote was 'vllm' and is now None"):
        run_stage(Run(config.load(file, overrides[:1]), QUIET), "generate", 1)


# --- whom it serves, and how it ends --------------------------------------------------------------


def test_a_run_waits_until_the_server_serves_the_policy(serving):
    server, said = serving("vllm", None), []
    policy = client(server, start_seconds=60)

    def say(text):
        said.append(text)
        server.folder = "/models/another"
        threading.Timer(0.1, setattr, (server, "folder", FOLDER)).start()

    policy._say = say
    with policy:
        pass
    waits = f"waiting for {server.url} to serve {FOLDER}"
    port = f"--port {server.server_port}"
    assert [text.partition("; ")[0] for text in said] == [waits] * len(said)
    assert "nothing answers there now. Start it, for example with: vllm serve" in said[0]
    assert port in said[0]
    assert len(said) < 3 and all("it serves /models/another now" in text for text in said[1:])


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (None, "nothing answers there. Start the server, for example with: vllm serve"),
        ("/models/another", "it serves /models/another. Start the server, for example"),
        ("models/policy", "it serves models/policy"),  # of whatever folder it stands in
        ("/models/policy/.", "it serves /models/policy/."),
    ],
)
def test_answers_of_another_model_are_never_used(serving, folder, message):
    policy = client(serving("vllm", folder))
    with pytest.raises(ServerError, match=re.escape(message)), policy:
        pass


def test_the_same_folder_with_other_bytes_is_another_policy(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("one")
    one = remote.named(folder)
    assert remote.named(folder) == one and (one / "weights").read_text() == "one"
    (folder / "weights").write_text("other")
    assert remote.named(folder) != one


def test_a_server_that_has_another_model_by_now_is_not_asked_for_the_next_part(serving):
    server, requests = serving("vllm", FOLDER), [Request(0, (5,), 1, 0)]
    with client(server) as policy:
        policy.generate(requests, seed=0, iteration=1)
        server.folder = "/models/another"
        with pytest.raises(ServerError, match="it serves /models/another"):
            policy.generate(requests, seed=0, iteration=1)


def test_no_proxy_is_used_for_this_machine(serving, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("no_proxy", raising=False)
    with client(serving("vllm", FOLDER)) as policy:
        assert policy.generate([Request(0, (5,), 1, 0)], seed=0, iteration=1)


def test_another_kind_of_server_is_named(serving):
    policy = client(serving("vllm", FOLDER), engine="sglang", start_seconds=600)
    with pytest.raises(ServerError, match="is a server of vllm, .*engine is sglang"), policy:
        pass  # at once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sh -c 'echo out of memory; exit 3' {model}", "ended with status 3"),
        ("sh -c 'echo out of memory; kill -9 $$' {model}", "ended with status 137"),
        ("vlmm serve {model}", "vlmm: No such file"),
    ],
)
def test_the_error_shows_the_last_output_of_a_command_that_ended(tmp_path, text, message):
    with pytest.raises(ServerError, match=message) as caught, command(tmp_path, text):
        pass
    assert "out of memory" in str(caught.value) or "vlmm" in str(caught.value)


def test_a_server_that_is_there_already_is_not_taken_for_the_commands(serving, tmp_path):
    server = serving("vllm", FOLDER)
    policy = command(tmp_path, "sh -c 'sleep 60' {model}", server.server_port)
    with (
        pytest.raises(
            ServerError, match=r"already answers at .*, before .* \(it serves /models/policy\)"
        ),
        policy,
    ):
        pass


def test_the_server_of_a_killed_run_is_waited_for_until_all_of_it_has_ended(tmp_path, monkeypatch):
    """Its port is closed, but a child of it still holds what it had: memory, say."""
    port, go = forked.free_port(), tmp_path / "go"
    serve = f"{sys.executable} {stand_in.__file__} vllm {FOLDER} {port}"
    log = tmp_path / "server.log"
    left = f"trap '' TERM; while [ ! -e {go} ]; do sleep 0.02; done"
    with log.open("ab") as file:
        lingering = subprocess.Popen(["sh", "-c", left], stdout=file)
        fcntl.flock(file, fcntl.LOCK_EX)  # as the run that started it did
    policy = command(tmp_path, serve + " {model}", port)
    with pytest.raises(ServerError, match="has not ended after 0.1 s; its output is"), policy:
        pass
    monkeypatch.setattr(remote, "_BEFORE_SECONDS", 60)
    threading.Timer(0.2, go.touch).start()
    with command(tmp_path, serve + " {model}", port):
        assert lingering.wait(10) == 0


def test_a_command_that_serves_another_model_is_found_out(tmp_path):
    port = forked.free_port()
    text = f"{sys.executable} {stand_in.__file__} vllm /models/another {port}"
    policy = command(tmp_path, text + " {model}", port)
    with (
        pytest.raises(
            ServerError, match="serves /models/another, but rollout.remote.command should"
        ),
        policy,
    ):
        pass


def test_a_server_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_TERMINATE_SECONDS", 0.2)
    port, file = forked.free_port(), tmp_path / "pids"
    serve = f"{sys.executable} {stand_in.__file__} vllm {FOLDER} {port}"
    script = f"trap '' TERM; sleep 600 & echo $$ $! > {file}; {serve}; sleep 600"
    with command(tmp_path, f"sh -c {json.dumps(script)} {{model}}", port):
        pids = [int(pid) for pid in file.read_text().split()]
        assert all(map(running, pids))
    assert not any(map(running, pids))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_the_process_that_started_it(tmp_path, number):
    file = tmp_path / "pid"
    code = (
        "import sys, time\nfrom selm_jax.shell import processes\n"
        f"command = ['sh', '-c', 'echo $$ > {file}; exec sleep 600']\n"
        "processes.start(command, open('/dev/null', 'wb'))\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        until = time.monotonic() + 60
        while not (file.exists() and file.read_text().strip()) and time.monotonic() < until:
            time.sleep(0.02)
        pid = int(file.read_text())
        assert running(pid)
        process.send_signal(number)
    while running(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_settings_that_cannot_be(tmp_path):
    file = tiny.experiment(tmp_path, rollout__remote={"engine": "vllm", "concurrency": 0})
    with pytest.raises(
        config.ConfigError, match="rollout.remote.concurrency: 0, a whole number from 1"
    ):
        config.load(file)
    with pytest.raises(config.ConfigError, match="rollout.remote.adress: unknown key"):
        config.load(file, ["rollout.remote={engine: vllm, adress: x}"])
    for text, message in (
        ("vllm serve", "expected a program and {model}"),
        ("vllm serve '{model}", "No closing quotation"),
        ("", "expected a program"),
    ):
        with pytest.raises(config.ConfigError, match=re.escape(message)):
            config.load(file, ["rollout.remote.concurrency=1", f'rollout.remote.command="{text}"'])
    for wrong, message in (
        ("url: ftp://x", "expected http"),
        ("key_env: NO_SUCH_KEY", "NO_SUCH_KEY"),
    ):
        run = Run(config.load(file, [f"rollout.remote={{engine: vllm, {wrong}}}"]), QUIET)
        with pytest.raises(ServerError, match=message):
            iterate(run)
        assert not (run.folder.path / "iteration_0").exists(), "before any work"
    with pytest.raises(ServerError, match="rollout.remote.url contains a user name"):
        Server(
            Remote(engine="vllm", url="http://me:secret@host"), FOLDER, log=tmp_path / "log",
            sampling=Sampling(), longest_prompt=1, max_new_tokens=1, stop_ids=(1,),
                vocabulary=2,
        )  # fmt: skip


@pytest.mark.slow
def test_of_two_processes_one_asks_and_one_dead_server_ends_both(serving, tmp_path):
    file = tiny.experiment(tmp_path, output="run", iterations=1, training__learning_rate=1e-3)
    server = serving("vllm", remote.named(tmp_path / "model"))
    override = f"rollout.remote={{engine: vllm, url: '{server.url}', retries: 0, concurrency: 4}}"

    def go(name, devices, processes):
        run = forked.Selm(
            ["run", file, override], folder=tmp_path / name, cache=tmp_path / "cache",
            devices=devices, processes=processes, log=tmp_path / f"{name}.log",
        )  # fmt: skip
        return run.wait(300), run.output()

    assert go("one", 1, 1)[0] == [0]
    once = len(server.bodies)
    server.answer = lambda body: (400, {"message": "out of blocks"})
    statuses, output = go("two", 4, 2)
    assert statuses == [1, 1] and output.count("out of blocks") >= 2
    server.answer = stand_in.some_letters
    server.bodies.clear()
    assert go("two", 4, 2)[0] == [0, 0]
    assert len(server.bodies) == once
    one, two = (
        sorted((tmp_path / name / "run/iteration_1/responses").iterdir()) for name in ("one", "two")
    )
    assert [each.read_bytes() for each in one] == [each.read_bytes() for each in two]
