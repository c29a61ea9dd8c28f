"""Decoder-only transformers as pure functions of their parameters."""
