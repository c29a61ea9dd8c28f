"""Ranks with a language model on an OpenAI-compatible server; caches every paid answer."""
