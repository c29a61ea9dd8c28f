"""Feedback: who judges the responses.

* `ranker`: the protocol every ranker keeps (`scores(questions, candidates)`), the one check of
  scores, and `build(name, **settings)`.
* `rules`: rankers that need no model: sentiment, length, regular expressions, verifiable
  instructions. `workers`: a user's function, in processes of its own.
* `models`: PairRM, the paper's ranker, which reads two answers side by side, and reward models.
* `judge`: a language model behind an OpenAI-compatible server.
* `human`: people, through the store that `annotate` fills. `mixture`: a weighted sum.

A ranker sees text only. What is trained on are the token ids that were generated. How scores become
pairs is in `preferences`: `selection`, `labels`, `acquisition`.
"""
