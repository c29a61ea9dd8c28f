"""Trains a model from Python with any loss: one update per call, the same as in a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.api import losses
from selm_jax.api.errors import ApiError
from selm_jax.api.model import Model
from selm_jax.api.pairs import Pairs
from selm_jax.config import Training, as_dict
from selm_jax.models.config import DecoderConfig
from selm_jax.objectives.losses import LossFunction, Objective
from selm_jax.policy import sizes
from selm_jax.policy.sizes import BatchSizes
from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import ByLength, Layout, OneShape
from selm_jax.preferences.packing import PreferenceBatch, Shape, pack
from selm_jax.run.programs import Programs
from selm_jax.run.sizes import facts_of_training
from selm_jax.run.task import task_with
from selm_jax.training.loop import TrainingError, mean_lengths, one_update
from selm_jax.training.state import TrainState

_TOKENS = 2048  # per batch and device; longer input is accumulated over several batches


class Trainer:
    """Trains a model in place, update by update.

    Attributes:
      model: the model that is trained; after each step it answers and scores with the new
        parameters.
      objective: the loss with the roles that it needs.
      learning_rate: a number, or a function of the update's number, which starts at 0. You may
        change it between steps.
      updates: the number of updates that this trainer has made.
    """

    def __init__(
        self,
        model: Model,
        *,
        loss: str | Objective | LossFunction,
        learning_rate: float | Callable[[int], float],
        optimizer: str = Training.optimizer,
        b1: float = Training.b1,
        b2: float = Training.b2,
        eps: float = Training.eps,
        weight_decay: float = Training.weight_decay,
        clip: float | None = Training.clip,
        remat: str = Training.remat,
        logprob_chunk: int | str = Training.logprob_chunk,
        rows: int | None = None,
        row_length: int | None = None,
    ):
        """Prepares updates of a model with a loss and an optimizer.

        Args:
          model: the model to train, from `selm.load`.
          loss: `selm.loss("selm", beta=0.1, alpha=1e-3)`, a name without settings such as "sft", or
            a function `logps -> (losses, metrics)`, each an array `[pairs]` (see `Logps`).
          learning_rate: the learning rate of each update, without warm-up or decay.
          optimizer, b1, b2, eps, weight_decay, clip: as in `training`.
          remat, logprob_chunk: as in `training`; "auto" chooses them from memory at the first step.
          rows, row_length: the rows of a packed batch and the tokens per row, as in `training`.
            None chooses them to fit the pairs.

        Raises:
          ObjectiveError: the loss is unknown, or lacks a setting.
          ConfigError: a setting is out of its range.
          ApiError: the loss trains a reward model, or needs count bonuses, two references or the
            reference's log-probabilities of shared lengths.
        """
        self.model, self.learning_rate, self.updates = model, learning_rate, 0
        self.objective = loss if isinstance(loss, Objective) else losses.loss(loss)
        if self.objective.rates:
            raise ApiError(
                f"{self.objective} trains a reward model, which Trainer cannot do. Use `selm run` "
                "with an experiment file"
            )
        if self.objective.bonus_bits:
            raise ApiError(
                f"{self.objective} needs the counts of a whole iteration's answers, which Trainer "
                "does not have. Use `selm run` with an experiment file"
            )
        if self.objective.start_share:
            raise ApiError(
                f"{self.objective} needs the log-probabilities of two references, and pairs have "
                "those of one. Use `selm run` with an experiment file"
            )
        if self.objective.uses_shared:
            raise ApiError(
                f"{self.objective} needs the reference's log-probabilities of the shorter answer's "
                "length, and pairs have those of whole answers. Use `selm run` with an experiment "
                "file"
            )
        rate = {} if callable(learning_rate) else {"learning_rate": learning_rate}
        self._settings = rate | {
            "optimizer": optimizer, "b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay,
            "clip": clip, "remat": remat, "logprob_chunk": logprob_chunk,
        }  # fmt: skip
        self._size = (rows, row_length)
        self._batches: BatchSizes | None = None
        self._compiled: dict[DecoderConfig, Programs] = {}
        self._shapes: dict[int, Shape] = {}
        self._moments: Any = None
        self._draft(1)  # so that wrong settings fail here

    def step(self, pairs: Pairs) -> dict[str, float]:
        """Makes one update with the mean loss over all these pairs.

        Returns:
          `loss` and the metrics of the loss, as means over the pairs, and `grad_norm` (before
          clipping), `examples` and `learning_rate`.

        Raises:
          TrainingError: there are no pairs, or the loss or its gradient is not finite.
          ApiError: the pairs were made with another tokenizer, or they lack the reference's
            log-probabilities.
        """
        self._check(pairs)
        examples = pairs.examples
        longest = max(len(e.prompt) + max(map(len, e.responses)) for e in examples)
        if self._batches is None:
            self._batches = self._chosen(examples, longest)
        programs = self._programs(longest)
        params = self.model._trained
        if self._moments is None:
            self._moments = TrainState.create(params, programs.optimizer).opt_state
        state = TrainState(jnp.int32(self.updates), params, self._moments)
        rate = self.learning_rate
        rate = float(rate(self.updates)) if callable(rate) else rate
        fixed = self.model._fixed(programs)
        if fixed.get("key") is not None:
            fixed["key"] = jax.random.fold_in(fixed["key"], self.updates)
        batches = map(programs.place, self._packed(examples, programs))
        state, metrics = one_update(
            programs.update, state, batches, rate, means=mean_lengths(examples), **fixed
        )
        self.model._become(state.params)
        self._moments, self.updates = state.opt_state, self.updates + 1
        if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
            raise TrainingError(
                f"update {self.updates}: the loss is {metrics['loss']} and the norm of its "
                f"gradient is {metrics['grad_norm']}. The parameters of {self.model.name} are no "
                "longer usable. Load the model again, and lower learning_rate or check the loss"
            )
        first = {name: metrics.pop(name) for name in ("loss", "grad_norm")}
        return first | metrics | {"learning_rate": rate}

    def _programs(self, longest: int) -> Programs:
        """The compiled programs for sequences of up to `longest` tokens."""
        made = self._draft(longest)
        return self._compiled.setdefault(made.config, made)

    def _draft(self, longest: int) -> Programs:
        task = task_with(self.objective)
        return self.model._programs_of(task, self._settings, longest, self._batches)

    def _chosen(self, examples: tuple[Example, ...], longest: int) -> BatchSizes:
        """The sizes of all steps, from the memory of a device and the first step's longest rows."""
        draft, device = self._draft(longest), jax.local_devices()[0]
        shape = next(iter(self._layout(draft)(examples))).shape
        facts = facts_of_training(draft, shape.time, len(examples))
        fixed = sizes.given(as_dict(draft.experiment)) | {"rows": shape.rows}
        return sizes.choose(None, facts, sizes.room(device).bytes, device.platform, fixed)

    def _packed(
        self, examples: tuple[Example, ...], programs: Programs
    ) -> Iterator[PreferenceBatch]:
        for group in self._layout(programs)(examples):
            shape = self._grown(group.shape)
            yield from pack([examples[i] for i in group.which], shape)

    def _layout(self, programs: Programs) -> Layout:
        rows, row_length = self._size
        if rows is not None and row_length is not None:
            return OneShape(rows, row_length)
        return ByLength(programs.devices.row_ways, _TOKENS, programs.config.heads)

    def _grown(self, shape: Shape) -> Shape:
        """Enlarges a batch's shape to the largest one so far, so that few shapes are compiled."""
        before = dataclasses.astuple(self._shapes.get(shape.time, shape))
        self._shapes[shape.time] = Shape(*map(max, before, dataclasses.astuple(shape)))
        return self._shapes[shape.time]

    def _check(self, pairs: Pairs) -> None:
        if not len(pairs):
            raise TrainingError(f"there is nothing to train on: {pairs.told}")
        self.model._check_tokenizer(pairs.tokenizer)
        scored = all(each.reference_logps is not None for each in pairs.examples)
        if not scored and not self.objective.reference_free:
            raise ApiError(
                f"{self.objective} needs a reference's log-probabilities, but these pairs were "
                "made with reference=None. Make them again with the default reference, or name a "
                "reference model"
            )
