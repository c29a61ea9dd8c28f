"""Makes training pairs from scored answers, with the reference's log-probabilities."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from selm_jax.api.answers import Answers, Writer
from selm_jax.api.errors import ApiError
from selm_jax.config import CutOff, ExploreName, RuleName, Ties
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.candidates import Dropped, FeedbackError, Pair
from selm_jax.preferences.examples import Example
from selm_jax.preferences.selection import (
    Explore,
    Rule,
    Scores,
    explore_named,
    rule_named,
    select,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, repr=False)
class Pairs(Sequence[Example]):
    """Preference pairs to train on, one per prompt, made by `selm.pairs`. A slice is `Pairs` too.

    Attributes:
      examples: the token ids, the roles of the responses and the reference's log-probabilities.
      rows: the same in readable form: the prompt, the text of each role, the scores.
      drops: the number of prompts that gave no pair, by reason.
      tokenizer: the digest of the tokenizer that made the token ids.
    """

    examples: tuple[Example, ...]
    rows: tuple[Mapping[str, Any], ...]
    drops: Mapping[str, int]
    tokenizer: str

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Example | Pairs:
        if not isinstance(index, slice):
            return self.examples[index]
        return dataclasses.replace(self, examples=self.examples[index], rows=self.rows[index])

    def batches(self, size: int, seed: int = 0) -> Iterator[Pairs]:
        """Yields shuffled batches of `size` pairs; the last batch may be smaller."""
        order = np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(self), size):
            which = order[start : start + size]
            yield dataclasses.replace(
                self,
                examples=tuple(self.examples[i] for i in which),
                rows=tuple(self.rows[i] for i in which),
            )

    def to_pandas(self) -> pd.DataFrame:
        """Returns a DataFrame: prompt, chosen, rejected, explore, score_chosen, score_rejected."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    @property
    def told(self) -> str:
        """A message that counts pairs and dropped prompts; without pairs, also advice."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.drops.items())
        dropped = f", {sum(self.drops.values())} prompts dropped ({reasons})" if reasons else ""
        return f"{len(self)} pairs{dropped}" + ("" if len(self) else f". {_REMEDY}")

    def __repr__(self) -> str:
        lines = [self.told]
        for row in self.rows[:4]:
            lines += [f"  {row['prompt']!r}", *(f"    {r:<8} {row[r]!r}" for r in ROLES)]
        return "\n".join(lines + ["  ..."] * (len(self) > 4))


_REMEDY = (
    "If all answers to a prompt have the same score, draw more samples, raise the temperature, use "
    'a ranker that tells them apart, or set ties="first"'
)


def pairs(
    answers: Answers,
    scores: Sequence[Scores],
    *,
    rule: RuleName | Rule = "best_worst",
    explore: ExploreName | Explore = "greedy",
    ties: Ties = "drop",
    cut_off: CutOff = "keep",
    min_margin: float = 0.0,
    reference: Writer | None | Literal["writer"] = "writer",
    seed: int = 0,
) -> Pairs:
    """Picks each prompt's chosen, rejected and explored answers from scored answers.

    The reference's log-probabilities are stored with the pairs, as in a run, and do not change in
    later updates.

    Args:
      answers: the answers from `Model.generate`.
      scores: an array `[answers]` for each prompt, higher is better; NaN drops the prompt.
      rule: picks chosen and rejected: "best_worst", "swap", "top_random", or a function
        `(candidates, scores, rng) -> Pair`.
      explore: picks the answers of the optimism term: "greedy", "sample", "all", "random", "best",
        "worst", or a function `(candidates, scores, rng) -> place`.
      ties: "drop", or "first" as in the authors' code: best and worst are then the same answer.
      cut_off: "drop" leaves out a prompt if one of the picked answers was cut off.
      min_margin: the smallest difference of the two scores, in the ranker's unit.
      reference: the model that is pi_ref; "writer" is the model that wrote the answers, as in the
        paper. None computes no log-probabilities, for a loss without a reference.
      seed: the seed of the rules' random choices.

    Returns:
      The pairs; prompts without a pair are counted in `drops`.

    Raises:
      ApiError: the numbers of prompts differ, or the writer was trained since it answered.
      FeedbackError: a rule is unknown, scores do not fit the answers, or a role has no candidate.
    """
    if len(answers) != len(scores):
        raise ApiError(
            f"there are answers to {len(answers)} prompts, but scores for {len(scores)}. Give an "
            "array of scores for each prompt: selm.ranker(...)(prompts, answers)"
        )
    rule = rule_named(rule) if isinstance(rule, str) else rule
    explore = explore_named(explore) if isinstance(explore, str) else explore
    examples, rows, drops = [], [], Counter[str]()
    for i, (each, of_prompt) in enumerate(zip(answers, scores, strict=True)):
        try:
            picked = select(
                each, of_prompt, rule=rule, explore=explore, ties=ties, cut_off=cut_off,
                min_margin=min_margin, seed=(seed, i),
            )  # fmt: skip
        except FeedbackError as error:
            raise FeedbackError(f"prompt {i}: {error}") from error
        if isinstance(picked, Dropped):
            drops[picked.reason] += 1
        else:
            examples.append(_example(answers, i, picked, of_prompt))
            rows.append(_row(answers, i, of_prompt, picked))
    made = Pairs(tuple(examples), tuple(rows), dict(drops), answers.model.tokenizer)
    return _scored(made, answers, reference)


def _example(answers: Answers, i: int, pair: Pair, scores: Scores) -> Example:
    ids = [each.token_ids or () for each in answers[i]]
    roles = {role: ids[getattr(pair, role)] for role in ROLES}
    further = {f"explore/{n}": ids[k] for n, k in enumerate(pair.explored[1:], 2)}
    example = Example.of(answers.prompts[i].id, answers.prompt_ids[i], roles | further)
    of = {each: float(score) for each, score in zip(ids, scores, strict=True)}
    return dataclasses.replace(example, scores=tuple(of[each] for each in example.responses))


def _row(answers: Answers, i: int, scores: Scores, pair: Pair) -> dict[str, Any]:
    texts = {role: answers[i][getattr(pair, role)].text for role in ROLES}
    of_pair = {f"score_{r}": float(scores[getattr(pair, r)]) for r in ("chosen", "rejected")}
    return {"prompt": answers.prompts[i].messages[-1].content} | texts | of_pair


def _scored(made: Pairs, answers: Answers, reference: Writer | None | str) -> Pairs:
    if reference == "writer":
        reference = answers.model
        if reference.updates != answers.updates:
            raise ApiError(
                f"{reference.name} has been trained (updates: "
                f"{reference.updates - answers.updates}) since it wrote these answers, so it is no "
                "longer their reference. Make the pairs before you train, or name another model: "
                "selm.pairs(..., reference=model)"
            )
    if reference is None or isinstance(reference, str) or not made.examples:
        return made
    found = reference._scores_of(made.examples, made.tokenizer)
    examples = [
        dataclasses.replace(example, reference_logps=logps)
        for example, logps in zip(made.examples, found, strict=True)
    ]
    return dataclasses.replace(made, examples=tuple(examples))
