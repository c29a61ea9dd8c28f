"""A language model that answers prompts and scores answers, for runs, `selm eval` and the API."""
