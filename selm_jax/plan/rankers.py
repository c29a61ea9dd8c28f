"""Builds the programs of rankers that are models (PairRM, reward models) without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from selm_jax.config import Experiment, Feedback
from selm_jax.feedback.models import pairrm, reward_model
from selm_jax.feedback.models.settings import Needs, batch_in, checked_dtype
from selm_jax.models import deberta, flops
from selm_jax.models.decoder import abstract_params
from selm_jax.models.families import read_config as read_decoder
from selm_jax.parallel.alone import own_devices
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, partition, row_shardings, shardings
from selm_jax.plan.topology import Target
from selm_jax.policy.sizes import room_of
from selm_jax.preferences.layouts import Part, parts
from selm_jax.preferences.packing import Shape, empty
from selm_jax.shell.memory import shard_bytes
from selm_jax.weights.deberta import LARGE, PairRMConfig, dtypes, read_config
from selm_jax.weights.facts import config_json
from selm_jax.weights.sources import SourceError

MODELS = ("pairrm", "reward_model")


@dataclasses.dataclass(frozen=True)
class Ranker:
    """The program of a ranker on the devices of one process.

    Attributes:
      params, inputs: abstract arrays.
      stays: whether the parameters stay in memory after ranking.
      read: computes the tokens and FLOPs for one prompt from (prompt, response, candidates).
      batch: the rows of 512 tokens that a device computes at once.
    """

    name: str
    function: Any
    params: Any
    inputs: tuple[Any, ...]
    stays: bool
    devices: int
    read: Any
    batch: int


def rankers_of(e: Experiment, target: Target) -> tuple[Ranker, ...]:
    """Builds the rankers of an experiment that are models; a mixture may have several of them.

    Raises:
      SourceError: if the config.json of a reward model cannot be loaded.
    """
    found = [_build(e, name, settings, target) for name, settings in _models(e.feedback)]
    several = {r.name for r in found if [other.name for other in found].count(r.name) > 1}
    return tuple(
        dataclasses.replace(r, name=f"{r.name} {n}") if r.name in several else r
        for n, r in enumerate(found, 1)
    )


def _models(f: Feedback) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for part in _parts(f):
        if part["ranker"] in MODELS:
            yield part["ranker"], part.get("settings", {})


def _parts(f: Feedback) -> Iterator[Mapping[str, Any]]:
    """Yields the settings of the ranker and of all parts of a mixture, including nested parts."""
    todo: list[Mapping[str, Any]] = [{"ranker": f.ranker, "settings": f.settings}]
    while todo:
        part = todo.pop(0)
        yield part
        if part["ranker"] == "mixture":
            todo += part.get("settings", {}).get("parts", [])


def is_relative(f: Feedback) -> bool:
    """Says whether the ranker's scores only compare the candidates of one prompt."""
    return any(
        part["ranker"] == "pairrm"
        or part.get("normalise", "none") != "none"
        or (part["ranker"] == "judge" and part.get("settings", {}).get("form") != "pointwise")
        for part in _parts(f)
    )


def _build(e: Experiment, name: str, settings: Mapping[str, Any], target: Target) -> Ranker:
    kind = checked_dtype(name, settings.get("dtype", "auto"), target.on_cpu)
    if name == "pairrm":
        return _pairrm(settings, target, kind)
    return _reward_model(e, settings, target, kind)


def _batch(name: str, settings: Mapping[str, Any], needs: Needs, target: Target) -> int:
    room = room_of(target.hbm, target.hbm_from, target.devices[0].platform).bytes
    return batch_in(name, settings.get("batch"), needs, room, target.on_cpu)


def _pairrm(settings: Mapping[str, Any], target: Target, kind) -> Ranker:
    folder = Path(str(settings.get("folder", "")))
    here = (folder / "config.json").exists()
    config = read_config(folder) if here else PairRMConfig(LARGE)  # the published one
    mesh = make_mesh((-1, 1, 1), own_devices(target.devices))
    budget = config.source_tokens + 2 * config.candidate_tokens
    boxed = deberta.abstract_params(config.encoder, config.tasks)
    params = jax.tree.map(
        lambda x, dtype, where: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where),
        nn.unbox(boxed), dtypes(config.encoder, config.tasks, kind),
        shardings(boxed, mesh, TRAINING),
    )  # fmt: skip

    needs = pairrm.needs(config, kind, shard_bytes(params), target.on_cpu)
    batch = _batch("pairrm", settings, needs, target)
    part = _longest(budget, mesh, batch)

    def read(prompt: int, response: int, candidates: int) -> tuple[int, float]:
        pairs = candidates * (candidates - 1)
        time = min(prompt + 2 * response, budget)
        return pairs * time, pairs * flops.encoder(config.encoder, rows=1, time=time)

    inputs = (_ints(mesh, part.rows, part.time), _ints(mesh, part.rows), _ints(mesh, part.rows, 3))
    function = pairrm.program(config, kind, on_cpu=target.on_cpu)
    return Ranker("PairRM", function, params, inputs, True, mesh.size, read, batch)


def _reward_model(e: Experiment, settings: Mapping[str, Any], target: Target, kind) -> Ranker:
    file = config_json(settings["source"], settings.get("revision"))
    facts = read_decoder(file.parent)
    if facts.head is None:
        raise SourceError(
            f"{file}: the ranker's model has no head, so it is not a reward model. Name a reward "
            "model in the ranker's `source`"
        )
    most = settings.get("max_length") or reward_model.positions(facts)
    config = facts.for_length(most)
    axes = [
        settings.get(axis, default) for axis, default in (("data", 1), ("fsdp", -1), ("tensor", 1))
    ]
    mesh = make_mesh(axes, own_devices(target.devices))
    r, c = e.rollout, e.candidates
    longest = min(r.max_prompt_tokens + r.max_new_tokens, most)
    batch = _batch("reward_model", settings, reward_model.needs(config, kind, mesh), target)
    part = _longest(max(longest, reward_model.TOGETHER), mesh, batch)
    boxed = abstract_params(config)
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, kind, sharding=where),
        nn.unbox(boxed), shardings(boxed, mesh, TRAINING),
    )  # fmt: skip
    candidates = c.greedy + c.samples + 2 * c.dataset
    branches = 1 << (candidates - 1).bit_length()
    largest = empty(Shape(part.rows, part.time, part.time, 1, branches))
    inputs = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        largest, row_shardings(largest, mesh),
    )  # fmt: skip

    def read(prompt: int, response: int, candidates: int) -> tuple[int, float]:
        tokens = prompt + candidates * response
        work = flops.forward(config, rows=1, time=tokens, keys=tokens, scored=0)
        return tokens, work.total

    function = reward_model.program(config, kind, mesh).rewards
    return Ranker("reward model", function, params, (inputs,), False, mesh.size, read, batch)


def _longest(tokens: int, mesh: jax.sharding.Mesh, batch: int) -> Part:
    """Makes a full batch of texts with the maximum length."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    many = [tokens] * (devices * batch)
    return next(parts(many, devices, batch))


def _ints(mesh: jax.sharding.Mesh, *shape: int) -> jax.ShapeDtypeStruct:
    axes = ("rows", None)[: len(shape)]
    where = partition("batch", axes, shape, mesh, TRAINING)
    return jax.ShapeDtypeStruct(shape, np.int32, sharding=where)
