"""Feedback: who judges the responses, and how scores become preference pairs.

* `ranker`: the protocol every ranker keeps (`scores(questions, candidates)`), the one check of
  scores, and `build(name, **settings)`.
* `rules`: rankers that need no model: sentiment, length, regular expressions, verifiable
  instructions. `workers`: a user's function, in processes of its own.
* `judge`: a language model behind an OpenAI-compatible server; `judge_client` asks it and loses no
  paid answer. `mixture`: a weighted sum of rankers.
* `pairs`: pure functions from scores to (chosen, rejected, explore), and the report that says
  what became of every prompt.

A ranker sees text only. What is trained on are the token ids that were generated.
"""
