"""The training loop: all updates of one iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import numpy as np

from selm_jax.config import Training, fixed_length
from selm_jax.models.decoder import Params
from selm_jax.objectives.roles import ROLES
from selm_jax.parallel import multihost
from selm_jax.preferences.batches import examples_of, updates_per_epoch
from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import least_padding, row_lengths
from selm_jax.preferences.packing import PreferenceBatch, Shape, assign_rows, common_shape, pack
from selm_jax.shell import memory
from selm_jax.training.checkpoint import Checkpoints
from selm_jax.training.laps import Laps
from selm_jax.training.optimizer import learning_rate
from selm_jax.training.state import TrainState
from selm_jax.training.update import Update
from selm_jax.training.work import Speed, tokens_of

Metrics = dict[str, float]


class TrainingError(RuntimeError):
    """Training cannot start or continue."""


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """The updates that an iteration is going to make, fixed before the first one."""

    settings: Training
    updates: Sequence[Sequence[Example]]  # the examples of each update
    shape: Shape
    iteration: int
    left_over: int  # examples that are in no update because they do not fill a batch

    @classmethod
    def make(
        cls, settings: Training, examples: Sequence[Example], seed: int, iteration: int,
        *, rows: int, ways: int,
    ) -> TrainingPlan:  # fmt: skip
        """Plans the updates of an iteration.

        Args:
          rows: number of rows of a batch; the most, if `training.row_length` is `auto`.
          ways: number of parts into which the mesh splits the rows of a batch.

        Raises:
          TrainingError: if the examples do not fill one batch.
          ExampleError: if an example does not fit a row.
        """
        per_epoch = updates_per_epoch(len(examples), settings.global_batch)
        if per_epoch == 0:
            raise TrainingError(
                f"iteration {iteration} has {len(examples)} examples, fewer than one batch of "
                f"training.global_batch = {settings.global_batch}. {_more_examples(len(examples))}"
            )
        updates = tuple(
            examples_of(
                step, examples, global_batch=settings.global_batch, seed=seed, iteration=iteration
            )
            for step in range(per_epoch * settings.epochs)
        )
        time = fixed_length(settings.row_length)
        if time is None:
            lengths = row_lengths(max(e.tokens for each in updates for e in each))
            rows, time = least_padding(updates, lengths, rows=rows, ways=ways)
        shape = common_shape(updates, rows=rows, time=time)
        left_over = len(examples) - per_epoch * settings.global_batch
        return cls(settings, updates, shape, iteration, left_over)

    def counts(self) -> dict[str, int]:
        """Counts examples, updates and tokens for the stage's report."""
        rows, time = self.shape.rows, self.shape.time
        batches = sum(-(-len(assign_rows(each, time)) // rows) for each in self.updates)
        return {
            "updates": len(self.updates),
            "examples": sum(map(len, self.updates)),
            "left_over": self.left_over,
            "tokens_useful": sum(e.tokens for examples in self.updates for e in examples),
            "tokens_padded": batches * rows * time,
            "rows": rows,
            "row_length": time,
        }


def _more_examples(count: int) -> str:
    """Says what to change if there are too few examples for one batch."""
    smaller = f"Set training.global_batch to {count:,} or less, or give" if count else "Give"
    return (
        f"{smaller} the iteration more rows, or have fewer prompts dropped: `selm preview` counts "
        "the reasons. `feedback.ties: first` keeps prompts whose answers have equal scores; more "
        "candidates.samples or a higher rollout.temperature makes answers differ"
    )


def train(
    plan: TrainingPlan,
    update: Update,
    state: TrainState,
    checkpoints: Checkpoints,
    *,
    peak: float,
    speed: Speed,
    place: Callable[[PreferenceBatch], PreferenceBatch],
    reference: Params | None = None,
    base: Params | None = None,
    key: jax.Array | None = None,
    report: Callable[[Metrics], None],
) -> TrainState:
    """Runs the updates from number `state.step` to the last. The state is donated.

    Args:
      peak: the iteration's peak learning rate.
      speed: computes an update's speed.
      place: puts a batch on the devices.
      reference: parameters of a live reference; None uses the stored log-probabilities.
      base: the base model under adapters; None if all parameters are trained.
      key: seeds the adapters' dropout, different in every update and batch; None without dropout.
      report: is called with the metrics of each finished update, in order. Those under `time/` and
        `memory/` are readings of this machine; all others are the same in every run.

    Raises:
      TrainingError: if a loss or gradient is not finite and `training.on_nonfinite` is `stop`; the
        message names the examples. The last checkpoint stays as it is.
      Stopped, KeyboardInterrupt: if a signal or Ctrl-C stops the run; the state after the last
        update has been saved.
    """
    s = plan.settings
    count = len(plan.updates)
    rate = learning_rate(s.schedule, peak, count, s.warmup_ratio)
    laps = Laps()
    for step in range(int(state.step), count):
        examples = plan.updates[step]
        batches = pack(examples, plan.shape)
        drop = None if key is None else jax.random.fold_in(key, step)
        now = float(np.float32(cast(Any, rate(step))))
        state, metrics = one_update(
            update, state, map(place, batches), now,
            means=mean_lengths(examples), reference=reference, base=base, key=drop, laps=laps,
        )  # fmt: skip
        if s.on_nonfinite == "stop":
            _check_finite(metrics, plan, step, examples)
        positions = len(batches) * plan.shape.rows * plan.shape.time
        report(
            {"step": step + 1, **_finite(metrics), "learning_rate": now}
            | tokens_of(examples, positions)
            | speed.metrics(examples, laps.taken())
            | memory.peaks()
        )
        laps("log")
        if step + 1 < count:
            stop = multihost.should_stop()
            if stop or (step + 1) % s.checkpoint_every == 0:
                checkpoints.save(state)
            laps("checkpoint")
            if stop:
                checkpoints.wait()
                raise multihost.stopped()
    return state


def one_update(
    update: Update,
    state: TrainState,
    batches: Iterable[PreferenceBatch],
    learning_rate: float,
    *,
    means: np.ndarray,
    reference: Params | None = None,
    base: Params | None = None,
    key: jax.Array | None = None,
    laps: Callable[[str], None] = lambda phase: None,
) -> tuple[TrainState, Metrics]:
    """Makes one update: sums the gradients of all batches, then takes a step. Donates the state.

    Args:
      update: the compiled functions.
      state: the state before the update.
      batches: the batches, on the devices; they may differ in shape.
      learning_rate: the learning rate of this update.
      means: `mean_lengths` of all examples in the batches.
      reference, base: as for `train`.
      key: seeds this update's dropout, which differs in every batch; None without dropout.
      laps: is called with the name of each phase when it has ended; see `Laps`.

    Returns:
      The new state and the update's metrics: means over its examples, and `grad_norm`.
    """
    gradients, sums = None, None
    for i, batch in enumerate(batches):
        laps("data")
        drop = None if key is None else jax.random.fold_in(key, i)
        fixed = (means, reference, base, drop)
        if gradients is None:
            gradients, sums = update.gradients(state.params, batch, *fixed)
        else:
            gradients, sums = update.add(gradients, sums, state.params, batch, *fixed)
        laps("gradients")
    # So that the phases can be told apart. On several CPU devices it must be so: two programs that
    # run at once can deadlock, because each holds the threads that the other's collectives need.
    jax.block_until_ready(gradients)
    laps("gradients")
    state, metrics = update.apply(state, gradients, sums, np.float32(learning_rate))
    del gradients  # otherwise two gradients would be in memory during the next update
    found = {k: float(v) for k, v in metrics.items()}
    jax.block_until_ready(state)
    laps("apply")
    return state, found


def compile_ahead(
    plan: TrainingPlan,
    update: Update,
    state: TrainState,
    place: Callable[[PreferenceBatch], PreferenceBatch],
) -> None:
    """Compiles the programs of a plan's updates, and leaves them in the compilation cache.

    The compiler needs half a GiB. So it has done its work before parameters and moments are in
    memory. A live reference and adapters are arguments of other programs.

    Args:
      plan: the updates, all of one shape.
      update: the functions to compile.
      state: abstract, as by `TrainState.abstract`.
      place: puts a batch on the devices.
    """
    batch = place(pack(plan.updates[0], plan.shape)[0])
    given = (state.params, batch, mean_lengths(plan.updates[0]), None, None, None)
    first = update.gradients.lower(*given)
    first.compile()
    grads, sums = first.out_info
    grads = jax.tree.map(_placed, grads, jax.tree.map(lambda x: x.sharding, state.params))
    sums = jax.tree.map(lambda x: _placed(x, state.step.sharding), sums)
    if any(len(pack(each, plan.shape)) > 1 for each in plan.updates):
        update.add.lower(grads, sums, *given).compile()
    update.apply.lower(state, grads, sums, np.float32(0)).compile()


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def mean_lengths(examples: Sequence[Example]) -> np.ndarray:
    """The mean number of scored tokens of each role's response in an update, [roles]."""

    def mean(role):
        return np.mean([np.mean([len(e.responses[i]) for i in e.playing(role)]) for e in examples])

    return np.array([mean(role) for role in ROLES], np.float32)


def _finite(metrics: Metrics) -> dict[str, float | None]:
    """The metrics with None in place of what is not finite, which JSON has no number for."""
    return {k: v if np.isfinite(v) else None for k, v in metrics.items()}


def _check_finite(
    metrics: Metrics, plan: TrainingPlan, step: int, examples: Sequence[Example]
) -> None:
    bad = [name for name in ("loss", "grad_norm") if not np.isfinite(metrics[name])]
    if bad:
        ids = ", ".join(e.prompt_id for e in examples[:8])
        raise TrainingError(
            f"iteration {plan.iteration}, update {step + 1}: {' and '.join(bad)} "
            f"{'is' if len(bad) == 1 else 'are'} not finite. The update's examples: "
            f"{ids}{', ...' if len(examples) > 8 else ''}. Usually a smaller "
            "training.learning_rate helps; the last checkpoint is undamaged. "
            "training.on_nonfinite: skip leaves out such updates and goes on from there"
        )
