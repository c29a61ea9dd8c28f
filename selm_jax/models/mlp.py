"""The gated MLP of a dense model's layers."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from selm_jax.models.linear import Adapted, linear

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class MLP(Adapted):
    @nn.compact
    def __call__(self, x: Float[Array, "rows time embed"]) -> Float[Array, "rows time embed"]:
        d, f, bias = self.config.embed, self.config.mlp, self.config.mlp_bias
        gate = linear(self, "gate", x, ("embed", "mlp"), (d, f), bias=bias)
        up = linear(self, "up", x, ("embed", "mlp"), (d, f), bias=bias)
        active = ACTIVATIONS[self.config.activation](checkpoint_name(gate, "gate"))
        y = active * checkpoint_name(up, "up")
        return linear(self, "down", y, ("mlp", "embed"), (f, d), bias=bias)
