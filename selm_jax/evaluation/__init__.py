"""Evaluation: held-out reward against divergence from the start."""
