"""Builds the programs of an experiment's run without its data and its weights.

`Blueprint` builds `run.programs.Programs` as a run does, except that three inputs do not come from
the run's files: the model's facts, the length of the longest prompt, and the ids that end an
answer. Meshes, rules, shardings and jitted functions are the run's own, so the plan measures the
programs that will run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.config import Experiment, fixed_length
from selm_jax.models.config import DecoderConfig
from selm_jax.models.quantize import quantize
from selm_jax.objectives.roles import ROLES
from selm_jax.plan.rankers import Ranker, rankers_of
from selm_jax.plan.topology import Target
from selm_jax.policy.sizes import BatchSizes, room_of
from selm_jax.preferences.layouts import row_lengths
from selm_jax.preferences.packing import PreferenceBatch, Shape, empty
from selm_jax.rollout.parameters import decoding_params
from selm_jax.rollout.programs import Programs as Generation
from selm_jax.rollout.programs import programs
from selm_jax.run.data import Data
from selm_jax.run.devices import Devices
from selm_jax.run.programs import Programs
from selm_jax.run.sizes import Choice, choose, longest_example, responses
from selm_jax.run.task import Sizes, task_of
from selm_jax.shell.memory import shard_bytes
from selm_jax.training.state import TrainState

GENERATE, RANK, SCORE, TRAIN = "generate", "rank", "score", "train"


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program, and what else each device holds in memory while it runs.

    Attributes:
      stage: the stage of the iteration, whose settings may contain a remedy.
      function, arguments: the run's own jitted function and its abstract arguments.
      held: bytes on a device besides the arguments, by what they are.
    """

    name: str
    stage: str
    function: Any
    arguments: tuple[Any, ...]
    held: Mapping[str, int]

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.arguments)


class Blueprint:
    """The programs of an experiment on given devices, built from its settings and model config.

    The longest prompt is assumed to be as long as the settings allow.
    """

    def __init__(self, experiment: Experiment, facts: DecoderConfig, target: Target):
        self.experiment, self.facts, self.target = experiment, facts, target
        self.task = task_of(experiment.objective)
        self.devices = Devices(experiment.compute, target.devices)
        self.data = Data(experiment, self.task, model=None)

    @cached_property
    def lengths(self) -> Sizes:
        """The sequence lengths, as long as the settings allow."""
        return self.task.largest(self.experiment, self.facts)

    @cached_property
    def sizes(self) -> Choice:
        """The sizes of batches that a run on these devices would choose for such lengths."""
        e, where = self.experiment, self.target
        room = room_of(where.hbm, where.hbm_from, where.devices[0].platform)
        prompts = e.data.limit or e.rollout.prompts_per_part
        if Path(e.data.train).exists():
            prompts = len(self.data.prompts(1))
        heldout = 0 if e.data.heldout is None else e.data.heldout_limit or 0
        if e.data.heldout is not None and Path(e.data.heldout).exists():
            heldout = len(self.data.heldout)
        return choose(self._programs(None), [prompts] * e.iterations, heldout, room)

    @property
    def told(self) -> str:
        """The sizes of batches in one line, those of rankers that are models too."""
        rankers = [f"{r.name}: {r.batch} rows of 512 tokens" for r in self.model_rankers]
        return "; ".join(filter(None, [self.sizes.line, *rankers]))

    @cached_property
    def programs(self) -> Programs:
        return self._programs(self.sizes.sizes)

    def _programs(self, batches: BatchSizes | None) -> Programs:
        # The ids that end an answer do not affect memory, so any will do.
        return Programs(
            self.experiment, self.task, self.facts, self.lengths, stop_ids=(0, 1),
            devices=self.devices, batches=batches,
        )  # fmt: skip

    # Generation

    @cached_property
    def decoding_params(self) -> Any:
        """The abstract parameters that generation reads: two models' with a mixture."""
        where, weights = self.programs.decoding_shardings, self.experiment.rollout.weights
        cast = partial(decoding_params, dtype=self.devices.dtype, where=where, weights=weights)
        one = jax.tree.map(_placed, jax.eval_shape(cast, self.programs.abstract_params), where)
        return one if self.programs.engine.mixture is None else (one, one)

    @cached_property
    def generation(self) -> Generation:
        return programs(self.programs.engine, self.decoding_params)

    @cached_property
    def heldout_params(self) -> Mapping[str, int]:
        """The bytes of the parameters that `evaluate` keeps while it generates and ranks."""
        if self.experiment.data.heldout is None:
            return {}
        return {"policy": shard_bytes(self.programs.abstract_params)}

    # The ranker

    @cached_property
    def model_rankers(self) -> tuple[Ranker, ...]:
        """The rankers that are models, whether used or not, because a run always builds them."""
        return rankers_of(self.experiment, self.target)

    @cached_property
    def ranker_bytes(self) -> Mapping[str, int]:
        """The bytes of the rankers that stay in memory for the whole run (PairRM)."""
        return {r.name: shard_bytes(r.params) for r in self.model_rankers if r.stays}

    # Training

    @cached_property
    def batch_shape(self) -> Shape:
        """The largest batch that packing can make; `segments` has no effect on memory."""
        time = self.row_lengths[-1]
        branches = max(len(ROLES), self.responses)
        rows = self.programs.batches.rows
        return Shape(rows, time, scored=time, segments=4, branches=branches)

    @cached_property
    def row_lengths(self) -> Sequence[int]:
        """The row lengths that a run may choose: that of the settings, or several for `auto`."""
        fixed = fixed_length(self.experiment.training.row_length)
        return row_lengths(self.longest_example) if fixed is None else [fixed]

    @property
    def longest_example(self) -> int:
        """The number of tokens of the longest example that the settings allow."""
        return longest_example(self.experiment, self.task, self.lengths)

    @property
    def responses(self) -> int:
        """The maximum number of distinct responses in an example."""
        return responses(self.experiment, self.task)

    @cached_property
    def abstract_batch(self) -> PreferenceBatch:
        of = self.task.objective
        batch = empty(self.batch_shape, counted=bool(of.bonus_bits), shared=of.uses_shared)
        return jax.tree.map(_placed, batch, self.programs.batch_shardings(batch))

    @cached_property
    def abstract_start(self) -> Any:
        """The abstract parameters of the start model, quantised if the experiment says so."""
        if self.programs.quantized is None:
            return self.programs.abstract_params
        work = jax.jit(quantize, static_argnums=1)
        return outcome(work.lower(self.programs.abstract_params, self.programs.quantized))

    @cached_property
    def abstract_state(self) -> TrainState:
        return TrainState.abstract(self.programs.abstract_trained, self.programs.optimizer)

    @cached_property
    def update_arguments(self) -> tuple[Any, ...]:
        """The abstract arguments that `training.loop.train` passes to `Update.gradients`."""
        live = self.experiment.training.reference == "live"
        means = jax.ShapeDtypeStruct((len(ROLES),), np.float32)
        first = (self.programs.abstract_trained, self.abstract_batch, means)
        if self.programs.lora is None:
            return (*first, self.programs.abstract_params if live else None, None, None)
        base = self.abstract_start
        key = jax.eval_shape(lambda: jax.random.key(0)) if self.programs.lora.dropout else None
        return (*first, base if live else None, base, key)

    @property
    def beside_updates(self) -> Mapping[str, int]:
        """The bytes that training keeps in memory besides the arguments of `apply`.

        They are those of a live reference, or of the base model of adapters.
        """
        *_, reference, base, _ = self.update_arguments
        if base is not None:
            return {"base": shard_bytes(base)}
        return {"reference": shard_bytes(reference)} if reference else {}


def phases(b: Blueprint, batches: int) -> Iterator[Phase]:
    """Yields the programs in the order in which an iteration runs them.

    Args:
      batches: number of packed batches in an update; with one, no gradients are accumulated.
    """
    e = b.experiment
    candidates = (e.candidates.greedy or e.candidates.samples) and e.rollout.remote is None
    heldout = e.data.heldout is not None
    if b.task.answers and (candidates or heldout):
        yield from _generation(b)
    asked = b.task.answers and (heldout or not e.taught)
    for ranker in b.model_rankers if asked else ():
        others = {name: size for name, size in b.ranker_bytes.items() if name != ranker.name}
        name = "rank" if len(b.model_rankers) == 1 else f"rank: {ranker.name}"
        given = (ranker.params, *ranker.inputs)
        yield Phase(name, RANK, ranker.function, given, {**others, **b.heldout_params})
    if not b.task.reference_free:
        given = (b.abstract_start, b.abstract_batch)
        yield Phase("score", SCORE, b.programs.update.logps_by_token, given, b.ranker_bytes)
    _, sums = jax.eval_shape(b.programs.update.gradients, *b.update_arguments)
    where = b.abstract_state.step.sharding
    sums = jax.tree.map(lambda x: _placed(x, where), sums)
    # Gradients are sharded like the trained parameters. `add` is `gradients` plus a sum, so it
    # needs more memory.
    grads = b.programs.abstract_trained
    held = {**b.ranker_bytes, "moments": shard_bytes(b.abstract_state.opt_state)}
    if batches == 1:
        yield Phase("gradients", TRAIN, b.programs.update.gradients, b.update_arguments, held)
    else:
        given = (grads, sums, *b.update_arguments)
        yield Phase("gradients, add", TRAIN, b.programs.update.add, given, held)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    given = (b.abstract_state, grads, sums, rate)
    yield Phase(
        "apply", TRAIN, b.programs.update.apply, given, {**b.ranker_bytes, **b.beside_updates}
    )


def _generation(b: Blueprint) -> Iterator[Phase]:
    """Yields the programs of generation in the engine's order: prefill, refill and decode."""
    p = b.generation
    kept = {**b.ranker_bytes, **b.heldout_params}
    slots, params = {"slots": shard_bytes(p.slots)}, {"weights": shard_bytes(b.decoding_params)}

    def waiting(groups: int) -> dict[str, int]:
        return {"prompts": groups * shard_bytes(p.prefilled)} if groups else {}

    # The results of a prefill wait until there are free slots for all of them.
    earlier = waiting(p.groups - 1)
    yield Phase("prefill", GENERATE, *p.prefill, {**kept, **slots, **earlier})
    yield Phase("refill", GENERATE, *p.insert, {**kept, **params, **earlier})
    yield Phase("decode", GENERATE, *p.decode, {**kept, **waiting(p.groups)})


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def outcome(lowered: jax.stages.Lowered) -> Any:
    """The abstract outputs of a program, with the shardings that the compiler chooses."""
    where = lowered.compile().output_shardings
    return jax.tree.map(_placed, lowered.out_info, where)
