"""The policy's implicit reward against log-probabilities in double precision, and in a run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.feedback.models.implicit_reward import implicit_reward
from selm_jax.feedback.ranker import FeedbackError, Question, build_ranker, for_policy
from selm_jax.iterate import iterate
from selm_jax.models.decoder import Decoder
from selm_jax.models.families import read_config
from selm_jax.run.run import Run
from selm_jax.tables import heldout, ranked
from selm_jax.text.chat import Chat, Message
from selm_jax.weights.huggingface import load

QUIET = Console(quiet=True)
BETA, PENALTY = 0.3, 0.01


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("implicit")
    return tuple(tiny.make_model(folder / name, seed) for seed, name in enumerate("ab"))


def question(text, id):
    return Question(text, (Message("user", text),), {}, id)


def test_scores_are_those_of_double_precision(folders):
    questions = [question("Sell a boat.", "p0"), question("Why?", "p1")]
    candidates = [["A good boat.", "", "A good boat."], ["Because it is so, mostly. ☂"]]
    ranker = implicit_reward(str(folders[1]), beta=BETA, length_penalty=PENALTY)
    with pytest.raises(FeedbackError, match="outside of a run there is no policy"):
        ranker.scores(questions, candidates)
    found = for_policy(ranker, folders[0], None).scores(questions, candidates)

    chat = Chat(folders[0], config.Text(), read_config(folders[0]).vocab_size)

    def logp(folder, messages, text):
        facts = read_config(folder)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), load(folder, facts))
        prompt = chat.prompt_ids(messages)
        answer = chat.response_ids(messages, text) if text else chat.stop_ids[:1]
        tokens = np.array([prompt + answer])
        at = np.arange(tokens.shape[1])[None]
        hidden, _ = Decoder(facts, jnp.float64).apply({"params": params}, tokens, at)
        table = jax.nn.log_softmax(hidden[0] @ params["embedding"].T)[len(prompt) - 1 : -1]
        assert table.dtype == jnp.float64
        return float(np.asarray(table)[np.arange(len(answer)), answer].sum())

    for q, texts, scores in zip(questions, candidates, found, strict=True):
        for text, score in zip(texts, scores, strict=True):
            with jax.enable_x64(True):
                gap = logp(folders[0], q.messages, text) - logp(folders[1], q.messages, text)
            assert score == pytest.approx(BETA * gap - PENALTY * len(text), abs=1e-4)
    assert found[0][0] == found[0][2] != found[0][1]


def test_a_mixture_hands_the_policy_on_and_a_named_policy_stays(folders):
    part = {"ranker": "implicit_reward", "settings": {"reference": str(folders[1])}}
    mixture = build_ranker("mixture", parts=[part, {"ranker": "length"}])
    bound = for_policy(mixture, folders[0], None)
    assert bound.folders == folders and mixture.folders == folders[1:]
    named = implicit_reward(str(folders[1]), policy=str(folders[1]))
    assert for_policy(named, folders[0], None) is named


@pytest.mark.slow
def test_a_policy_ranks_its_own_answers_for_two_iterations(tmp_path, folders):
    settings = {"reference": str(folders[1]), "beta": BETA, "length_penalty": PENALTY}
    file = tiny.experiment(
        tmp_path, feedback={"ranker": "implicit_reward", "settings": settings},
        candidates={"greedy": 1, "samples": 3, "dataset": False}, keep_models="last", iterations=3,
        training__learning_rate=1e-2,
    )  # fmt: skip
    run = Run(config.load(file), QUIET)
    iterate(run)
    assert [t for t in run.iterations if run.folder.model(t).exists()] == [3]
    for t in run.iterations:
        rows = ranked.read(run.folder.iteration(t) / "ranked.parquet")
        assert len({row.score for row in rows}) > len(rows) // 2
        assert tiny.counts_of(run, "rank", t)["pairs"] > 0
    kept = Run(
        dataclasses.replace(run.experiment, keep_models="all", output=str(tmp_path / "all")), QUIET
    )
    iterate(kept)
    rows = [
        r for r in ranked.read(kept.folder.iteration(3) / "ranked.parquet") if r.finish == "stop"
    ]
    policy, reference = (
        build_ranker("implicit_reward", **settings | {"policy": str(kept.folder.model(t))})
        for t in (2, 1)
    )
    assert policy.folders[0] != reference.folders[0]
    oracle = dataclasses.replace(policy, reference=kept.folder.model(1))
    prompts = {p.id: p for p in kept.prompts(3)}
    for row in rows[:6]:
        asked = Question("", prompts[row.prompt_id].messages, {}, row.prompt_id)
        ((score,),) = oracle.scores([asked], [[row.text]])
        assert score == pytest.approx(row.score, abs=1e-4)
    held = heldout.read(kept.folder.iteration(3) / "heldout.parquet")
    assert np.isnan([row.score for row in held]).all()
