"""Ranks with a language model behind an OpenAI-compatible server; pays for no answer twice."""
