"""Imports everything that a run needs, before `forked` forks its processes."""

import matplotlib.pyplot as plt
import orbax.checkpoint as ocp

from selm_jax import cli, iterate

__all__ = ["cli", "iterate", "ocp", "plt"]
