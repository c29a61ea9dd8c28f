"""A language model behind an OpenAI-compatible server as the ranker; no answer is paid for twice."""
