"""A language model that answers and scores: a run's, one that `selm eval` opens, or anybody's."""
