"""The public Python API: what `import selm_jax as selm` offers, made of the command line's own parts.

model     load, Model          a language model that answers, scores and is trained in place
answers   Answers              what it answered, as texts and as token ids
ranking   ranker, Ranker       who scores the answers
pairs     pairs, Pairs         chosen, rejected and explore, with the reference's log-probabilities
losses    loss                 what an update makes smaller
trainer   Trainer              updates by any loss
runs      run, read            whole experiments, and what they left

`selm_jax.__all__` lists what is public. All other modules may change in any release.
"""
