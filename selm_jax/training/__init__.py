"""The update: state, optimiser, the jitted step, checkpoints, the loop over one iteration."""
