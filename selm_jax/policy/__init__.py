"""A language model that answers and scores, used by runs, `selm eval` and the Python API."""
