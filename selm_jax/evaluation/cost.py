"""Upper bounds of an evaluation's cost, computed before anything is spent (`--dry-run`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from selm_jax.feedback.judge.ranker import JudgeRanker
from selm_jax.feedback.ranker import Ranker

# Typical for English text. Used only for judges' requests, since their tokenizers are not known.
CHARACTERS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """Upper bounds of the tokens and requests that one model or judge of an evaluation needs.

    Attributes:
      what: the part: a model's or a judge's name.
      answers: number of answers to generate.
      prompt_tokens: prompt tokens to read for them; each prompt counts once.
      new_tokens: tokens to generate if every answer reaches its limit.
      scored_tokens: tokens to score for log-probabilities.
      judge_calls: requests to a judge, if none is answered from its cache.
      judge_tokens: tokens of these requests and their answers, at four characters per token; an
        answer that has not been generated yet counts with its limit.
    """

    what: str
    answers: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    scored_tokens: int = 0
    judge_calls: int = 0
    judge_tokens: int = 0


_ROWS = {
    "answers": "answers",
    "prompt_tokens": "prompt tokens",
    "new_tokens": "new tokens, at most",
    "scored_tokens": "scored tokens, at most",
    "judge_calls": "judge calls, at most",
    "judge_tokens": "judge tokens, about",
}


def judges(ranker: Ranker) -> list[JudgeRanker]:
    """Lists a ranker's judges: the ranker itself if it is a judge, or the judges in a mixture."""
    if isinstance(ranker, JudgeRanker):
        return [ranker]
    return [j for part in getattr(ranker, "parts", ()) for j in judges(part.ranker)]


def judge_cost(judge: JudgeRanker, calls: int, characters: int) -> Cost:
    """The cost of `calls` requests with `characters` characters in total, and of their answers."""
    template = sum(len(text) for _, text in judge.template.messages)
    tokens = (characters + calls * template) // CHARACTERS_PER_TOKEN
    tokens += calls * judge.sampling["max_tokens"]
    return Cost(f"{judge.name} {judge.client.model}", judge_calls=calls, judge_tokens=tokens)


def show(costs: Iterable[Cost], console: Console) -> None:
    """Prints a table of costs, with a column per model or judge and one for their sum."""
    costs = list(costs)
    table = Table(title="estimated cost; nothing was computed or requested", box=None)
    table.add_column("", no_wrap=True)
    for name in [c.what for c in costs] + ["together"] * (len(costs) > 1):
        table.add_column(name, justify="right", overflow="fold")
    for key, label in _ROWS.items():
        values = [getattr(c, key) for c in costs]
        if any(values):
            sums = [sum(values)] * (len(costs) > 1)
            table.add_row(label, *(f"{v:,}" for v in values + sums))
    console.print(table)
