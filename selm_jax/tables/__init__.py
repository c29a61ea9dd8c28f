"""The tables of a run folder: one module for each, with what a row is, its columns, `read` and `write`.

responses      responses/part-*.parquet   the policy's answers, as token ids
scores         scores/part-*.parquet      what the ranker has said of them so far
ranked         ranked.parquet             every candidate with its score, rank and role
examples       examples.parquet           what is trained on, with the reference's log-probabilities
heldout        heldout.parquet            held-out answers of the new policy
heldout_pairs  heldout_pairs.parquet      its log-probabilities of the data's held-out pairs
pairs          pairs.parquet              a reward model's rewards of held-out pairs
"""
