"""Counts pairs and dropped prompts after ranking, for the report and the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from selm_jax.preferences.candidates import (
    REASONS,
    SOURCES,
    Candidate,
    Dropped,
    FeedbackError,
    Pair,
)
from selm_jax.preferences.selection import PLACES, Scores, check_length, place, ranks


@dataclass
class Report:
    """Counts over the prompts of one stage. Every prompt becomes a pair or is dropped.

    Call `add` once for each prompt, then read `as_dict`. `counts` has the same keys as `as_dict`.
    """

    counts: Counter[str] = field(default_factory=Counter)
    score_sums: dict[str, float] = field(default_factory=dict)

    def add(
        self, candidates: Sequence[Candidate], scores: Scores | None, result: Pair | Dropped
    ) -> None:
        """Counts the result of selection for one prompt.

        Args:
            candidates: the prompt's responses.
            scores: `[candidates]`; None for a prompt that was not scored and is therefore dropped.
            result: the outcome of `select` and `label`.

        Raises:
            FeedbackError: if there is not one score per candidate, or a pair has no scores.
        """
        texts = {each.text for each in candidates}
        count = self.counts
        count["prompts"] += 1
        count["candidates"] += len(candidates)
        count["duplicates"] += len(candidates) - len(texts)
        count["empty"] += sum(each.is_empty for each in candidates)
        count["cut_off"] += sum(each.finish == "length" for each in candidates)
        count.update(f"candidates/{each.source}" for each in candidates)
        if isinstance(result, Dropped):
            count["drops"] += 1
            count[f"drops/{result.reason}"] += 1
        if scores is not None:
            self._add_scores(candidates, scores, result)
        elif isinstance(result, Pair):
            raise FeedbackError("a prompt without scores became a pair; pass Dropped instead.")

    def _add_scores(
        self, candidates: Sequence[Candidate], scores: Scores, result: Pair | Dropped
    ) -> None:
        check_length(candidates, scores)
        count = self.counts
        count["scored"] += 1
        for candidate, score in zip(candidates, scores, strict=True):
            if np.isnan(score):
                continue
            source = candidate.source
            count[f"scored/{source}"] += 1
            self.score_sums[source] = self.score_sums.get(source, 0.0) + float(score)
        if isinstance(result, Dropped) and result.reason == "malformed":
            return
        ranked = ranks(scores)
        count[_tie(ranked)] += 1
        if isinstance(result, Dropped):
            return
        count["pairs"] += 1
        count["tie_kept"] += int(ranked[result.chosen] == ranked[result.rejected])
        count["label_against_scores"] += int(ranked[result.chosen] > ranked[result.rejected])
        count[f"winner/{candidates[result.chosen].source}"] += 1
        count[f"explore/{place(scores, result.explore)}"] += 1
        count[f"explore_is/{_explored_is(candidates, result)}"] += 1

    def as_dict(self) -> dict[str, int | float]:
        """A flat dict for a JSON report: all counts, also those that are 0, and the mean scores.

        Keys:
            prompts, pairs, drops, drops/REASON: prompts = pairs + drops.
            scored: prompts with scores, including those dropped as malformed;
                ties: prompts whose scores are all equal; ties_partial: prompts where only the best
                or the worst score is shared, so that the order of the candidates decides.
            tie_kept: pairs whose chosen and rejected scores are equal (`ties: first`);
                label_against_scores: pairs whose rejected score is higher (drawn labels).
            candidates, candidates/SOURCE: number of candidates, in total and by source;
                cut_off, empty: candidates that were cut off, or contain only white space;
                duplicates: candidates with the same text as an earlier one of their prompt.
            explore/PLACE: pairs by the place of the explore response among all candidates; if
                several explore, by the place of the first.
            explore_is/chosen, rejected, both, neither: pairs by the roles that are the same
                response as explore; winner/SOURCE: pairs by the source of the chosen response.
            score_mean/SOURCE: mean score of the source's scored candidates, in the ranker's unit;
                absent if the source has none.
        """
        means = {
            f"score_mean/{source}": self.score_sums[source] / self.counts[f"scored/{source}"]
            for source in SOURCES
            if source in self.score_sums
        }
        return {key: self.counts[key] for key in _KEYS} | means


_KEYS = (
    *("prompts", "pairs", "drops", *(f"drops/{each}" for each in REASONS)),
    *("scored", "ties", "ties_partial", "tie_kept", "label_against_scores"),
    *("candidates", *(f"candidates/{each}" for each in SOURCES)),
    *("cut_off", "empty", "duplicates"),
    *(f"explore/{each}" for each in PLACES),
    *(f"explore_is/{each}" for each in ("chosen", "rejected", "both", "neither")),
    *(f"winner/{each}" for each in SOURCES),
)


def _tie(ranked: Int[np.ndarray, " candidates"]) -> str:
    if ranked.max() == 1:
        return "ties"
    shared = (ranked == 1).sum() > 1 or (ranked == ranked.max()).sum() > 1
    return "ties_partial" if shared else "ties_none"


def _explored_is(candidates: Sequence[Candidate], pair: Pair) -> str:
    """Says whether the explored response is also "chosen", "rejected", "both" or "neither"."""
    explored = candidates[pair.explore].identity
    places = {"chosen": pair.chosen, "rejected": pair.rejected}
    shared = [role for role, i in places.items() if candidates[i].identity == explored]
    return "both" if len(shared) == 2 else (shared[0] if shared else "neither")
