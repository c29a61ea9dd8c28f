"""A real vLLM that serves a tiny policy gives the answers that `rollout.remote` promises."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.config import Remote
from selm_jax.iterate import run_stage
from selm_jax.models.decoder import Decoder, Params
from selm_jax.preferences.examples import Example
from selm_jax.rollout.gap import gap_of
from selm_jax.rollout.remote import Server, named
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling, probabilities
from selm_jax.run.run import Run
from selm_jax.shell.endpoint import ServerError
from selm_jax.tables.responses import files, read

pytestmark = pytest.mark.servers
QUIET = Console(quiet=True)
NEW = 16  # tokens of an answer
ROUNDING = 1e-4  # nats, in float32


class Here(NamedTuple):
    """The policy in this process: a run whose answers come from the engine here."""

    run: Run
    params: Params
    file: Path

    def answers(self, requests, **changes):
        """The engine's answers; `changes` are fields of the engine."""
        engine = dataclasses.replace(self.run.programs.engine, **changes)
        decoding = self.run.programs.decoding(self.params)
        return engine.generate(decoding, requests, seed=0, iteration=1)


@pytest.fixture(scope="module")
def here(models, tmp_path_factory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("run")
    model = models(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELM_CACHE", str(folder / "cache"))
        # vLLM takes these for what a request does not say, unless it gets --generation-config vllm.
        defaults = model.folder / "generation_config.json"
        others = {"repetition_penalty": 1.3, "temperature": 0.6, "top_k": 3, "max_new_tokens": 4}
        defaults.write_text(json.dumps(json.loads(defaults.read_text()) | others))
        file = tiny.experiment(
            folder, model={"source": str(model.folder)}, rollout__max_new_tokens=NEW,
            rollout__temperature=0.7, rollout__top_p=0.9,
            rollout__gap={"warn": ROUNDING, "stop": ROUNDING},
        )  # fmt: skip
        run = Run(config.load(file), QUIET)
        yield Here(run, run.programs.load(run.policy(0).path), file)


@pytest.fixture(scope="module")
def client(vllm, here, tmp_path_factory) -> Iterator[Callable[..., Server]]:
    """client(...) -> a client of a vLLM that serves the policy; keywords change what it asks."""
    folder = named(here.run.policy(0).path)
    settings = vllm(forked.free_port())
    usual = {
        "longest_prompt": 64, "max_new_tokens": NEW, "stop_ids": here.run.programs.stop_ids,
        "vocabulary": here.run.programs.config.vocab_size, "sampling": Sampling(),
        "log": tmp_path_factory.mktemp("vllm") / "server.log",
    }  # fmt: skip
    with Server(Remote(**settings), folder, **usual):
        remote = Remote(engine="vllm", url=settings["url"], start_seconds=1)
        yield lambda **changes: Server(remote, changes.pop("folder", folder), **usual | changes)


def any_ids(count, longest, vocabulary, seed=0):
    """Prompts that no text is tokenised to: all ids, special ones and halves of letters too."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count, endpoint=True)
    return [tuple(rng.integers(0, vocabulary, n).tolist()) for n in lengths]


@pytest.fixture(scope="module")
def prompts(here):
    return any_ids(24, 64, here.run.programs.config.vocab_size)


def asked(server, requests, seed=0):
    with server:
        return server.generate(requests, seed=seed, iteration=1)


# --- answers --------------------------------------------------------------------------------------


def test_greedy_answers_to_ids_are_the_engines(here, client, prompts, tell):
    requests = [Request(i, ids, 1, 0) for i, ids in enumerate(prompts)]
    server = client()
    found = asked(server, requests)
    assert found == here.answers(requests, max_prompt=64)
    assert server.version.startswith("vllm 0.") and server.tries.retries == 0
    tell("real servers", f"{server.version}: {len(found)} greedy answers equal to the engine's")


def test_answers_end_at_any_stop_token_and_at_the_bound(here, client, prompts):
    requests = [Request(i, ids, 1, 1) for i, ids in enumerate(prompts)]
    first = asked(client(), requests)
    stops = tuple({response.tokens[5] for response in first[:8] if len(response.tokens) > 6})
    changes = {"stop_ids": stops, "max_new_tokens": 9}
    found = asked(client(**changes), requests)
    for response in found:
        *before, last = response.tokens
        assert not set(before) & set(stops)
        assert response.finish == ("stop" if last in stops else "length")
        assert len(response.tokens) == 9 or response.finish == "stop"
    assert {response.finish for response in found} == {"stop", "length"}
    greedy = [dataclasses.replace(request, samples=0) for request in requests]
    assert [r for r in found if r.greedy] == here.answers(greedy, max_prompt=64, **changes)


def test_the_same_seed_gives_the_same_samples(client, prompts):
    requests = [Request(i, ids, 0, 3) for i, ids in enumerate(prompts)]
    first, again = (asked(client(), requests, seed=1) for _ in range(2))
    assert first == again
    other = asked(client(), requests, seed=2)
    differ = [a.tokens != b.tokens for a, b in zip(first, other, strict=True)]
    assert sum(differ) > 0.9 * len(differ)
    of_one_prompt = [r.tokens for r in first if r.index == 0]
    assert len(set(of_one_prompt)) == 3


def test_drawn_tokens_pass_the_filters(here, client, prompts, all_logits):
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05)
    found = asked(client(sampling=sampling), [Request(i, p, 0, 2) for i, p in enumerate(prompts)])
    p = allowed(here, found, prompts, all_logits, sampling)
    chosen = [each[np.arange(len(r.tokens)), r.tokens] for each, r in zip(p, found, strict=True)]
    assert sum(map(len, chosen)) > 300
    assert min(each.min() for each in chosen) > 0
    ranks = [(each > own[:, None]).sum(-1) for each, own in zip(p, chosen, strict=True)]
    assert max(each.max() for each in ranks) > 1, "they are drawn, and not the likeliest alone"


def allowed(here, found, prompts, all_logits, sampling):
    """The filtered probabilities of all tokens at each place of each answer, computed here."""
    rows = [(*prompts[r.index], *r.tokens) for r in found]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    logits = all_logits(Decoder(here.run.programs.config), here.params, jnp.asarray(tokens))
    p = jax.vmap(lambda each: probabilities(each, sampling))(logits)
    return [
        np.asarray(each[len(prompts[r.index]) - 1 :][: len(r.tokens)])
        for each, r in zip(p, found, strict=True)
    ]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9)])
def test_log_probabilities_are_the_scorers(here, client, prompts, sampling, tell):
    found = asked(client(sampling=sampling), [Request(i, p, 1, 2) for i, p in enumerate(prompts)])
    examples = [
        Example(f"{r.index}-{r.sample}", prompts[r.index], (r.tokens,), {"chosen": 0})
        for r in found
    ]
    scored = here.run.programs.scorer.logps_by_token(here.params, examples)
    gap = gap_of(
        (np.array(r.logps), of_scorer) for r, (_, (of_scorer,)) in zip(found, scored, strict=True)
    )
    assert gap.tokens == sum(len(r.tokens) for r in found)
    assert gap.largest < ROUNDING
    tell(
        "real servers",
        f"log-probabilities of {gap.tokens} tokens at temperature {sampling.temperature:g}: mean "
        f"{gap.mean:.1e}, largest {gap.largest:.1e}, K3 {gap.k3:.1e}",
    )


def test_a_run_has_the_same_greedy_answers_and_no_gap(here, client, tmp_path):
    url = client().settings.url
    settings = [f"output={tmp_path}/run", f"rollout.remote={{engine: vllm, url: '{url}'}}"]
    run = Run(config.load(here.file, settings), QUIET)
    for each in (here.run, run):
        run_stage(each, "generate", 1)
    expected, found = (greedy_rows(each) for each in (here.run, run))
    assert found == expected and len(found) == 16
    for stage in ("rank", "score"):
        run_stage(run, stage, 1)
    (line,) = run.folder.logged("score", 1)
    assert line["gap/largest"] < ROUNDING


def greedy_rows(run):
    rows = [row for file in files(run.folder.iteration(1) / "responses") for row in read(file)]
    return [dataclasses.replace(row, logps=None) for row in rows if row.kind == "greedy"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"longest_prompt": 1280}, "context of 1,280 tokens"),
        ({"folder": "another"}, "served/[0-9a-f]{64}. Start the server"),
    ],
)
def test_another_policy_or_too_short_a_context_is_refused(client, tmp_path, changes, message):
    if "folder" in changes:
        changes = {"folder": tmp_path / "another"}
    with pytest.raises(ServerError, match=message), client(**changes):
        pass


def test_another_kind_of_server_is_named(client):
    server = client()
    server.settings = dataclasses.replace(server.settings, engine="sglang")
    with pytest.raises(ServerError, match="is a server of vllm"), server:
        pass
