"""The stages of an iteration: each is a function of finished files, and writes finished files.

    generate    responses/part-*.parquet   the policy's answers, as token ids
    rank        ranked.parquet             every candidate with its score, rank and role; meanwhile
                                           scores/, which keeps what was ranked already
    score       examples.parquet           what is trained on, with reference log-probabilities
    train       checkpoints/               the state of training
    export      model/                     a Hugging Face folder
    evaluate    heldout*.parquet           held-out answers of the new policy, pairs of the data; or, of
                pairs.parquet              a reward model, its rewards of held-out pairs

Nothing else passes between stages. `iterate.iteration` calls them, and what it passes is what each
depends on: `stage.py` says how that is kept.
"""
