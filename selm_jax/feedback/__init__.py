"""Feedback: who judges the responses, and how scores become preference pairs.

* `ranker`: the protocol every ranker keeps (`scores(questions, candidates)`), the one check of
  scores, and `build(name, **settings)`.
* `rules`: rankers that need no model: sentiment, length, regular expressions, verifiable
  instructions. `workers`: a user's function, in processes of its own.
* `pairrm`: the paper's ranker, which reads two answers side by side.
* `judge`: a language model behind an OpenAI-compatible server; `judge_client` asks it and loses no
  paid answer. `human`: people, through the store that `annotate` fills. `mixture`: a weighted sum.
* `acquisition`: which prompts to ask about when there is a budget.
* `pairs`: pure functions from scores to (chosen, rejected, explore), and the report that says
  what became of every prompt. `labels`: a pair's label as a noisy judge would give it.

A ranker sees text only. What is trained on are the token ids that were generated.
"""
