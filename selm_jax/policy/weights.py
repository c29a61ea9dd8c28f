"""A model's parameters in two forms: separate layers for answering, stacked layers for scoring."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
from jax.sharding import Mesh

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params, abstract_params
from selm_jax.models.stacked import stack
from selm_jax.parallel.rules import TRAINING, Rules, shardings
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.shell.memory import shard_bytes


class Weights:
    """A model's parameters, read on first use, and kept either stacked or per layer if possible.

    Answering needs one tree per layer, sharded for decoding, in the compute dtype. Scoring needs
    the layers stacked. If both forms have the same dtype, one is converted to the other without
    loss, and only one is kept. Otherwise the stacked form is always kept, because it is the exact
    one, and the other is dropped when scoring begins.
    """

    def __init__(
        self,
        load: Callable[[], Params],
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh,
        decode_mesh: Mesh,
        rules: Rules = TRAINING,
    ):
        """Stores how to read the parameters, without reading them.

        Args:
          load: reads the stacked parameters, each into its shards on `mesh` by `rules`.
          dtype: the compute dtype.
          decode_mesh: the devices of `mesh` in the same order (`parallel.mesh.decode_mesh`).
        """
        self._load, self._config, self._dtype = load, config, dtype
        self._mesh, self._decode_mesh, self._rules = mesh, decode_mesh, rules
        self._stacked: Params | None = None
        self._apart: Params | None = None

    @property
    def stacked_bytes(self) -> int:
        """The bytes on a device of the stacked form, which is there while the other one is made."""
        boxed = abstract_params(self._config)
        where = shardings(boxed, self._mesh, self._rules)
        return shard_bytes(jax.tree.map(self._placed, nn.unbox(boxed), where))

    def _placed(self, x: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, self._dtype, sharding=where)

    def to_score(self) -> Params:
        stacked = self._stacked
        if stacked is None and self._apart is None:
            stacked = self._load()
        elif stacked is None:
            where = shardings(abstract_params(self._config), self._mesh, self._rules)
            stacked = jax.jit(partial(stack, cycle=self._config.cycle), out_shardings=where)(
                self._apart
            )
        self._stacked, self._apart = stacked, None
        return cast(Params, stacked)

    def to_answer(self) -> Params:
        if self._apart is None:
            stacked = self.to_score()
            where = decoding_shardings(self._config, self._decode_mesh)
            self._apart = decoding_params(stacked, self._dtype, where)
            if all(x.dtype == self._dtype for x in jax.tree.leaves(stacked)):
                self._stacked = None
        return self._apart

    def hold(self, params: Params) -> None:
        """Replaces the parameters with stacked ones that are already sharded over `mesh`."""
        self._stacked, self._apart = params, None

    def forget(self) -> None:
        """Drops the parameters from memory; the next use reads them again."""
        self._stacked = self._apart = None
