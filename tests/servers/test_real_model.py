"""SmolLM2-135M on a real vLLM, as policy and as judge, against the engine and the scorer here."""

from __future__ import annotations

import forked
import judged
import numpy as np
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.config import Remote
from selm_jax.feedback.judge.ranker import judge
from selm_jax.iterate import run_stage
from selm_jax.rollout.remote import Server, named
from selm_jax.rollout.sampling import Sampling
from selm_jax.run.run import Run
from selm_jax.tables.responses import files, read

pytestmark = pytest.mark.servers
ROUNDING = 2e-3  # nats: thirty layers in float32
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def local(real_model, tmp_path_factory):
    """A run of SmolLM2 whose answers come from the engine here, and its file."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        patch.setenv("SELM_CACHE", str(folder / "cache"))
        file = tiny.experiment(
            folder, model={"source": str(real_model)}, data__limit=8, data__heldout=None,
            rollout__gap={"warn": ROUNDING, "stop": ROUNDING},
        )  # fmt: skip
        yield Run(config.load(file), QUIET), file


@pytest.fixture(scope="module")
def server(vllm, local, tmp_path_factory):
    run, _ = local
    settings = Remote(**vllm(forked.free_port()))
    with Server(
        settings, named(run.policy(0).path), log=tmp_path_factory.mktemp("vllm") / "server.log",
        sampling=Sampling(), longest_prompt=64, max_new_tokens=12, stop_ids=(1,), vocabulary=2,
    ) as started:  # fmt: skip
        yield started


def test_answers_and_their_log_probabilities_are_those_here(local, server, tmp_path, tell):
    here, file = local
    url = f"rollout.remote={{engine: vllm, url: '{server.settings.url}'}}"
    run = Run(config.load(file, [f"output={tmp_path}/run", url]), QUIET)
    answers = []
    for each in (here, run):
        run_stage(each, "generate", 1)
        rows = [row for part in files(each.folder.iteration(1) / "responses") for row in read(part)]
        answers.append([(row.token_ids, row.text) for row in rows if row.kind == "greedy"])
    assert answers[0] == answers[1] and len(answers[0]) == 8
    for stage in ("rank", "score"):
        run_stage(run, stage, 1)
    (line,) = run.folder.logged("score", 1)
    tell(
        "real servers",
        f"{server.version} with SmolLM2-135M: greedy answers equal to the engine's; "
        f"log-probabilities of {line['gap/tokens']} tokens: mean {line['gap/mean']:.1e}, largest "
        f"{line['gap/largest']:.1e}, K3 {line['gap/k3']:.1e}",
    )


def test_it_judges_with_the_models_own_probabilities(local, server, tmp_path, all_logits):
    run, _ = local
    base = f"{server.settings.url}/v1"
    should = judged.expected(run, run.programs.load(run.policy(0).path), all_logits)
    found = judged.told(base, "policy", tmp_path / "cache.sqlite")
    for one, other in zip(found, should, strict=True):
        assert one.usage == other.usage
        assert judged.whole(one.logprobs[0]) == pytest.approx(other.logprobs[0], abs=ROUNDING)
    ranker = judge(
        "policy", "logprob", base_url=base, cache=str(tmp_path / "cache.sqlite"), timeout=600
    )
    scores = ranker.scores(judged.QUESTIONS, judged.CANDIDATES)
    wins = judged.wins(should)
    np.testing.assert_allclose([each[0] for each in scores], wins, atol=ROUNDING)
