"""What a run imports, imported: the forked processes of `forked` begin with it."""

import importlib.util

import matplotlib.pyplot as plt
import orbax.checkpoint as ocp
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from selm_jax import cli, iterate

if importlib.util.find_spec("accelerate"):  # transformers imports what is there
    import accelerate  # noqa: F401

__all__ = ["AutoTokenizer", "PreTrainedTokenizerFast", "cli", "iterate", "ocp", "plt"]
