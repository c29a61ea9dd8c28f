"""The tasks of the language model evaluation harness (lm-eval) on our models."""
