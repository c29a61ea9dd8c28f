"""The command-line program `selm`, with its commands (verbs): `selm VERB ...`."""

from __future__ import annotations

import os

from selm_jax.cli import looking, machines, training
from selm_jax.cli.root import app, set_up_jax
from selm_jax.commands.ending import carried_out
from selm_jax.evaluation.benchmarks.command import app as evaluation
from selm_jax.lab.command import app as lab

__all__ = ["app", "looking", "machines", "main", "training"]

app.add_typer(lab, name="lab", callback=set_up_jax)
app.add_typer(evaluation, name="eval", callback=set_up_jax)


def main() -> None:
    """Entry point of the command-line program `selm`."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    carried_out(lambda: app(standalone_mode=False))
