"""A small experiment without data, to which tests of a group of settings add theirs."""

TREE = {
    "output": "runs/x", "iterations": 1, "model": {"source": "m"},
    "objective": {"loss": "dpo", "beta": 0.1},
    "candidates": {"dataset": False, "samples": 2},
    "training": {"learning_rate": 1e-6, "global_batch": 8},
}  # fmt: skip
