"""Training: the state, optimisers, the compiled update, checkpoints, and the training loop."""
