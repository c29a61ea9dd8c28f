"""A language model behind an OpenAI-compatible server as a ranker. No answer is paid for twice."""
