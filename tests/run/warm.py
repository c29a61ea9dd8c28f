"""What a run imports, imported: the forked processes of `forked` begin with it."""

import matplotlib.pyplot as plt
import orbax.checkpoint as ocp

from selm_jax import cli, iterate

__all__ = ["cli", "iterate", "ocp", "plt"]
