"""From scores to preference pairs: pure functions.

The order of the candidates matters where scores tie; the authors' order is the model's own
response first, then the dataset's chosen, then its rejected (online_feedback.py in the code
published with arXiv 2405.19332).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Int, Real

from selm_jax.preferences.candidates import Candidate, Dropped, FeedbackError, Pair, check_choice

RULES = ("best_worst", "swap", "top_random")
EXPLORES = ("greedy", "sample", "all", "random", "best", "worst")
TIES = ("drop", "first")
CUT_OFFS = ("keep", "drop")
CUT_OFFS = ("keep", "drop")
PLACES = ("best", "middle", "worst", "tied")

Scores: TypeAlias = Sequence[float] | Real[np.ndarray, " candidates"]


def ranks(scores: Scores) -> Int[np.ndarray, " candidates"]:
    """Ranks from 1 (highest score); equal scores share the better rank, as in PairRM's own ranking.

    Args:
        scores: `[candidates]`, finite.

    Returns:
        int64 `[candidates]`: 1 + how many scores are strictly higher.

    Raises:
        FeedbackError: not one-dimensional, or not finite (NaN has no rank).
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise FeedbackError(f"scores are {scores!r}; expected a flat list of finite numbers.")
    return 1 + len(values) - np.searchsorted(np.sort(values), values, side="right")


def place(scores: Scores, index: int) -> str:
    """Where candidate `index` stands among all candidates of its prompt.

    Returns:
        `tied` when all scores are equal, else `best` or `worst` for the highest or lowest score,
        shared or not, else `middle`.

    Raises:
        FeedbackError: as `ranks`.
    """
    ranked = ranks(scores)
    if ranked.max() == 1:
        return "tied"
    if ranked[index] == 1:
        return "best"
    return "worst" if ranked[index] == ranked.max() else "middle"


def select(
    candidates: Sequence[Candidate],
    scores: Scores,
    *,
    rule: str = "best_worst",
    explore: str = "greedy",
    ties: str = "drop",
    cut_off: str = "keep",
    min_margin: float = 0.0,
    seed: int | Sequence[int] | None = None,
) -> Pair | Dropped:
    """Picks one prompt's chosen, rejected and explore responses.

    A prompt that fails several tests is dropped for the first reason in this order: `malformed` (a
    score is NaN: what a judge said of that response could not be read), `tie` (the best and worst scores are equal), `equal_text` (chosen and rejected are the same text or
    ids), `empty` (chosen or rejected), `cut_off`, `margin`.

    Args:
        candidates: the prompt's responses; among equal scores the first in this order wins, as
            best and as worst.
        scores: `[candidates]`, higher is better; NaN where a judge was not readable.
        rule: `best_worst` takes the best and worst of all candidates (arXiv 2405.19332, algorithm
            1); `swap` the better and worse of the dataset's chosen and the explore response (the
            other label update of the same paper's appendix D); `top_random` the best, and one
            drawn uniformly from those with a lower score.
        explore: the response of the optimism term, whatever its rank: the first greedy one, the
            first sample, the `best` or `worst` of the model's own (the first of equals), `all` of
            the model's own, over which the term takes its mean, or one drawn uniformly from them,
            which is the same in expectation.
        ties: `drop`, or `first` for the authors' rule: the first candidate is chosen and rejected
            at once and the pair is kept, so that only the optimism term has a gradient.
        cut_off: `drop` refuses a prompt one of whose responses with a role was cut off.
        min_margin: the least chosen score minus rejected score, in the ranker's unit.
        seed: for `random` and `top_random`; one for each prompt, such as (seed, iteration, prompt
            number), since the same seed draws the same place in the list.

    Raises:
        FeedbackError: unknown option, no candidate for a role, a draw without a seed, or scores
            that do not fit the candidates.
    """
    check_choice("rule", rule, RULES)
    check_choice("ties", ties, TIES)
    check_choice("cut_off", cut_off, CUT_OFFS)
    if not 0.0 <= min_margin < float("inf"):
        raise FeedbackError(f"min_margin is {min_margin!r}; expected a number of at least 0.")
    check_length(candidates, scores)
    if np.isnan(np.asarray(scores, np.float64)).any():
        return Dropped("malformed")
    explorer = _explorer(candidates, scores, explore, seed)
    pool = list(range(len(candidates)))
    if rule == "swap":
        pool = sorted({_first(candidates, "chosen", "rule: swap"), explorer})
    ranked = ranks(np.asarray(scores)[pool])
    # NumPy's argmin and argmax take the first of equals: the authors' rule.
    best, worst = int(ranked.argmin()), int(ranked.argmax())
    tied = bool(ranked.max() == 1)
    if rule == "top_random" and not tied:
        lower = np.argsort(ranked, kind="stable")[(ranked == 1).sum() :]  # by rank, not by place
        worst = int(lower[draws(seed, "rule: top_random", 1).integers(len(lower))])
    explored = tuple(_own(candidates)) if explore == "all" else ()
    pair = Pair(pool[best], pool[worst], explorer, explored if len(explored) > 1 else ())
    if tied and ties == "drop":
        return Dropped("tie")
    chosen, rejected = candidates[pair.chosen], candidates[pair.rejected]
    if not tied and (chosen.text == rejected.text or chosen.identity == rejected.identity):
        return Dropped("equal_text")
    if chosen.is_empty or rejected.is_empty:
        return Dropped("empty")
    others = [candidates[i] for i in explored]
    trained = (chosen, rejected, candidates[pair.explore], *others)
    if cut_off == "drop" and any(each.finish == "length" for each in trained):
        return Dropped("cut_off")
    if scores[pair.chosen] - scores[pair.rejected] < min_margin:
        return Dropped("margin")
    return pair


def check_length(candidates: Sequence[Candidate], scores: Scores) -> None:
    if len(candidates) != len(scores) or not len(candidates):
        raise FeedbackError(
            f"found {len(candidates)} candidates and {len(scores)} scores; expected one score for "
            "each candidate, and at least one candidate."
        )


def _explorer(
    candidates: Sequence[Candidate],
    scores: Scores,
    explore: str,
    seed: int | Sequence[int] | None,
) -> int:
    check_choice("explore", explore, EXPLORES)
    if explore in ("greedy", "sample"):
        return _first(candidates, explore, f"explore: {explore}")
    own = _own(candidates)
    if not own:
        raise _no_candidate(candidates, "greedy or sample", f"explore: {explore}")
    if explore == "all":
        return own[0]
    if explore == "random":
        return own[int(draws(seed, "explore: random").integers(len(own)))]
    ranked = ranks(np.asarray(scores)[own])
    return own[int(ranked.argmin() if explore == "best" else ranked.argmax())]


def _own(candidates: Sequence[Candidate]) -> list[int]:
    """The model's own responses."""
    return [i for i, each in enumerate(candidates) if each.source in ("greedy", "sample")]


def draws(
    seed: int | Sequence[int] | None, asked: str, stream: int | None = None
) -> np.random.Generator:
    """Random numbers of a prompt. Draws for different ends come from different streams."""
    if seed is None:
        raise FeedbackError(f"{asked} needs a seed for each prompt; found None.")
    key = () if stream is None else (stream,)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _first(candidates: Sequence[Candidate], source: str, asked: str) -> int:
    for index, candidate in enumerate(candidates):
        if candidate.source == source:
            return index
    raise _no_candidate(candidates, source, asked)


def _no_candidate(candidates: Sequence[Candidate], source: str, asked: str) -> FeedbackError:
    found = ", ".join(each.source for each in candidates) or "none"
    return FeedbackError(
        f"{asked} needs a candidate of source {source}; this prompt has: {found}. "
        "Generate one, or ask for another."
    )
