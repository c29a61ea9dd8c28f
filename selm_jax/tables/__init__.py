"""The tables of a run folder: one module for each, with its rows, columns, `read` and `write`.

responses      responses/part-*.parquet   the policy's answers, as token ids
scores         scores/part-*.parquet      the ranker's scores of them so far
ranked         ranked.parquet             every candidate with its score, rank and role
examples       examples.parquet           training examples, with the reference's log-probabilities
heldout        heldout.parquet            held-out answers of the new policy
heldout_pairs  heldout_pairs.parquet      the policy's log-probabilities of held-out pairs
pairs          pairs.parquet              a reward model's rewards of held-out pairs
"""
