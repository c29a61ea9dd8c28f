"""A model's parameters in the form that is asked for: whole layers to answer, stacked ones to score."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
from jax.sharding import Mesh

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Params, abstract_params, stack
from selm_jax.parallel.rules import TRAINING, Rules, shardings
from selm_jax.rollout.parameters import decoding_params, decoding_shardings


class Weights:
    """Parameters that are read when they are first needed, and held once where that is possible.

    Answering wants one tree per layer, laid out for decoding, in the dtype of the computation; scoring
    wants the layers stacked. Where both have one dtype, the one form is made from the other, which is
    then given up: to the bit nothing is lost. Otherwise the stacked form stays, because it alone has
    every bit, and the other is given up when scoring begins.
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
        """
        Args:
          load: reads the stacked parameters, each into its place on `mesh` by `rules`.
          dtype: of the computation.
          decode_mesh: the devices of `mesh` in the same order (`parallel.mesh.decode_mesh`).
        """
        self._load, self._config, self._dtype = load, config, dtype
        self._mesh, self._decode_mesh, self._rules = mesh, decode_mesh, rules
        self._stacked: Params | None = None
        self._apart: Params | None = None

    def to_score(self) -> Params:
        stacked = self._stacked
        if stacked is None and self._apart is None:
            stacked = self._load()
        elif stacked is None:
            where = shardings(abstract_params(self._config), self._mesh, self._rules)
            stacked = jax.jit(stack, out_shardings=where)(self._apart)
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
        """Takes other parameters in place of those held: stacked ones, each in its place on `mesh`."""
        self._stacked, self._apart = params, None

    def forget(self) -> None:
        """Gives up the parameters held: they are read anew when they are next needed."""
        self._stacked = self._apart = None
