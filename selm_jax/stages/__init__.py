"""The stages of an iteration: each reads finished files and writes finished files.

    generate    responses/part-*.parquet   the policy's answers, as token ids
    rank        ranked.parquet             every candidate with its score, rank and role; while it
                                           runs, scores/ keeps the finished parts
    score       examples.parquet           training examples with reference log-probabilities
    train       checkpoints/               the training state
    export      model/                     a Hugging Face folder
    evaluate    heldout*.parquet           the new policy's held-out answers, and the data's pairs
                pairs.parquet              for a reward model: its rewards of held-out pairs

Nothing else passes between stages. `iterate.iteration` calls them with everything that they depend
on; `stage.py` records these inputs.
"""
