"""Ranks with a language model behind an OpenAI-compatible server; caches every paid answer."""
