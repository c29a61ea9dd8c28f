"""Builds an experiment's parameters on the devices, and its jitted update and engine.

Everything here depends only on the settings, the model's configuration and two lengths. A plan
builds the same programs as a run, from a `config.json` alone, so its numbers are those of the run.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from selm_jax.config import Experiment, as_dict, fixed_length
from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Decoder, Params, abstract_adapters, abstract_params
from selm_jax.models.families import read_config
from selm_jax.models.lora import Lora
from selm_jax.models.lora import init as fresh_adapters
from selm_jax.models.quantize import quantize
from selm_jax.objectives.losses import Objective
from selm_jax.parallel.rules import place_rows, row_shardings, shardings
from selm_jax.policy.policy import Batches, Policy
from selm_jax.policy.sizes import BatchSizes, least
from selm_jax.preferences.layouts import OneShape
from selm_jax.preferences.packing import PreferenceBatch
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.filters import filter_named
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.sampling import Filter, Sampling
from selm_jax.run.devices import Devices
from selm_jax.run.task import Sizes, Task, refuse_user_code
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.storage import is_url
from selm_jax.text.chat import Chat
from selm_jax.training.optimizer import optimizer
from selm_jax.training.scoring import Scorer
from selm_jax.training.update import Shardings, Update, make_update
from selm_jax.weights.huggingface import load
from selm_jax.weights.sources import resolve


class Programs:
    """An experiment's parameters, update and engine, each built on first use.

    Args:
      facts: the configuration of the model that is trained.
      stop_ids: the tokens that end an answer.
      batches: the sizes of batches; None takes the least ones that the experiment allows.
    """

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        facts: DecoderConfig,
        sizes: Sizes,
        stop_ids: tuple[int, ...],
        devices: Devices,
        batches: BatchSizes | None = None,
    ):
        self.batches = batches or least(experiment)
        self.experiment, self.task, self.devices = experiment, task, devices
        self.facts, self.sizes, self.stop_ids = facts, sizes, stop_ids
        self.config = facts.for_length(sizes.longest_sequence)
        self._others: dict[Objective, Update] = {}

    # Parameters, abstractly

    @cached_property
    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the model's parameters."""
        dtype = self.experiment.training.parameter_dtype
        return self._placed(abstract_params(self.config), dtype)

    @cached_property
    def abstract_trained(self) -> Params:
        """Shapes, dtypes and shardings of the trained parameters: the adapters, or all of them."""
        if self.lora is None:
            return self.abstract_params
        return self._placed(abstract_adapters(self.config, self.lora), "float32")

    def _placed(self, boxed: Params, dtype: str) -> Params:
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=where),
            nn.unbox(boxed),
            shardings(boxed, self.devices.mesh, self.devices.rules),
        )

    @property
    def parameters(self) -> int:
        """The number of the model's parameters."""
        return sum(x.size for x in jax.tree.leaves(self.abstract_params))

    @cached_property
    def lora(self) -> Lora | None:
        if self.experiment.lora is None:
            return None
        return Lora(**as_dict(self.experiment.lora))

    @property
    def quantized(self) -> str | None:
        """The quantisation of the base model under adapters, if it is quantised."""
        lora = self.experiment.lora
        return None if lora is None or lora.base == "full" else lora.base

    # Parameters, from model folders

    def load(self, folder: Path) -> Params:
        """Reads the parameters of a model folder, each directly into its shards on the mesh.

        A reward model that starts from a language model gets a head of zeros.
        """
        folder = _readable(folder)
        return load(
            folder,
            self.config,
            dtype=jnp.dtype(self.experiment.training.parameter_dtype),
            shardings=jax.tree.map(lambda x: x.sharding, self.abstract_params),
            fresh_head=self.config.head is not None and read_config(folder).head is None,
        )

    def start_of(self, folder: Path) -> Params:
        """Reads the parameters of the model that an iteration starts from, or of its reference.

        The parameters are quantised if `lora.base` says so.
        """
        params = self.load(folder)
        if self.quantized is None:
            return params
        return jax.jit(quantize, static_argnums=1)(params, self.quantized)

    def trained(self, start: Params, key: jax.Array) -> Params:
        """The parameters that an iteration trains, at first: `start` or new adapters."""
        if self.lora is None:
            return start
        return fresh_adapters(self.abstract_trained, key)

    def fixed(self, start: Params, key: jax.Array, policy: Path, reference: Path) -> dict[str, Any]:
        """The arguments of an iteration's updates that are the same in every update.

        Args:
          start: the parameters of the policy that the iteration starts from.
          key: the key of the iteration's adapters (`iteration_key`).
          policy, reference: the model folders of that policy and of the reference.

        Returns:
          The arguments `reference`, `base` and `key` of `training.loop.train`, if they are needed.
        """
        live = self.experiment.training.reference == "live"
        if self.lora is None:  # a copy: the updates overwrite the parameters that they start from
            return {"reference": self.start_of(reference) if live else None}
        dropout = jax.random.fold_in(key, 1) if self.lora.dropout else None
        second = None
        if live:
            second = start if reference == policy else self.start_of(reference)
        return {"base": start, "reference": second, "key": dropout}

    def decoding(self, params: Params) -> Params:
        """The parameters in the form that the engine needs, in the compute dtype."""
        weights = self.experiment.rollout.weights
        return decoding_params(params, self.devices.dtype, self.decoding_shardings, weights)

    @property
    def decoding_shardings(self) -> Any:
        """The shardings of the engine's parameters.

        Raises:
          MeshError: the model cannot be sharded over the mesh for decoding.
        """
        weights = self.experiment.rollout.weights
        return decoding_shardings(self.config, self.devices.decode_mesh, weights)

    # Batches

    def place(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Puts a batch on the devices, sharded by rows; each process places its own rows."""
        return place_rows(batch, self.devices.mesh, self.devices.rules)

    def batch_shardings(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The shardings of a batch, which is sharded by rows."""
        return row_shardings(batch, self.devices.mesh, self.devices.rules)

    # What is compiled

    @cached_property
    def optimizer(self) -> Any:
        s = self.experiment.training
        return optimizer(s.optimizer, b1=s.b1, b2=s.b2, eps=s.eps, weight_decay=s.weight_decay)

    @cached_property
    def update(self) -> Update:
        """The update, which computes log-probabilities, rewards, gradients and new parameters."""
        return self._update_of(self.task.objective)

    def update_at(self, t: int) -> Update:
        """The update of iteration t: another than `update` if its objective is another."""
        objective = self.task.objective_at(t)
        if objective is self.task.objective:
            return self.update
        if objective not in self._others:
            self._others[objective] = self._update_of(objective)
        return self._others[objective]

    def _update_of(self, objective: Objective) -> Update:
        s = self.experiment.training
        decoder = Decoder(
            self.config,
            self.devices.dtype,
            self.batches.remat,
            lora=self.lora,
            quantized=self.quantized is not None,
            back_end=self.experiment.compute.attention,
            mesh=self.devices.mesh,
        )
        where = jax.tree.map(lambda x: x.sharding, self.abstract_trained)
        replicated = NamedSharding(self.devices.mesh, PartitionSpec())
        return make_update(
            decoder,
            objective,
            self.optimizer,
            chunk=self.batches.chunk,
            clip=s.clip,
            statistics=s.token_statistics and not self.task.objective.rates,
            skip=s.on_nonfinite == "skip",
            train_router=s.router == "trained",
            shardings=Shardings(where, replicated),
        )

    @property
    def scorer(self) -> Scorer:
        """The `Scorer`, which computes log-probabilities and rewards of examples."""
        length = fixed_length(self.experiment.training.row_length)
        return Scorer(self.update, self.place, OneShape(self.batches.rows, length))

    def policy(self, folder: Path, chat: Chat) -> Policy:
        """The model in a folder, as a policy that generates and scores with the run's settings."""
        b, d, length = self.batches, self.devices, self.experiment.training.row_length
        batches = Batches(
            b.slots, b.prefill_rows, self.sizes.longest_prompt, self.sizes.longest_sequence,
            b.rows, fixed_length(length), b.chunk,
        )  # fmt: skip
        return Policy(
            str(folder), lambda: self.load(folder), self.config,
            chat=lambda: chat, stop_ids=lambda: self.stop_ids, mesh=d.mesh,
            decode_mesh=d.decode_mesh, dtype=d.dtype, rules=d.rules, batches=batches,
            back_end=self.experiment.compute.attention,
        )  # fmt: skip

    @property
    def _filter(self) -> Filter | None:
        """The user's sampler filter, if the experiment names one."""
        name = self.experiment.rollout.filter
        if name is None:
            return None
        if self.task.looked_at is not None:
            refuse_user_code(self.task.looked_at, "rollout.filter", name)
        return filter_named(name, self.config.vocab_size)

    @cached_property
    def engine(self) -> Engine:
        """The engine that answers prompts."""
        r = self.experiment.rollout
        return Engine.fitted(
            decoder=Decoder(
                self.config,
                self.devices.dtype,
                scan=False,
                quantized=r.weights != "full",
                back_end=self.experiment.compute.attention,
                mesh=self.devices.decode_mesh,
            ),
            sampling=Sampling.of(r, self._filter),
            slots=self.batches.slots,
            max_prompt=self.sizes.longest_prompt,
            max_new_tokens=r.max_new_tokens,
            stop_ids=self.stop_ids,
            prefill_rows=self.batches.prefill_rows,
            mesh=self.devices.decode_mesh,
            mixture=r.mixture,
        )


def iteration_key(seed: int, t: int) -> jax.Array:
    """The random key of an iteration's adapters."""
    return jax.random.fold_in(jax.random.key(seed), t)


# Settings of `training` that no program reads: the loop and the stages do.
UNREAD = frozenset(
    {
        *("learning_rate", "global_batch", "epochs", "schedule", "warmup_ratio"),
        *("reference_policy", "checkpoint_every", "checkpoints_kept"),
    }
)
KEPT = 8  # that the runs of a sweep built last; each holds its compiled programs in memory


class SharedPrograms:
    """The programs of runs in one process: those with equal settings compile each program once."""

    def __init__(self):
        self._built: dict[str, Programs] = {}  # the one that was used last is the last

    def of(self, new: Programs) -> Programs:
        """Returns programs of an earlier run that are the same as these, or else keeps these."""
        told = as_dict(new.experiment)
        read = {k: told[k] for k in ("objective", "training", "lora", "rollout", "compute")}
        read["training"] = {k: v for k, v in told["training"].items() if k not in UNREAD}
        meshes = [m.devices.tolist() for m in (new.devices.mesh, new.devices.decode_mesh)]
        key = repr((read, new.facts, new.sizes, new.stop_ids, new.batches, meshes))
        found = self._built.pop(key, new)
        self._built[key] = found
        while len(self._built) > KEPT:
            del self._built[next(iter(self._built))]
        return found


def _readable(folder: Path) -> Path:
    """A model folder whose weights can be read.

    For a model of a run folder in a bucket that is not on this machine, that is a folder in the
    cache whose weights are read from the bucket: by each process no more than its own shards.
    """
    files = mirrors.below(folder)
    if all(file.exists() for file in files):
        return folder
    url = mirrors.named(folder)
    return resolve(url).path if is_url(url) else mirrors.need(folder)
