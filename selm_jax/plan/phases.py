"""The programs of an experiment, as its run makes them, from facts alone.

`Blueprint` is the run itself with three things taken from the settings in place of files: the model's
config.json, the longest prompt, the ids that end an answer. Meshes, rules, shardings, the jitted
functions: all are the run's own, so that what is planned is what runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.config import Experiment
from selm_jax.feedback import pairrm
from selm_jax.models import deberta
from selm_jax.models.config import DecoderConfig
from selm_jax.models.quantize import quantize
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, partition, shardings
from selm_jax.plan.measure import shard_bytes
from selm_jax.plan.topology import Target
from selm_jax.preferences.examples import ROLES
from selm_jax.preferences.packing import PreferenceBatch, Shape, empty
from selm_jax.rollout.engine import Programs, decoding_params, decoding_shardings, programs
from selm_jax.run import Run
from selm_jax.training.state import TrainState
from selm_jax.weights.deberta import LARGE, PairRMConfig, dtypes, read_config

GENERATE, RANK, SCORE, TRAIN = "generate", "rank", "score", "train"


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program, and what lies on each device beside its arguments while it runs.

    Attributes:
      stage: of the iteration, in whose settings a remedy is to be looked for.
      function, arguments: the run's own jitted function, and abstractly what the run gives it.
      held: bytes on a device by what they are.
    """

    name: str
    stage: str
    function: Any
    arguments: tuple[Any, ...]
    held: Mapping[str, int]

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.arguments)


class Blueprint(Run):
    """A run of which nothing is here but its settings and its model's facts."""

    def __init__(self, experiment: Experiment, facts: DecoderConfig, target: Target):
        super().__init__(experiment, devices=target.devices)
        self._given, self.target = facts, target

    @cached_property
    def _facts(self) -> DecoderConfig:
        return self._given

    @cached_property
    def longest_prompt(self) -> int:
        return self.experiment.rollout.max_prompt_tokens

    @cached_property
    def longest_sequence(self) -> int:
        e = self.experiment
        answered = self.longest_prompt + e.rollout.max_new_tokens
        if not self._facts.has_two_tables or not e.candidates.dataset:
            return answered
        return max(answered, e.text.max_length if e.text.layout == "paper" else 0)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (0, 1)  # which they are, and how many, changes nothing here

    # Generation

    @cached_property
    def decoding_params(self) -> Any:
        where = decoding_shardings(self.config, self.decode_mesh)
        cast = partial(decoding_params, dtype=self.dtype, where=where)
        return jax.tree.map(_placed, jax.eval_shape(cast, self.abstract_params), where)

    @cached_property
    def generation(self) -> Programs:
        return programs(self.engine, self.decoding_params)

    @cached_property
    def heldout_params(self) -> Mapping[str, int]:
        """`evaluate` keeps the parameters while it generates and ranks."""
        if self.experiment.data.heldout is None:
            return {}
        return {"parameters": shard_bytes(self.abstract_params)}

    # The ranker

    @cached_property
    def pairrm(self) -> PairRMConfig | None:
        """The PairRM among the rankers, if there is one; its published shape if it is not here."""
        settings = self._pairrm_settings
        if settings is None:
            return None
        folder = Path(str(settings.get("folder", "")))
        here = (folder / "config.json").exists()
        return read_config(folder) if here else PairRMConfig(LARGE)

    @cached_property
    def _pairrm_settings(self) -> Mapping[str, Any] | None:
        f = self.experiment.feedback
        parts = [{"ranker": f.ranker, "settings": f.settings}]
        if f.ranker == "mixture":
            parts = f.settings.get("parts", [])
        found = [p.get("settings", {}) for p in parts if p["ranker"] == "pairrm"]
        return found[0] if found else None

    @cached_property
    def pairrm_sizes(self) -> tuple[Any, int]:
        s = self._pairrm_settings or {}
        return pairrm.sizes(s.get("dtype", "auto"), s.get("batch"), on_cpu=self.target.on_cpu)

    @cached_property
    def abstract_ranker(self) -> Any:
        """PairRM's parameters as each host lays them out over its devices; None without one."""
        if (config := self.pairrm) is None:
            return None
        boxed = deberta.abstract_params(config.encoder, config.tasks)
        kinds = dtypes(config.encoder, config.tasks, self.pairrm_sizes[0])
        return jax.tree.map(
            lambda x, kind, where: jax.ShapeDtypeStruct(x.shape, kind, sharding=where),
            nn.unbox(boxed), kinds, shardings(boxed, self.ranker_mesh, TRAINING),
        )  # fmt: skip

    @cached_property
    def ranker_mesh(self) -> jax.sharding.Mesh:
        return make_mesh((-1, 1, 1), self.target.one_host)

    @cached_property
    def ranker_bytes(self) -> Mapping[str, int]:
        """A ranker is built when the run starts, and stays."""
        if self.abstract_ranker is None:
            return {}
        return {"PairRM": shard_bytes(self.abstract_ranker)}

    # Training

    @cached_property
    def batch_shape(self) -> Shape:
        """The largest that packing can ask for; `segments` counts examples of a row, and is free."""
        t = self.experiment.training
        return Shape(t.rows, t.row_length, scored=t.row_length, segments=4, branches=len(ROLES))

    @cached_property
    def abstract_batch(self) -> PreferenceBatch:
        batch = empty(self.batch_shape)
        return jax.tree.map(_placed, batch, self.batch_shardings(batch))

    @cached_property
    def abstract_start(self) -> Any:
        """What `start_of` gives: the parameters, quantised if the experiment says so."""
        if self.quantized is None:
            return self.abstract_params
        work = jax.jit(quantize, static_argnums=1)
        return outcome(work.lower(self.abstract_params, self.quantized))

    @cached_property
    def abstract_state(self) -> TrainState:
        return TrainState.abstract(self.abstract_trained, self.optimizer)

    @cached_property
    def update_arguments(self) -> tuple[Any, ...]:
        """Of `Update.gradients`, as `training.loop.train` gives them."""
        live = self.experiment.training.reference == "live"
        means = jax.ShapeDtypeStruct((len(ROLES),), np.float32)
        first = (self.abstract_trained, self.abstract_batch, means)
        if self.lora is None:
            return (*first, self.abstract_params if live else None, None, None)
        base = self.abstract_start
        key = jax.eval_shape(lambda: jax.random.key(0)) if self.lora.dropout else None
        return (*first, base if live else None, base, key)

    @property
    def beside_updates(self) -> Mapping[str, int]:
        """What `apply` is not given and training holds: a live reference, the base of adapters."""
        *_, reference, base, _ = self.update_arguments
        held = {"reference": shard_bytes(reference)} if self.lora is None and reference else {}
        return held | ({} if base is None else {"base": shard_bytes(base)})


def phases(b: Blueprint, batches: int) -> Iterator[Phase]:
    """The programs in the order in which an iteration runs them.

    Args:
      batches: packed batches of an update; with one, nothing is ever added.
    """
    e = b.experiment
    if e.candidates.greedy or e.candidates.samples or e.data.heldout is not None:
        yield from _generation(b)
    if b.pairrm is not None and not e.taught:
        yield _ranking(b)
    if not b.objective.reference_free:
        given = (b.abstract_start, b.abstract_batch)
        yield Phase("score", SCORE, b.update.logps, given, b.ranker_bytes)
    _, sums = jax.eval_shape(b.update.gradients, *b.update_arguments)
    where = b.abstract_state.step.sharding
    sums = jax.tree.map(lambda x: _placed(x, where), sums)
    # Gradients are laid out like what is trained. `add` is `gradients` and a sum: it wants more.
    grads = b.abstract_trained
    held = {**b.ranker_bytes, "moments": shard_bytes(b.abstract_state.opt_state)}
    if batches == 1:
        yield Phase("gradients", TRAIN, b.update.gradients, b.update_arguments, held)
    else:
        given = (grads, sums, *b.update_arguments)
        yield Phase("gradients + add", TRAIN, b.update.add, given, held)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    given = (b.abstract_state, grads, sums, rate)
    yield Phase("apply", TRAIN, b.update.apply, given, {**b.ranker_bytes, **b.beside_updates})


def _generation(b: Blueprint) -> Iterator[Phase]:
    """Prefill, refill, decode: `rollout.engine` in the order of its loop."""
    p = b.generation
    kept = {**b.ranker_bytes, **b.heldout_params}
    slots, waiting = {"slots": shard_bytes(p.slots)}, {"prefilled": shard_bytes(p.prefilled)}
    params = {"weights": shard_bytes(b.decoding_params)}
    yield Phase("prefill", GENERATE, *p.prefill, {**kept, **slots})
    yield Phase("refill", GENERATE, *p.insert, {**kept, **params})
    # What a prefill leaves waits until slots are free for all of it.
    yield Phase("decode", GENERATE, *p.decode, {**kept, **waiting})


def _ranking(b: Blueprint) -> Phase:
    config = b.pairrm
    assert config is not None
    kind, batch = b.pairrm_sizes
    # The longest: a source and two candidates fill the budget that they share.
    time = pairrm.padded(config.source_tokens + 2 * config.candidate_tokens)
    rows = len(b.target.one_host) * pairrm.rows_together(batch, time)

    def ints(*shape):
        axes = ("rows", None)[: len(shape)]
        where = partition("batch", axes, shape, b.ranker_mesh, TRAINING)
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=where)

    work = pairrm.program(config, kind, on_cpu=b.target.on_cpu)
    given = (b.abstract_ranker, ints(rows, time), ints(rows), ints(rows, 3))
    return Phase("rank", RANK, work, given, b.heldout_params)


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def outcome(lowered: jax.stages.Lowered) -> Any:
    """What a program gives, abstractly, where the compiler puts it."""
    where = lowered.compile().output_shardings
    return jax.tree.map(_placed, lowered.out_info, where)
