"""The programs of an experiment, as its run makes them, from facts alone.

`Blueprint` is the run itself with three things taken from the settings in place of files: the model's
config.json, the longest prompt, the ids that end an answer. Meshes, rules, shardings, the jitted
functions: all are the run's own, so that what is planned is what runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.config import Experiment
from selm_jax.models.config import DecoderConfig
from selm_jax.models.quantize import quantize
from selm_jax.plan.measure import shard_bytes
from selm_jax.plan.rankers import Ranker, rankers_of
from selm_jax.plan.topology import Target
from selm_jax.preferences.examples import ROLES
from selm_jax.preferences.packing import PreferenceBatch, Shape, empty
from selm_jax.rollout.engine import Programs, decoding_params, decoding_shardings, programs
from selm_jax.run.run import Run
from selm_jax.shell.user_code import is_user_code
from selm_jax.text.prompts import PromptSet
from selm_jax.training.state import TrainState

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
    def _stored(self) -> DecoderConfig:
        return self._given

    @cached_property
    def _facts(self) -> DecoderConfig:
        return self._given

    @cached_property
    def longest_prompt(self) -> int:
        return self.experiment.rollout.max_prompt_tokens

    @cached_property
    def longest_sequence(self) -> int:
        e = self.experiment
        if self.objective.rates:  # whole conversations, of which a row is to hold the longest
            return min(e.training.row_length, self._facts.max_positions)
        answered = self.longest_prompt + e.rollout.max_new_tokens
        if not self._facts.has_two_tables or not e.candidates.dataset:
            return answered
        return max(answered, e.text.max_length if e.text.layout == "paper" else 0)

    def _without_long(self, found: PromptSet, name: str) -> PromptSet:
        return found  # without a tokenizer nobody knows

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
        return {"policy": shard_bytes(self.abstract_params)}

    # The ranker

    @cached_property
    def model_rankers(self) -> tuple[Ranker, ...]:
        """Also where none is asked: a run builds its ranker, and PairRM stays."""
        return rankers_of(self.experiment, self.target)

    @cached_property
    def ranker_bytes(self) -> Mapping[str, int]:
        """PairRM is built when the run starts, and stays."""
        return {r.name: shard_bytes(r.params) for r in self.model_rankers if r.stays}

    # Training

    @cached_property
    def batch_shape(self) -> Shape:
        """The largest that packing can ask for; `segments` counts examples of a row, and is free."""
        t = self.experiment.training
        branches = max(len(ROLES), self.responses)
        return Shape(t.rows, t.row_length, scored=t.row_length, segments=4, branches=branches)

    @property
    def responses(self) -> int:
        """The most distinct responses that an example can have."""
        e = self.experiment
        several = e.feedback.explore == "all" or is_user_code(e.feedback.explore)
        if not several or "explore" not in self.objective.roles:
            return len(self.objective.roles)
        return e.candidates.greedy + e.candidates.samples + 2 * e.candidates.dataset

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
    candidates = (e.candidates.greedy or e.candidates.samples) and e.rollout.remote is None
    answers = candidates or e.data.heldout is not None
    if answers and not b.objective.rates:
        yield from _generation(b)
    heldout = e.data.heldout is not None
    asked = not b.objective.rates and (heldout or not e.taught)
    for ranker in b.model_rankers if asked else ():
        others = {name: size for name, size in b.ranker_bytes.items() if name != ranker.name}
        name = "rank" if len(b.model_rankers) == 1 else f"rank: {ranker.name}"
        given = (ranker.params, *ranker.inputs)
        yield Phase(name, RANK, ranker.function, given, {**others, **b.heldout_params})
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
        yield Phase("gradients, add", TRAIN, b.update.add, given, held)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    given = (b.abstract_state, grads, sums, rate)
    yield Phase("apply", TRAIN, b.update.apply, given, {**b.ranker_bytes, **b.beside_updates})


def _generation(b: Blueprint) -> Iterator[Phase]:
    """Prefill, refill, decode: `rollout.engine` in the order of its loop."""
    p = b.generation
    kept = {**b.ranker_bytes, **b.heldout_params}
    slots, waiting = {"slots": shard_bytes(p.slots)}, {"prompts": shard_bytes(p.prefilled)}
    params = {"weights": shard_bytes(b.decoding_params)}
    yield Phase("prefill", GENERATE, *p.prefill, {**kept, **slots})
    yield Phase("refill", GENERATE, *p.insert, {**kept, **params})
    # What a prefill leaves waits until slots are free for all of it.
    yield Phase("decode", GENERATE, *p.decode, {**kept, **waiting})


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def outcome(lowered: jax.stages.Lowered) -> Any:
    """What a program gives, abstractly, where the compiler puts it."""
    where = lowered.compile().output_shardings
    return jax.tree.map(_placed, lowered.out_info, where)
