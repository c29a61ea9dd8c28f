"""A reward model gives trees in shared batches the same scores as each conversation alone."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from selm_jax.feedback.models import reward_model as module
from selm_jax.feedback.ranker import FeedbackError, Question
from selm_jax.models.config import ScalarHead
from selm_jax.models.decoder import Decoder, abstract_params, rewards
from selm_jax.models.families import read_config, to_hf
from selm_jax.text.prompts import Message
from selm_jax.weights.huggingface import load, save

QUESTIONS = [
    Question(text, (Message("user", text),), {}, f"p{i}")
    for i, text in enumerate(["Praise a river.", "Explain soup. " * 12, "Nothing?", "Hi"])
]
CANDIDATES = [
    ["", "Yes.", "No.", "Yes.", "A river runs. " * 9, "\n", "soup " * 40],
    ["Yes.", "No.", "Yes. " * 60],
    [],
    [f"{word} {n}" for word in ("A river", "soup", "No") for n in range(6)],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny chat model with a random scalar head in place of its unembedding."""
    root = tmp_path_factory.mktemp("reward")
    language = tiny.make_model(root / "language")
    config = dataclasses.replace(read_config(language), head=ScalarHead())
    params = dict(load(language, read_config(language)))
    params["score"] = 0.2 * jax.random.normal(jax.random.key(3), (1, config.embed))
    folder = tiny.make_model(root / "reward")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    save(params, config, folder)
    return folder


def one_by_one(folder, conversations) -> list[float]:
    """The slow obvious form: no tree, no other row, no padding."""
    config = read_config(folder)
    decoder, params = Decoder(config), load(folder, config)
    found = []
    for ids in conversations:
        row = jnp.asarray([ids])
        n = row.shape[1]
        hidden, _ = decoder.apply({"params": params}, row, jnp.arange(n)[None])
        found.append(float(rewards(params, hidden[0, -1])))
    return found


def test_scores_are_those_of_one_conversation_per_row(folder):
    ranker = module.reward_model(str(folder))
    found = ranker.scores(QUESTIONS, CANDIDATES)
    for question, texts, scores in zip(QUESTIONS, CANDIDATES, found, strict=True):
        ids = [ranker._ids(question, 0, text) for text in texts]
        np.testing.assert_allclose(scores, one_by_one(folder, ids), rtol=0, atol=2e-6)
    assert np.concatenate(found).std() > 0.1
    assert found[0][1] == found[0][3]  # equal texts, to the bit


def test_no_more_programs_are_compiled_than_there_are_row_lengths_and_sizes(folder, monkeypatch):
    ranker = module.reward_model(str(folder))
    seen = []
    compiled = module.program

    def watched(*of):
        read = compiled(*of)
        return read._replace(
            rewards=lambda p, batch: (
                seen.append(jax.tree.map(jnp.shape, batch)) or read.rewards(p, batch)
            )
        )

    monkeypatch.setattr(module, "program", watched)
    ranker.scores(QUESTIONS, CANDIDATES)
    shapes = {(s.tokens, s.scores) for s in seen}
    assert len(shapes) == len({s.tokens for s in seen}) <= len(seen) <= 5


def test_a_conversation_of_one_token_is_refused_by_name(folder):
    ranker = module.reward_model(str(folder), max_length=1, too_long="cut")
    with pytest.raises(FeedbackError, match="prompt 'p0'.*max_length"):
        ranker.scores(QUESTIONS, CANDIDATES)


def test_trees_hold_each_different_conversation_once(folder):
    config = read_config(folder)
    assert abstract_params(config)["score"] is not None
    rng = np.random.default_rng(0)
    many = [(5, 6, *map(int, rng.integers(0, 9, rng.integers(1, 9)))) for _ in range(40)]
    found = module.trees("q", many, config)
    read = [tree.prompt + rest for tree in found for rest in tree.responses]
    assert len(read) == len(set(read)) and set(read) == set(many)
