"""The public Python API (`import selm_jax as selm`), built from the same parts as the command line.

model     load, Model          a language model that answers, scores and is trained in place
answers   Answers              its answers, as texts and as token ids
ranking   ranker, Ranker       scores of the answers
pairs     pairs, Pairs         chosen, rejected and explore, with the reference's log-probabilities
losses    loss                 the loss that training minimises
trainer   Trainer              updates with any loss
runs      run, read            whole experiments and their results

`selm_jax.__all__` lists what is public. All other modules may change in any release.
"""
