"""Clients of a stand-in for a vLLM or SGLang server, with short waits for tests."""

from __future__ import annotations

import os
from pathlib import Path

import forked
import pytest

from selm_jax.config import Remote
from selm_jax.rollout import remote
from selm_jax.rollout.remote import Server
from selm_jax.rollout.sampling import Sampling
from selm_jax.shell.endpoint import Endpoint

FOLDER = Path("/models/policy")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    async def no_wait(self, seconds):
        return True

    monkeypatch.setattr(Endpoint, "_still_open_after", no_wait)
    monkeypatch.setattr(remote, "_LOOK_EVERY", 0.02)
    monkeypatch.setattr(remote, "_BEFORE_SECONDS", 0.1)


def client(server, folder=FOLDER, **settings):
    settings = {"engine": server.engine, "url": server.url, "start_seconds": 0.2} | settings
    return Server(
        Remote(**settings), folder, log=Path(os.devnull), sampling=Sampling(0.7, 20, 0.9, 0.05),
        longest_prompt=8, max_new_tokens=6, stop_ids=(1, 2), vocabulary=320,
    )  # fmt: skip


def command(tmp_path, text, port=None, **settings):
    settings = {"engine": "vllm", "start_seconds": 60, "command": text} | settings
    return Server(
        Remote(url=f"http://127.0.0.1:{port or forked.free_port()}", **settings), FOLDER,
        log=tmp_path / "server.log", sampling=Sampling(), longest_prompt=8, max_new_tokens=6,
        stop_ids=(1,), vocabulary=320,
    )  # fmt: skip
