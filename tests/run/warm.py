"""Imports everything that a run needs, before `forked` forks its processes."""

import matplotlib.pyplot as plt
import orbax.checkpoint as ocp

from selm_jax import cli, iterate
from selm_jax.weights.export import export_folder

# Tiny models fill several files, as large ones do, so that several processes have some to write.
export_folder.__kwdefaults__["max_shard_bytes"] = 48 << 10

__all__ = ["cli", "iterate", "ocp", "plt"]
