"""The tiny chat model as a policy, from plain things alone: a folder, a config, a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from tiny import make_model

from selm_jax.config import Text
from selm_jax.models.families import read_config
from selm_jax.parallel.mesh import make_mesh
from selm_jax.policy.policy import Policy
from selm_jax.text.chat import Chat
from selm_jax.weights.huggingface import load


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="session")
def build(folder):
    """build(**changes) -> a policy on one device."""
    config, mesh = read_config(folder), make_mesh((1, 1, 1), jax.devices()[:1])

    def build(**changes) -> Policy:
        chat = Chat(folder, Text(), config.vocab_size)
        plain = {
            "chat": lambda: chat, "stop_ids": lambda: chat.stop_ids, "mesh": mesh,
            "decode_mesh": mesh, "dtype": jnp.dtype("float32"),
        }  # fmt: skip
        return Policy("tiny", lambda: load(folder, config), config, **(plain | changes))

    return build
