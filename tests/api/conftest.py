"""A tiny chat model, opened by the public API."""

from __future__ import annotations

import pytest
import tiny

import selm_jax as selm

PROMPTS = tiny.PROMPTS[:6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(folder):
    """A fresh model, with nothing trained."""
    return selm.load(folder)


@pytest.fixture
def answers(model):
    return model.generate(PROMPTS, greedy=1, samples=3, max_new_tokens=12)


@pytest.fixture
def pairs(answers):
    return selm.pairs(answers, selm.ranker("length")(PROMPTS, answers))
