"""The tasks of the language model evaluation harness, on our models (the extra `lm-eval`)."""
