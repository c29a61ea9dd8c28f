"""Runs the command-line program `selm` as `python -m selm_jax`."""

from selm_jax.cli import main

main()
