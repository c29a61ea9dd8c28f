"""A policy that nobody gave slots chooses them from memory, and takes fewer where it runs out."""

from __future__ import annotations

import pytest
from jax.errors import JaxRuntimeError
from tiny import PROMPTS

from selm_jax.parallel import multihost
from selm_jax.policy import fitting, sizes
from selm_jax.policy.policy import Batches, numbered
from selm_jax.rollout.engine import Engine
from selm_jax.text.conversations import Message

FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."


@pytest.fixture
def engines(monkeypatch) -> list[tuple[int, int]]:
    """The slots and prefill rows of each call; engines of more than two slots run out of memory."""
    found = []
    generate = Engine.generate

    def limited(self, params, requests, *, progress, **rest):
        found.append((self.slots, self.prefill_rows))
        if self.slots > 2:
            progress(3, 30)
            raise JaxRuntimeError(FULL)
        return generate(self, params, requests, progress=progress, **rest)

    monkeypatch.setattr(Engine, "generate", limited)
    return found


def asked(policy, count: int = 4):
    prompts = policy.prompt_ids([[Message("user", text)] for text in PROMPTS[:count]])
    return numbered(prompts, greedy=1, samples=1)


def with_room(monkeypatch, count: int, note: str = "") -> None:
    monkeypatch.setattr(sizes, "room", lambda _: sizes.Room(count, "a test", note))


def test_slots_follow_the_answers_and_the_memory(build, monkeypatch):
    def chosen(policy, requests) -> tuple[int, int]:
        found = []

        def only_seen(self, *_, **__):
            found.append((self.slots, self.prefill_rows))
            return []

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "generate", only_seen)
            policy.answer(requests, max_new_tokens=6)
        return found[0]

    said = []
    with_room(monkeypatch, 2**34, "little is free")
    policy = build(say=said.append)
    requests = asked(policy)
    assert chosen(policy, requests) == (8, 4) == chosen(policy, requests)
    assert said[0] == "little is free" and len(said) == 2
    assert said[1].startswith("tiny: slots 8, prefill rows 4 (8 answers to prompts of ")
    assert "a test" in said[1]
    with_room(monkeypatch, 1)
    assert chosen(build(), requests) == (1, 1)
    assert chosen(build(batches=Batches(5, 3)), requests) == (5, 3)
    assert chosen(build(batches=Batches(slots=5)), requests) == (5, 1)


def test_fewer_are_drawn_together_after_memory_has_run_out(build, monkeypatch, engines):
    with_room(monkeypatch, 2**34)
    said, advanced = [], []
    policy = build(say=said.append)
    requests = asked(policy)
    found = policy.answer(
        requests, max_new_tokens=6, progress=lambda n, tokens=0: advanced.append((n, tokens))
    )
    assert found == build(batches=Batches(2, 2)).answer(requests, max_new_tokens=6)
    assert sum(n for n, _ in advanced) == 8 == len(found)
    assert sum(tokens for _, tokens in advanced) == sum(len(r.tokens) for r in found)
    tried = [slots for slots, _ in engines[:-1]]
    assert tried[0] == 8 and tried[-1] <= 2 and tried == sorted(tried, reverse=True)
    assert sum("memory ran out" in line for line in said) == len(tried) - 1
    policy.answer(requests, max_new_tokens=6)
    assert engines[-1] == engines[len(tried) - 1], "it was not remembered"


@pytest.mark.parametrize("why", ["given", "another error", "several processes", "nothing left"])
def test_what_cannot_be_survived_passes(build, monkeypatch, engines, why):
    with_room(monkeypatch, 1 if why == "nothing left" else 2**34)
    policy = build(batches=Batches(8, 4) if why == "given" else Batches())
    if why == "several processes":
        monkeypatch.setattr(multihost, "count", lambda: 2)
        monkeypatch.setattr(multihost, "on_every", lambda work: [work()])
    if why in ("another error", "nothing left"):

        def fails(*_, **__):
            engines.append((0, 0))
            raise JaxRuntimeError("INTERNAL" if why == "another error" else FULL)

        monkeypatch.setattr(Engine, "generate", fails)
    with pytest.raises(JaxRuntimeError, match="INTERNAL|RESOURCE_EXHAUSTED"):
        policy.answer(asked(policy), max_new_tokens=6)
    assert len(engines) == 1


def test_all_processes_choose_for_the_least_memory(monkeypatch):
    with_room(monkeypatch, 10)
    monkeypatch.setattr(multihost, "on_every", lambda work: [work(), work() | {"bytes": 7}])
    assert fitting.Fitting("tiny", {}, print)._room.bytes == 7
