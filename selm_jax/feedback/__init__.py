"""Rankers, which score the responses to each prompt.

* `ranker`: the protocol of all rankers (`scores(questions, candidates)`), the check of scores that
  all share, and `build(name, **settings)`.
* `rules`: rankers that need no model: sentiment, length, regular expressions, verifiable
  instructions. `workers`: a user's function, in separate processes.
* `models`: PairRM, the paper's ranker, which reads two answers side by side, and reward models.
* `judge`: a language model on an OpenAI-compatible server.
* `human`: people, through the store that `annotate` fills. `mixture`: a weighted sum of rankers.

Rankers see text only; training uses the token ids that were generated. `preferences` (`selection`,
`labels`, `acquisition`) turns scores into pairs.
"""
