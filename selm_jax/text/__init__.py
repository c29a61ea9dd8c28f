"""Text at the edges: datasets of prompts in (`prompts`), chat templates to token ids (`chat`)."""
