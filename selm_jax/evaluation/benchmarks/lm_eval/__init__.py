"""Runs tasks of the language model evaluation harness (lm-eval) on this package's models."""
