"""An opened model: answers and scores equal full forward passes, in any batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny import PROMPTS, experiment

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.model import Model, find, open_model
from selm_jax.models.decoder import Decoder
from selm_jax.parallel.mesh import make_mesh
from selm_jax.policy.policy import PolicyError, numbered
from selm_jax.preferences.examples import Example
from selm_jax.shell import artifacts
from selm_jax.text.conversations import Message
from selm_jax.weights.huggingface import load

ASKED = [[Message("user", text)] for text in PROMPTS[:9]]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Of many lengths, so that several buckets and packed rows are needed."""
    rng = np.random.default_rng(0)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(int(x) for x in rng.integers(0, 256, rng.integers(1, most)))

    sizes = [(20, 8), (120, 40), (400, 60)]
    return [
        Example(
            str(i), ids(sizes[i % 3][0]), tuple(ids(sizes[i % 3][1]) for _ in range(1 + i % 3)), {}
        )
        for i in range(24)
    ]


def test_statistics_are_those_of_each_sequence_alone(model, examples, all_logits):
    found = model.statistics(examples)
    params = load(model.folder.path, model.config)
    rows = np.zeros((sum(len(e.responses) for e in examples), 512), np.int32)
    both = [(e.prompt, r, s) for e, f in zip(examples, found, strict=True)
            for r, s in zip(e.responses, f, strict=True)]  # fmt: skip
    for row, (prompt, response, _) in zip(rows, both, strict=True):
        row[: len(prompt) + len(response)] = (*prompt, *response)
    table = all_logits(Decoder(model.config), params, jnp.asarray(rows))
    logps = np.asarray(jax.nn.log_softmax(table))
    entropy = -np.sum(np.exp(logps) * logps, axis=-1)
    best = np.asarray(table.argmax(-1))
    for row, (prompt, response, got) in enumerate(both):
        at = len(prompt) - 1 + np.arange(len(response))
        np.testing.assert_allclose(got.logprob, logps[row, at, response], atol=2e-5)
        np.testing.assert_allclose(got.entropy, entropy[row, at], atol=2e-5)
        assert (got.likeliest == (best[row, at] == response)).all()
    for sums, each in zip(model.logps(examples), found, strict=True):
        assert sums == pytest.approx([float(x.logprob.sum()) for x in each], abs=1e-4)


def test_eight_devices_score_as_one(model, examples):
    wide = Model(
        model.found, model.folder, text=model.text, mesh=make_mesh((2, 2, 2)),
        dtype=model.dtype, held=None, batches=model.batches, console=model.console,
    )  # fmt: skip
    for a, b in zip(wide.logps(examples), model.logps(examples), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_an_answer_depends_on_seed_prompt_and_sample_alone(model, folders):
    how = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95, "samples": 2}
    whole = model.reply(ASKED, **how, seed=5)
    few = open_model(str(folders[0]), slots=2, console=Console(quiet=True))
    assert few.reply(ASKED[::-1][:4], **how, seed=5) == whole[::-1][:4]
    assert model.reply(ASKED, **how, seed=6) != whole
    assert all(a != b for a, b in whole)
    greedy = model.reply(ASKED, max_new_tokens=8, temperature=0)
    assert [len(x) for x in greedy] == [1] * len(ASKED)
    with pytest.raises(PolicyError, match="one answer"):
        model.reply(ASKED, max_new_tokens=8, temperature=0, samples=2)


def test_an_end_in_the_text_ends_a_response_early(model):
    prompts = model.prompt_ids(ASKED)
    requests = numbered(prompts, greedy=1, samples=0)
    whole = model.answer(requests, max_new_tokens=64)
    end = whole[0].tokens[2]
    got = model.answer(requests, max_new_tokens=64, ended=lambda ids: end in ids)
    for a, b in zip(got, whole, strict=True):
        assert a.tokens == b.tokens[: len(a.tokens)]
        assert (a.finish == "ended") == (end in a.tokens and len(a.tokens) < len(b.tokens))
    assert len(got[0].tokens) < 64


def test_too_long_a_conversation_is_named(model):
    with pytest.raises(PolicyError, match=r"sequence 1 may have .* reads at most 512"):
        model.reply([ASKED[0], [Message("user", "river " * 600)]], max_new_tokens=8)


def test_a_run_is_its_last_model(tmp_path):
    experiment(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((tmp_path / "experiment.yaml").read_text())
    (run / "manifest.json").write_text("{}")
    with pytest.raises(EvaluationError, match="no model of iteration 1; finished iterations: 0"):
        find(str(run))
    assert find(str(run), iteration=0).source == str(tmp_path / "model")
    for t, done in ((1, True), (2, True), (3, False)):
        folder = run / f"iteration_{t}"
        folder.mkdir()
        artifacts.Stages(folder).begin("export", {}, {})
        if done:
            artifacts.Stages(folder).finish("export", {}, {}, {}, {}, 0.0)
    last = find(str(run))
    assert (last.name, last.source) == ("run/iteration_2", str(run / "iteration_2" / "model"))
    assert dataclasses.asdict(find(str(run), iteration=1))["name"] == "run/iteration_1"
    with pytest.raises(EvaluationError, match="not a run folder"):
        find(str(tmp_path / "model"), iteration=1)
