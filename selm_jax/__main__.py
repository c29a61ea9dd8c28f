"""`python -m selm_jax` is `selm`."""

from selm_jax.cli import main

main()
