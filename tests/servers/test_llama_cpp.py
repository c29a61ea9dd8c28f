"""A judge on llama.cpp's own server tells what the model itself says."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator

import forked
import httpx2
import judged
import numpy as np
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.feedback.judge.ranker import judge
from selm_jax.run.run import Run

pytestmark = pytest.mark.servers
SERVER = __file__.replace("test_llama_cpp", "llama_cpp_server")
FORMS = {"pairwise": {"max_tokens": 24}, "pointwise": {"max_tokens": 24}, "logprob": {}}


@pytest.fixture(scope="module")
def model(models):
    return models(0)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("llama_cpp") / "server.log"


@pytest.fixture(scope="module")
def start(installed, model, log) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """start(port) -> a process that serves the model there."""
    with contextlib.ExitStack() as stack:

        def at(port: int) -> subprocess.Popen[bytes]:
            command = ["env", "-u", "PYTHONPATH", str(installed("llama_cpp") / "bin/python")]
            with log.open("ab") as file:
                process = stack.enter_context(
                    subprocess.Popen(
                        [*command, SERVER, model.gguf, str(port)], stdout=file, stderr=file
                    )
                )
            stack.callback(process.kill)
            return process

        yield at


def wait_until_it_answers(port, process, log):
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx2.RequestError):
            if httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def url(start, log):
    port = forked.free_port()
    wait_until_it_answers(port, start(port), log)
    return f"http://127.0.0.1:{port}/v1"


@pytest.fixture(scope="module")
def should(model, tmp_path_factory, all_logits):
    folder = tmp_path_factory.mktemp("run")
    file = tiny.experiment(folder, model={"source": str(model.folder)})
    run = Run(config.load(file), Console(quiet=True))
    return judged.expected(run, run.programs.load(model.folder), all_logits)


def test_the_first_tokens_probabilities_are_the_models(url, log, should, tmp_path, tell):
    found = judged.told(url, "judge", tmp_path / "cache.sqlite")
    differences = []
    for one, other in zip(found, should, strict=True):
        assert one.usage == other.usage
        first, expected = judged.whole(one.logprobs[0]), other.logprobs[0]
        assert first.keys() == expected.keys() >= {"m", "M"}
        differences += [abs(first[text] - expected[text]) for text in first]
    assert max(differences) < 3e-4
    version = log.read_text().splitlines()[0]
    tell(
        "real servers",
        f"{version}: {len(differences)} log-probabilities of a judge's first tokens within "
        f"{max(differences):.1e} of those here",
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_ranker_reads_or_counts_every_answer(url, should, tmp_path, form):
    ranker = judge(
        "judge", form, base_url=url, cache=str(tmp_path / "cache.sqlite"), concurrency=2,
        **FORMS[form],
    )  # fmt: skip
    scores = ranker.scores(judged.QUESTIONS, judged.CANDIDATES)
    report = ranker.report()
    assert report["answers"] == report["requests"] == len(judged.QUESTIONS) * 2
    if form == "logprob":
        wins = judged.wins(should)
        np.testing.assert_allclose([each[0] for each in scores], wins, atol=1e-3)
        assert report["malformed"] == 0
    else:  # a random model has no verdict
        assert report["malformed"] == report["answers"]
        assert np.isnan(scores).all()


def test_a_judge_that_is_killed_and_comes_back_loses_no_answer(start, log, tmp_path):
    port = forked.free_port()
    process = start(port)
    wait_until_it_answers(port, process, log)
    ranker = judge(
        "judge", "logprob", base_url=f"http://127.0.0.1:{port}/v1", concurrency=2, backoff=0.2,
        retries=100, cache=str(tmp_path / "cache.sqlite"),
    )  # fmt: skip
    ranker.scores(judged.QUESTIONS[:1], judged.CANDIDATES[:1])
    process.kill()
    process.wait()
    start(port)  # which takes a while
    ranker.scores(judged.QUESTIONS, judged.CANDIDATES)
    report = ranker.report()
    assert report["retries"] > 0 and report["failures"] == 0
    assert report["cache_hits"] == 2 and report["answers"] == 4
